"""Saves checkpoints through Orbax, in the background and atomically, and selects which to restore.

A run's directory holds `checkpoint_{step}/` with the items `params`, `average` (the moving average
of those that are trained, if the run keeps one), `optimizer` (its state and the step) and
`dataset` (the position of each data shard).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import secrets
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from diffusion_t5x import names, paths
from diffusion_t5x.checkpointing import integrity
from diffusion_t5x.checkpointing.integrity import PREFIX, DamagedCheckpointError, is_foreign
from diffusion_t5x.checkpointing.items import ArraysArgs, ArraysHandler, DatasetArgs, DatasetHandler
from diffusion_t5x.checkpointing.reading import PARAMETERS, items_of, optimizer_item, read_step
from diffusion_t5x.interop import t5x_checkpoints
from diffusion_t5x.runtime import orbax_buckets
from diffusion_t5x.runtime.train_state import TrainState

if TYPE_CHECKING:
    from diffusion_t5x.data.datasets import DatasetIterator


@dataclasses.dataclass(frozen=True)
class SaveCheckpointConfig:
    """When a run saves checkpoints, and which it keeps.

    Attributes:
      period: Number of steps between checkpoints; the last step is always saved.
      keep: Number of checkpoints to keep, the latest or the best; None for all.
      keep_best_metric: Metric by which the best `keep` are kept, beside the latest, such as
        'training_eval/loss' or 'inference_eval/my_task/bleu'; None to keep the latest.
      best_mode: 'min' or 'max', whichever value of the metric is best.
      save_dataset: Whether to save the position in the data, for resuming there.
      checksums: Whether to save a checksum of each file, to detect damage before restoring.
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
        names.check_known(self.best_mode, ("min", "max"), "best_mode")


@dataclasses.dataclass(frozen=True)
class RestoreCheckpointConfig:
    """The checkpoint that a run starts from, or the checkpoints to evaluate.

    Attributes:
      path: A checkpoint, or the directory of a run; for evaluation also a tuple of these.
      mode: 'specific' selects the checkpoint at `path`, or the latest of a run; 'latest' the latest
        of a run; 'all' every checkpoint of a run (evaluation only).
      params_only: Whether to restore parameters alone: training starts at step 0 with a fresh
        optimiser state.
      parameters: 'averaged' restores the moving average of the parameters where the checkpoint has
        one, 'raw' the parameters as the optimiser left them.
    """

    path: str | tuple[str, ...]
    mode: Literal["specific", "latest", "all"] = "specific"
    params_only: bool = False
    parameters: Literal["averaged", "raw"] = "averaged"

    def __post_init__(self):
        names.check_known(self.mode, ("specific", "latest", "all"), "mode")
        names.check_known(self.parameters, PARAMETERS, "RestoreCheckpointConfig.parameters")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """The checkpoints that a run saves, if any, and the one that it starts from, if not afresh."""

    save: SaveCheckpointConfig | None = None
    restore: RestoreCheckpointConfig | None = None


