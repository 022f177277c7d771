"""Checkpoints through Orbax: written in the background, whole or not at all, and checked on read.

A run's directory holds `checkpoint_{step}/` with three items: `params`, `optimizer` (its state and
the step) and `dataset` (the position in each data shard). Checkpoints of T5X are read as well,
their parameters and step.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from diffusion_t5x.checkpointing import integrity
from diffusion_t5x.checkpointing.integrity import DamagedCheckpointError
from diffusion_t5x.checkpointing.items import (
    ArraysArgs,
    ArraysHandler,
    DatasetArgs,
    DatasetHandler,
    SavesPosition,
)
from diffusion_t5x.checkpointing.reading import optimizer_item, read_train_state
from diffusion_t5x.interop import t5x_checkpoints
from diffusion_t5x.runtime.train_state import TrainState

PREFIX = "checkpoint"
_NAME = re.compile(rf"^{PREFIX}_(\d+)$")


@dataclasses.dataclass(frozen=True)
class SaveCheckpointConfig:
    """When to save and what to keep.

    Attributes:
      period: steps between checkpoints; there is always one at the end.
      keep: how many to keep, the latest or the best; None for all.
      keep_best_metric: keep the best `keep` by this metric, and the latest, e.g.
        'training_eval/loss' or 'inference_eval/my_task/bleu'.
      best_mode: whether the best is the 'min' or the 'max'.
      save_dataset: save the position in the data, so that resuming goes on where it was.
      checksums: keep a checksum of each file, by which damage is found before it is restored.
    """

    period: int = 1000
    keep: int | None = None
    keep_best_metric: str | None = None
    best_mode: Literal["min", "max"] = "min"
    save_dataset: bool = True
    checksums: bool = True

    def __post_init__(self):
        if self.period < 1 or (self.keep is not None and self.keep < 1):
            raise ValueError(
                f"SaveCheckpointConfig: period = {self.period}, keep = {self.keep}; expected at "
                "least 1 (keep may be None)."
            )
        if self.best_mode not in ("min", "max"):
            raise ValueError(f"best_mode = {self.best_mode!r}; expected 'min' or 'max'.")


@dataclasses.dataclass(frozen=True)
class RestoreCheckpointConfig:
    """Where a run starts from, or which checkpoints are evaluated.

    Attributes:
      path: a checkpoint, or the directory of a run; for evaluation also a tuple of them.
      mode: 'specific' takes `path` itself, or the latest where it is a run's directory; 'latest'
        the latest of the run; 'all' every checkpoint of the run (evaluation only).
      params_only: take the parameters alone: training starts at step 0 with a fresh optimiser.
    """

    path: str | tuple[str, ...]
    mode: Literal["specific", "latest", "all"] = "specific"
    params_only: bool = False

    def __post_init__(self):
        if self.mode not in ("specific", "latest", "all"):
            raise ValueError(f"mode = {self.mode!r}; expected 'specific', 'latest' or 'all'.")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What a run saves and restores.

    Attributes:
      save: None to save nothing.
      restore: None to start from fresh parameters.
    """

    save: SaveCheckpointConfig | None = None
    restore: RestoreCheckpointConfig | None = None


def _manager_options(config: SaveCheckpointConfig) -> ocp.CheckpointManagerOptions:
    policies = checkpoint_managers.preservation_policy
    metric, value = config.keep_best_metric, None
    if config.keep is None:
        policy = policies.PreserveAll()
    elif metric is None:
        policy = policies.LatestN(config.keep)
    else:
        # A checkpoint without the metric counts as the worst.
        worst = float("inf") if config.best_mode == "min" else -float("inf")
        value = lambda metrics: metrics.get(metric, worst)  # noqa: E731
        best = policies.BestN(get_metric_fn=value, reverse=config.best_mode == "min", n=config.keep)
        policy = policies.AnyPreservationPolicy([policies.LatestN(1), best])
    # Orbax writes the metrics down, and so knows them after a restart, where `best_fn` is set.
    return ocp.CheckpointManagerOptions(
        step_prefix=PREFIX, preservation_policy=policy, best_fn=value, create=True
    )


class _Manager(ocp.CheckpointManager):
    """Orbax's own, which keeps what went wrong in the background.

    Orbax tells of it only after all processes have met, and those where nothing went wrong come to
    that meeting twenty minutes later.
    """

    failure: BaseException | None = None

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except BaseException as error:
            self.failure = error
            raise


