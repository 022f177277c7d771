"""Where a run begins or goes on: found and checked before anything is computed, then restored."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from diffusion_t5x.checkpointing.checkpoints import (
    CheckpointConfig,
    Checkpointer,
    RestoreCheckpointConfig,
    SavesPosition,
    select_checkpoints,
)
from diffusion_t5x.checkpointing.reading import (
    check_params,
    check_train_state,
    has_optimizer_state,
    restore_params,
    restore_train_state,
)
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.train_state import TrainState, create_train_state


@dataclasses.dataclass(frozen=True)
class StartingPoint:
    """The checkpoint that a run begins or goes on from.

    Attributes:
      path: of the checkpoint; None for fresh parameters.
      step: of the state.
      first_step: step that the run began at, from which TRAIN_STEPS_RELATIVE counts.
      is_own: whether it is the run's own, saved by an earlier start.
      has_optimizer: whether the optimiser's state is taken over as well.
    """

    path: str | None
    step: int
    first_step: int
    is_own: bool = False
    has_optimizer: bool = False

    def __str__(self) -> str:
        if self.path is None:
            return "fresh parameters"
        if self.is_own:
            return f"goes on from {self.path}"
        what = "parameters and optimiser" if self.has_optimizer else "parameters"
        return f"{what} of {self.path}, at step {self.step}"

    def last_step(self, total_steps: int | None, relative_steps: int | None) -> int:
        """The step at which the run ends.

        Args:
          total_steps: TRAIN_STEPS.
          relative_steps: TRAIN_STEPS_RELATIVE, which goes first.

        Raises:
          ValueError: if there is neither, one is no positive number, or the initial checkpoint is
            there already. A run whose own checkpoint is there has merely ended.
        """
        name, steps = "TRAIN_STEPS_RELATIVE", relative_steps
        if steps is None:
            name, steps = "TRAIN_STEPS", total_steps
        if steps is None:
            raise ValueError("how long to train? Set TRAIN_STEPS or TRAIN_STEPS_RELATIVE.")
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"{name} = {steps!r}; expected a positive whole number of steps.")
        if relative_steps is not None:
            return self.first_step + steps
        if not self.is_own and steps <= self.step:
            raise ValueError(
                f"TRAIN_STEPS = {steps}, but INITIAL_CHECKPOINT_PATH = {self.path} is at step "
                f"{self.step}, and its steps count; expected more than {self.step}, or "
                "TRAIN_STEPS_RELATIVE for the number of further steps."
            )
        return steps

    def check(self, abstract: TrainState) -> None:
        """Compares names and shapes in the checkpoint with the state's; reads no array.

        Raises:
          CheckpointMismatchError: if they differ.
        """
        if self.path is None:
            return
        if self.has_optimizer:
            check_train_state(self.path, abstract)
        else:
            check_params(self.path, abstract.params)


def what_is_left(step: int, last_step: int) -> str:
    """How far a run that is at `step` has to go."""
    if step >= last_step:
        return f"nothing left to train: step {step} of {last_step} is reached"
    return f"{last_step - step} steps to train, up to step {last_step}"


def find(model_dir: str, config: CheckpointConfig) -> StartingPoint:
    """The run's own latest checkpoint, else the initial checkpoint, else fresh parameters.

    Args:
      model_dir: directory of the run.
      config: what the run saves and restores.

    Raises:
      FileNotFoundError: if the initial checkpoint is not there.
      DamagedCheckpointError: if it is damaged, or all of the run's own are.
    """
    initial = StartingPoint(None, 0, 0)
    if config.restore is not None:
        latest = dataclasses.replace(config.restore, mode="specific")
        try:
            items = ("params",) if config.restore.params_only else ("params", "optimizer")
            [(step, path)] = select_checkpoints(latest, items)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"INITIAL_CHECKPOINT_PATH: {error}") from error
        if config.restore.params_only:
            initial = StartingPoint(path, 0, 0)
        else:
            initial = StartingPoint(path, step, step, has_optimizer=has_optimizer_state(path))
    if config.save is not None:
        try:
            [(step, path)] = select_checkpoints(
                RestoreCheckpointConfig(model_dir), ("params", "optimizer", "dataset")
            )
        except FileNotFoundError:
            return initial
        return StartingPoint(path, step, initial.first_step, is_own=True, has_optimizer=True)
    return initial


def restore(
    start: StartingPoint,
    model: Any,
    partitioner: PjitPartitioner,
    abstract: TrainState,
    checkpointer: Checkpointer | None,
    iterator: SavesPosition,
    random_seed: int,
    spec: tuple[Any, Any],
) -> TrainState:
    """The state at a starting point, where `abstract` says that it lies.

    Args:
      start: found by `find`.
      model: what is trained.
      partitioner: devices and sharding.
      abstract: shapes and shardings of the state.
      checkpointer: of the run; None if it saves nothing.
      iterator: of the data, moved to where the run's own checkpoint was.
      random_seed: of fresh parameters.
      spec: shapes and dtypes to initialise with.

    Raises:
      CheckpointMismatchError: if the checkpoint does not fit.
    """
    if start.is_own and checkpointer is not None:
        return checkpointer.restore(abstract, iterator)
    if start.path is not None and start.has_optimizer:
        return restore_train_state(start.path, abstract)
    rng = jax.random.fold_in(jax.random.PRNGKey(random_seed), np.uint32(2**32 - 1))
    state = create_train_state(model, partitioner, *spec, rng)
    if start.path is None:
        return state
    state = dataclasses.replace(state, params=restore_params(start.path, abstract.params))
    if start.step:
        state = dataclasses.replace(
            state, step=jax.device_put(np.int32(start.step), abstract.step.sharding)
        )
        if jax.process_index() == 0:
            print(
                f"{start.path}: parameters and step {start.step} are taken over; it has no "
                "optimiser state that can be read here (a T5X optimiser's is dropped), so the "
                "optimiser starts afresh."
            )
    return state