@dataclasses.dataclass
class _BestN:
    """A policy of Orbax that preserves the best `n` checkpoints by the lines of a run's metrics.

    Orbax's own takes metrics together with a checkpoint, before it can be evaluated. A checkpoint
    without the metric, or with NaN, counts as the worst, and the later of equals as better.
    """

    n: int
    metric: str
    mode: str
    metrics: Sequence[Mapping[str, Any]] = ()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        split, _, name = self.metric.rpartition("/")
        sign = 1.0 if self.mode == "max" else -1.0
        values = {
            line["step"]: sign * line[name]
            for line in self.metrics
            if line["split"] == split and isinstance(line.get(name), int | float)
        }
        known = {step: value for step, value in values.items() if not math.isnan(value)}
        ranked = sorted((known.get(info.step, -math.inf), info.step) for info in checkpoints)
        best = {step for _, step in ranked[-self.n :]}
        return [info.step in best for info in checkpoints]


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which also keeps the error of a save that failed in the background.

    Orbax itself reports it only at the next barrier, twenty minutes later on healthy hosts.
    """

    failure: BaseException | None = None

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except BaseException as error:
            self.failure = error
            raise

    def _finalize(self, *args: Any) -> None:
        try:
            super()._finalize(*args)
        except BaseException as error:  # as of a checkpoint that cannot be deleted
            self.failure = self.failure or error
            raise


class Checkpointer:
    """The writer of one run's checkpoints; `config` says when to save, and what to keep."""

    def __init__(self, directory: str, config: SaveCheckpointConfig, damaged: Sequence[str] = ()):
        """Opens a run's directory, and renames its damaged checkpoints: their steps are free again.

        Args:
          directory: The directory of the run.
          config: When to save, and what to keep.
          damaged: Paths of the run's damaged checkpoints.
        """
        self.config = config
        path = paths.as_path(directory, "MODEL_DIR")
        if jax.process_index() == 0:
            for checkpoint in map(epath.Path, damaged):
                print(f"{checkpoint} is kept as {integrity.set_aside(checkpoint)}.")
            for _, checkpoint in find_checkpoints(str(path)):
                orbax_buckets.mark_complete(epath.Path(checkpoint))
            integrity.set_aside_unreadable_metrics(path)  # of older versions, which Orbax reads
        multihost_utils.sync_global_devices("damage_set_aside")
        arrays = functools.partial(ArraysHandler, config.checksums)
        self._handlers: dict[str, ArraysHandler | DatasetHandler] = {
            "params": arrays(),
            "average": arrays(),
            "optimizer": arrays(),
            "dataset": DatasetHandler(config.checksums),
        }
        policies = checkpoint_managers.preservation_policy
        policy: Any = policies.PreserveAll()
        self._best: _BestN | None = None
        if config.keep is not None:
            policy = policies.LatestN(config.keep)
        if config.keep is not None and config.keep_best_metric is not None:
            self._best = _BestN(config.keep, config.keep_best_metric, config.best_mode)
            policy = policies.AnyPreservationPolicy([policies.LatestN(1), self._best])
        self._manager = _Manager(
            path,
            options=ocp.CheckpointManagerOptions(
                step_prefix=PREFIX,
                preservation_policy=policy,
                create=True,
                # Of a directory that a thread cannot make, Orbax tells nobody, and all wait for it.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            ),
            item_handlers=dict(self._handlers),
        )

    def save(
        self,
        state: TrainState,
        iterator: DatasetIterator | None = None,
    ) -> None:
        """Starts writing `checkpoint_{state.step}`, unless it exists.

        Arrays are copied before this returns, so the state may be donated afterwards. If its
        `opt_state` is None, parameters alone are saved.

        Args:
          state: The state to save.
          iterator: The iterator whose position to save; None for none.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items: dict[str, ocp.args.CheckpointArgs] = {"params": ArraysArgs(state.params)}
        if state.average is not None:
            items["average"] = ArraysArgs(state.average)
        if state.opt_state is not None:
            items["optimizer"] = ArraysArgs(optimizer_item(state))
        if iterator is not None and self.config.save_dataset:
            items["dataset"] = DatasetArgs(iterator)
        self._manager.wait_until_finished()  # whose items have another stamp
        stamp = {"step": step, "items": list(items), "save": secrets.token_hex(8)}
        for handler in self._handlers.values():
            handler.stamp = stamp
        self._manager.save(step, args=ocp.args.Composite(**items))

    def keep_best_of(self, metrics: Sequence[Mapping[str, Any]]) -> None:
        """Takes the list of a run's lines of metrics, which grows, to choose the best from."""
        if self._best is not None:
            self._best.metrics = metrics

    def prune(self) -> None:
        """Waits for pending saves, and deletes what is neither the latest nor the best."""
        self._manager.wait_until_finished()
        if self._best is not None:
            infos = [types.SimpleNamespace(step=step) for step in sorted(self._manager.all_steps())]
            for info, best in zip(
                infos[:-1], self._best.should_preserve(infos, context=None), strict=False
            ):
                if not best:
                    self._manager.delete(info.step)

    def check(self) -> None:
        """Raises the error of a save that failed in the background; does not wait."""
        if self._manager.failure is not None:
            raise self._manager.failure

    def close(self) -> None:
        """Waits for pending saves and closes; does not wait after a background failure."""
        self.check()
        self._manager.close()


def find_checkpoints(path: str) -> list[tuple[int, str]]:
    """Returns (step, path) of a checkpoint, or of all finished ones of a run, ascending.

    Args:
      path: A checkpoint of any kind, whatever its name, or the directory of a run.
    """
    directory = paths.as_path(path, "CHECKPOINT_PATH")
    if directory.name == t5x_checkpoints.INDEX and directory.is_file():
        directory = directory.parent
    children = directory.iterdir() if directory.is_dir() else ()
    found = [(match, child) for child in children if (match := integrity.NAME.match(child.name))]
    if not found and (match := integrity.NAME.match(directory.name)) and directory.exists():
        found = [(match, directory)]
    if not found and is_checkpoint(directory):  # a link to one, or a copy
        return [(read_step(str(directory)), str(directory))]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # a request each, in a bucket
        complete = list(pool.map(_is_complete, (child for _, child in found)))
    return sorted(
        (int(match.group(1)), str(child))
        for (match, child), done in zip(found, complete, strict=True)
        if done
    )


def _is_complete(checkpoint: epath.Path) -> bool:
    return orbax_buckets.is_complete(checkpoint) or is_foreign(str(checkpoint))


def is_checkpoint(directory: epath.Path) -> bool:
    """Returns whether a path, of any name, holds parameters of ours or of others'."""
    return (directory / "params").is_dir() or is_foreign(str(directory))


def list_checkpoints(path: str) -> list[tuple[int, str]]:
    """Returns `find_checkpoints(path)`, which must not be empty.

    Raises:
      FileNotFoundError: If there is no checkpoint.
    """
    if found := find_checkpoints(path):
        return found
    parent, name = epath.Path(path).parent, epath.Path(path).name
    listed = parent.is_dir() and str(parent) not in ("gs://", "s3://")
    children = parent.iterdir() if listed else ()
    beside = [child.name for child in children if child.is_dir() and child.name != name]
    nearest = names.did_you_mean(name, sorted(beside))
    hint = f" In {parent}: {nearest}" if beside else ""
    raise FileNotFoundError(
        f"{path} is neither a checkpoint nor a run with one; expected a directory such as "
        f"MODEL_DIR, MODEL_DIR/{PREFIX}_1000, or a Hugging Face model's or its .gguf file.{hint}"
    )


def newest_undamaged(path: str, items: Sequence[str]) -> tuple[int, str, tuple[str, ...]]:
    """Verifies the checkpoints of a run, newest first, until one is undamaged.

    All processes of a run call this together. Each prints the damage that it finds.

    Args:
      path: A checkpoint, or the directory of a run.
      items: The items to verify.

    Returns:
      Step and path of the newest undamaged checkpoint, and the paths of the damaged newer ones.

    Raises:
      FileNotFoundError: If there is no checkpoint.
      DamagedCheckpointError: If all are damaged.
    """
    # Names without a step first: they are no older than any checkpoint.
    found = sorted(list_checkpoints(path), key=lambda each: not integrity.has_valid_name(each[1]))
    errors: dict[str, str] = {}
    for step, checkpoint in reversed(found):
        try:
            integrity.verify(checkpoint, items)
        except DamagedCheckpointError as error:
            errors[checkpoint] = str(error)
            continue
        if errors:
            print("\n".join(errors.values()))
            print(f"The newest undamaged checkpoint is {checkpoint}.", flush=True)
        return step, checkpoint, tuple(errors)
    lines = ["no checkpoint is undamaged."] * (len(found) > 1) + list(errors.values())
    raise DamagedCheckpointError("\n".join(lines))


def select_checkpoints(
    config: RestoreCheckpointConfig,
    items: Sequence[str] = (),
    setting: str = "CHECKPOINT_PATH",
) -> list[tuple[int, str]]:
    """Returns (step, path) of the checkpoints that a configuration asks for, ascending.

    The latest checkpoint of a run is its newest undamaged one, as far as parameters and `items` go.
    With `mode = 'all'` nothing is verified here: each checkpoint is verified when it is restored.

    Raises:
      FileNotFoundError: If there is no checkpoint.
      DamagedCheckpointError: If the checkpoint asked for is damaged, or all of a run's are.
      ValueError: If two have the same step, by which results are named.
    """
    if not config.path:
        raise ValueError(f"{setting} = {config.path!r} is empty; expected a checkpoint or a run.")
    items = (*items_of(config.parameters), *items)
    selected: dict[int, str] = {}
    for text in config.path if isinstance(config.path, tuple | list) else (config.path,):
        path = str(paths.readable(text, setting))
        found = (
            list_checkpoints(path) if config.mode == "all" else [newest_undamaged(path, items)[:2]]
        )
        for step, checkpoint in found:
            if selected.setdefault(step, checkpoint) != checkpoint:
                raise ValueError(
                    f"CHECKPOINT_PATH selects two checkpoints of step {step}: {selected[step]} and "
                    f"{checkpoint}; evaluate different runs into separate directories."
                )
    return sorted(selected.items())
