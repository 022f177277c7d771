"""Finds, checks and restores the state that a run starts or resumes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from diffusion_t5x.checkpointing import checkpoints, integrity, reading
from diffusion_t5x.checkpointing.checkpoints import CheckpointConfig, Checkpointer
from diffusion_t5x.checkpointing.items import restore_position
from diffusion_t5x.data.datasets import DatasetIterator
from diffusion_t5x.runtime.train_state import TrainState, named_leaves, replace, select
from diffusion_t5x.training import run_record


@dataclasses.dataclass(frozen=True)
class StartingPoint:
    """The checkpoint that a run starts or resumes from, found undamaged.

    Attributes:
      path: The checkpoint; None for fresh parameters.
      first_step: Step that the run started at, from which TRAIN_STEPS_RELATIVE counts.
      is_own: Whether the run saved the checkpoint itself, and resumes.
      has_optimizer: Whether the optimiser state is restored as well.
      begins: What the network has and the checkpoint's had not (`reading.ADDITIONS`), whose
        parameters begin fresh, with a fresh optimiser state.
      parameters: Which parameters of it, of `reading.PARAMETERS`; a run of its own goes on with
        its 'raw' ones, and its average.
      damaged: Paths of the run's own newer checkpoints, which are damaged.
    """

    path: str | None
    step: int
    first_step: int
    is_own: bool = False
    has_optimizer: bool = False
    damaged: tuple[str, ...] = ()
    begins: tuple[str, ...] = ()
    parameters: str = "raw"

    def __str__(self) -> str:
        if self.path is None:
            return "fresh parameters"
        if self.is_own:
            return f"resuming from {self.path}"
        parts = "parameters and optimiser" if self.has_optimizer else "parameters"
        if self.parameters == "averaged" and reading.has_average(self.path):
            parts = f"averaged {parts}"
        fresh = f", with fresh {' and '.join(self.begins)}" if self.begins else ""
        return f"{parts} of {self.path}, at step {self.step}{fresh}"

    def last_step(self, total_steps: int | None, relative_steps: int | None) -> int:
        """Returns the step at which the run ends.

        Args:
          total_steps: TRAIN_STEPS, which includes the steps of an initial checkpoint.
          relative_steps: TRAIN_STEPS_RELATIVE, which takes precedence.

        Raises:
          ValueError: If neither is set, the one that counts is no positive integer, or an initial
            checkpoint has no step left to train. A finished run may be started again.
        """
        name, steps = "TRAIN_STEPS_RELATIVE", relative_steps
        if steps is None:
            name, steps = "TRAIN_STEPS", total_steps
        if steps is None:
            raise ValueError("how long to train? Set TRAIN_STEPS or TRAIN_STEPS_RELATIVE.")
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"{name} = {steps!r}; expected a positive number of steps.")
        if relative_steps is not None:
            return self.first_step + steps
        if not self.is_own and steps <= self.step:
            raise ValueError(
                f"TRAIN_STEPS = {steps} includes the steps of INITIAL_CHECKPOINT_PATH = "
                f"{self.path}, which is at step {self.step}; expected more than {self.step}, or "
                "TRAIN_STEPS_RELATIVE for the number of further steps."
            )
        return steps

    def fit(self, abstract: TrainState) -> StartingPoint:
        """Refuses a checkpoint of other names or shapes than the state's; reads no array.

        Returns:
          This starting point, which may now say what begins here.

        Raises:
          CheckpointMismatchError: If they differ.
        """
        if self.path is None:
            return self
        names = list(named_leaves(abstract.params))
        if not self.is_own and (begins := reading.lacking_additions(self.path, names)):
            reading.check_params(self.path, select(abstract.params, _in_checkpoint(begins)))
            return dataclasses.replace(self, has_optimizer=False, begins=begins)
        reading.check_params(self.path, abstract.params)
        if self.has_optimizer:
            reading.check_item(self.path, "optimizer", reading.optimizer_item(abstract))
        if self.is_own and abstract.average is not None and reading.has_average(self.path):
            reading.check_item(self.path, "average", abstract.average)
        return self


def _in_checkpoint(begins: tuple[str, ...]) -> Callable[[str], bool]:
    """Returns which parameters are in a checkpoint that lacks these of `reading.ADDITIONS`."""
    return lambda name: not any(reading.ADDITIONS[kind](name) for kind in begins)


def what_is_left(step: int, last_step: int) -> str:
    """Describes how many steps remain at `step`."""
    if step >= last_step:
        return f"nothing left to train: step {step} of {last_step} is reached"
    return f"{last_step - step} steps to train, up to step {last_step}"


def find(model_dir: str, config: CheckpointConfig) -> StartingPoint:
    """Decides what a run starts from, and verifies that checkpoint.

    Raises:
      FileNotFoundError: If the initial checkpoint is needed and does not exist.
      DamagedCheckpointError: If it is damaged, or all of the run's own are.
      OtherRunError: If the run's record is damaged.
    """
    # The order is important.
    # 1. The run's own newest undamaged checkpoint: a preempted run resumes, whatever it began with,
    #    and though that be gone. (Older versions did not record the step that a run began at.)
    if config.save is not None and checkpoints.find_checkpoints(model_dir):
        step, path, damaged = checkpoints.newest_undamaged(model_dir, integrity.ITEMS)
        first_step = run_record.read(model_dir).get("first_step")
        if first_step is None:
            first_step = _select_initial(config.restore)[0] if config.restore else 0
        return StartingPoint(path, step, first_step, True, True, damaged)
    # 2. Without an initial checkpoint, fresh parameters.
    if config.restore is None:
        return StartingPoint(None, 0, 0)
    initial_step, initial = _select_initial(config.restore)
    # 3. The parameters alone of an initial checkpoint.
    if config.restore.params_only:
        return StartingPoint(initial, 0, 0, parameters=config.restore.parameters)
    # 4. The state of an initial checkpoint, at its step; the optimiser starts fresh if its state
    #    is missing or T5X's. With another objective than the checkpoint's this is AR2Diff.
    has_optimizer = reading.has_optimizer_state(initial)
    return StartingPoint(
        initial,
        initial_step,
        initial_step,
        has_optimizer=has_optimizer,
        parameters=config.restore.parameters,
    )


def _select_initial(config: checkpoints.RestoreCheckpointConfig) -> tuple[int, str]:
    """Returns the step that a run starts at, and the checkpoint that it starts from."""
    items = () if config.params_only else ("optimizer",)
    config = dataclasses.replace(config, mode="specific")
    try:
        [(step, path)] = checkpoints.select_checkpoints(config, items, "INITIAL_CHECKPOINT_PATH")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"INITIAL_CHECKPOINT_PATH: {error}") from error
    return 0 if config.params_only else step, path


def restore(
    start: StartingPoint,
    abstract: TrainState,
    checkpointer: Checkpointer | None,
    iterator: DatasetIterator,
    create: Callable[[], TrainState],
) -> TrainState:
    """Restores or creates the state that a run starts from, sharded as `abstract` is.

    Args:
      start: What `find` decided, and `fit` checked.
      abstract: `jax.ShapeDtypeStruct`s of the state, with shardings.
      checkpointer: The run's checkpointer; None if it saves nothing.
      iterator: The training data, moved to its saved position if the run resumes.
      create: Initialises a state, of fresh parameters.

    Raises:
      CheckpointMismatchError: If the checkpoint does not fit.
    """
    if start.path is not None and start.has_optimizer:
        if checkpointer is not None and start.is_own and checkpointer.config.save_dataset:
            restore_position(start.path, iterator)
        if start.is_own and jax.process_index() == 0:
            _say_average(start.path, abstract)
        return reading.restore_train_state(start.path, abstract, start.parameters)
    if start.path is None:
        return create()
    fresh = create()  # of which only what the checkpoint lacks is kept
    in_checkpoint = _in_checkpoint(start.begins)
    opt_state = fresh.opt_state
    added = select(fresh.params, lambda name: not in_checkpoint(name))
    del fresh
    wanted = select(abstract.params, in_checkpoint)
    params = reading.restore_params(start.path, wanted, verify=False, parameters=start.parameters)
    if start.begins:
        params = replace(params, added)
    step = jax.device_put(np.int32(start.step), abstract.step.sharding)
    if start.step and jax.process_index() == 0:
        why = "it has no optimiser state that can be restored here (T5X's cannot)"
        if start.begins:
            why = f"its optimiser state is not that of {' and '.join(start.begins)}"
        print(
            f"{start.path}: restored parameters and step {start.step}; {why}, so the optimiser "
            "starts fresh."
        )
    return TrainState(step, params, opt_state)


def _say_average(path: str, abstract: TrainState) -> None:
    """Says so if a run that resumes begins to average its parameters, or no longer does."""
    if abstract.average is not None and not reading.has_average(path):
        print(f"{path} has no moving average: it begins with the parameters (EMA_DECAY).")
    if abstract.average is None and reading.has_average(path):
        print(f"{path} has a moving average, which is dropped: EMA_DECAY = None.")