class Checkpointer:
    """Saves and restores the train states of one run.

    Attributes:
      config: when to save and what to keep.
    """

    def __init__(self, directory: str, config: SaveCheckpointConfig):
        self.config = config
        self._directory = epath.Path(directory).absolute()
        if jax.process_index() == 0:
            integrity.forget_unreadable_metrics(self._directory)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("metrics of checkpoints are readable")
        self._manager = _Manager(
            self._directory,
            options=_manager_options(config),
            item_handlers={
                "params": ArraysHandler(config.checksums),
                "optimizer": ArraysHandler(config.checksums),
                "dataset": DatasetHandler(config.checksums),
            },
        )

    def save(
        self,
        state: TrainState,
        iterator: SavesPosition | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts writing `checkpoint_{state.step}`, unless it is there already.

        The arrays are copied before this returns, so the state may be donated afterwards. A state
        whose `opt_state` is None is saved as parameters alone.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = {"params": ArraysArgs(state.params)}
        if state.opt_state is not None:
            items["optimizer"] = ArraysArgs(optimizer_item(state))
        if iterator is not None and self.config.save_dataset:
            items["dataset"] = DatasetArgs(iterator)
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=dict(metrics or {}))

    def check(self) -> None:
        """Raises what went wrong in the background since; does not wait."""
        if self._manager.failure is not None:
            raise self._manager.failure

    def all_steps(self) -> list[int]:
        """All steps there are, ascending."""
        return sorted(self._manager.all_steps())

    def restore(
        self, abstract_state: TrainState, iterator: SavesPosition | None = None
    ) -> TrainState:
        """The latest state, laid out as `abstract_state` says; `iterator` is moved to its place.

        Checkpoints that turn out to be damaged are set aside, as `checkpoint_{step}.damaged`, and
        the latest whole one is taken.

        Raises:
          FileNotFoundError: if there is none.
          DamagedCheckpointError: if all are damaged; none is set aside then.
          CheckpointMismatchError: if it does not fit.
        """
        if not self.all_steps():
            raise FileNotFoundError(f"{self._directory} has no checkpoint to go on from.")
        found = list_checkpoints(str(self._directory))
        whole, damaged = _newest_whole(found, ("params", "optimizer", "dataset"))
        path = epath.Path(whole)
        self._set_aside(damaged)
        state = read_train_state(str(path), abstract_state)
        if iterator is not None and self.config.save_dataset and (path / "dataset").exists():
            DatasetHandler().restore(path / "dataset", DatasetArgs(iterator))
        return state

    def _set_aside(self, damaged: Sequence[str]) -> None:
        if not damaged:
            return
        if jax.process_index() == 0:
            for path in damaged:
                print(f"{path} is kept as {integrity.set_aside(epath.Path(path))}.")
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()

    def close(self) -> None:
        """Waits and lets go of all resources; what failed in the background is not waited for."""
        self.check()
        self._manager.close()


def list_checkpoints(path: str) -> list[tuple[int, str]]:
    """(step, path) of a checkpoint, or of all finished ones of a run, ascending.

    Raises:
      FileNotFoundError: if there is neither a checkpoint nor a run with one.
    """
    directory = epath.Path(path)
    if directory.name == t5x_checkpoints.INDEX and directory.is_file():
        directory = directory.parent
    if (match := _NAME.match(directory.name)) and _is_checkpoint(directory):
        return [(int(match.group(1)), str(directory.absolute()))]
    found = []
    if directory.is_dir():
        for child in directory.iterdir():
            if match := _NAME.match(child.name):
                found.append((int(match.group(1)), str(child.absolute())))
    if not found:
        beside = directory.parent.iterdir() if directory.parent.is_dir() else ()
        near = difflib.get_close_matches(directory.name, [child.name for child in beside], n=1)
        hint = f" Did you mean {directory.parent / near[0]}?" if near else ""
        raise FileNotFoundError(
            f"{path} is neither a checkpoint nor a run with one; expected a directory such as "
            f"MODEL_DIR or MODEL_DIR/{PREFIX}_1000.{hint}"
        )
    return sorted(found)


def _is_checkpoint(directory: epath.Path) -> bool:
    return (directory / "params").exists() or t5x_checkpoints.is_t5x_checkpoint(str(directory))


def _newest_whole(found: Sequence[tuple[int, str]], items: Sequence[str]) -> tuple[str, list[str]]:
    """The last of a run's checkpoints whose `items` are not damaged, and those that are.

    Raises:
      DamagedCheckpointError: if all are damaged.
    """
    damaged = []
    for _, path in reversed(found):
        try:
            integrity.verify(path, items)
        except DamagedCheckpointError as error:
            damaged.append((path, error))
            continue
        if jax.process_index() == 0:
            for _, error in damaged:
                print(f"{error}\nThe one before it that is whole is {path}.", flush=True)
        return path, [path for path, _ in damaged]
    errors = "\n".join(str(error) for _, error in damaged)
    raise DamagedCheckpointError(
        errors if len(found) == 1 else f"no checkpoint is whole.\n{errors}"
    )


def select_checkpoints(
    config: RestoreCheckpointConfig, items: Sequence[str] = ("params",)
) -> list[tuple[int, str]]:
    """(step, path) of the checkpoints that `config` means, ascending.

    Where the latest of a run is meant, it is the latest whose `items` are not damaged; of all, each
    is looked at when it is restored.

    Raises:
      FileNotFoundError: as `list_checkpoints`.
      DamagedCheckpointError: if the one meant is damaged, or all of a run's.
      ValueError: if several have the same step, which could not be told apart in results.
    """
    paths = (config.path,) if isinstance(config.path, str) else tuple(config.path)
    selected: dict[int, str] = {}
    for path in paths:
        found = list_checkpoints(path)
        if config.mode != "all":
            whole, _ = _newest_whole(found, items)
            found = [(step, checkpoint) for step, checkpoint in found if checkpoint == whole]
        for step, checkpoint in found:
            if selected.setdefault(step, checkpoint) != checkpoint:
                raise ValueError(
                    f"CHECKPOINT_PATH means two checkpoints of step {step}: {selected[step]} and "
                    f"{checkpoint}; evaluate different runs into directories of their own."
                )
    return sorted(selected.items())
