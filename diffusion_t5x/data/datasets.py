"""Batches of SeqIO tasks and mixtures: each process's rows, resumable at the exact example."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from etils import epath

from diffusion_t5x.data import task_checks
from diffusion_t5x.data.data_shards import DataLayout, with_shard_seed
from diffusion_t5x.names import nearest

Batch = dict[str, np.ndarray]
FeatureConverterFactory = Callable[..., seqio.FeatureConverter]


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """The examples to read, and how to batch them; the fields are those of T5X's `DatasetConfig`.

    Attributes:
      mixture_or_task_name: The name of a registered SeqIO task or mixture; for commands that
        evaluate, also a tuple of names.
      task_feature_lengths: Maximum tokens per task feature, e.g. `{'inputs': 64, 'targets': 32}`;
        for commands that evaluate, None takes the longest of the split.
      split: The name of the split, e.g. 'train'.
      batch_size: Examples per global batch, over all processes.
      shuffle: Shuffles the examples if True.
      seed: The seed of shuffling and of random preprocessors; None takes the run's `random_seed`.
      use_cached: Reads SeqIO's offline cache, instead of preprocessing on the fly, if True.
      pack: Packs several examples into one row if True, which the objective must allow.
      use_custom_packing_ops: Uses SeqIO's compiled packing if True.
      module: The Python module that registers the task, imported first; None imports nothing.

    Raises:
      ValueError: if a size or a length is not a positive integer.
    """

    mixture_or_task_name: str | tuple[str, ...]
    task_feature_lengths: Mapping[str, int] | None
    split: str
    batch_size: int
    shuffle: bool = False
    seed: int | None = None
    use_cached: bool = False
    pack: bool = False
    use_custom_packing_ops: bool = False
    module: str | None = None

    def __post_init__(self) -> None:
        if not _is_positive(self.batch_size):
            raise ValueError(
                f"BATCH_SIZE = {self.batch_size!r}; expected a positive whole number, a multiple "
                "of the data-parallel devices."
            )
        lengths = self.task_feature_lengths
        if lengths is None:
            return
        if not isinstance(lengths, Mapping) or not all(map(_is_positive, lengths.values())):
            raise ValueError(
                f"TASK_FEATURE_LENGTHS = {lengths!r}; expected positive numbers of tokens by "
                "feature, such as {'inputs': 64, 'targets': 32}."
            )


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and value > 0


def import_task_module(module: str | None) -> None:
    """Imports the module that registers tasks; None or '' imports nothing.

    Call it after gin is parsed, so that the vocabulary of the tasks is the configured one.

    Raises:
      ModuleNotFoundError: if the module does not exist; the message names the setting.
    """
    if not module:
        return
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ModuleNotFoundError(
            f"MIXTURE_OR_TASK_MODULE = {module!r} cannot be imported; expected a module on the "
            "Python path that registers SeqIO tasks, such as 'diffusion_t5x.tasks'.",
            name=error.name,
        ) from error


def get_mixture_or_task(name: str) -> seqio.Task | seqio.Mixture:
    """Returns a registered task or mixture; a ValueError offers the nearest name."""
    known = sorted(set(seqio.TaskRegistry.names()) | set(seqio.MixtureRegistry.names()))
    if name in known:
        return seqio.get_mixture_or_task(name)
    near = nearest(name, known)  # `tasks` registers hundreds: all of them only if none is near
    hint = f"did you mean {near!r}?" if near else f"known: {known}."
    raise ValueError(
        f"MIXTURE_OR_TASK_NAME = {name!r} is not a registered task or mixture; {hint} "
        "MIXTURE_OR_TASK_MODULE names the module that registers it; ours is 'diffusion_t5x.tasks'."
    )


def find_task(cfg: DatasetConfig, converter: seqio.FeatureConverter) -> seqio.Task | seqio.Mixture:
    """Returns the task or mixture of `cfg`, after checking its split and lengths.

    Raises:
      ValueError: if the task or the split is unknown, a cache or a rate is missing, or a feature
        that the converter reads has no length.
    """
    import_task_module(cfg.module)
    if not isinstance(cfg.mixture_or_task_name, str):
        raise ValueError(
            f"MIXTURE_OR_TASK_NAME = {cfg.mixture_or_task_name!r}; expected one name: of a task, "
            "or of a mixture of several."
        )
    task = get_mixture_or_task(cfg.mixture_or_task_name)
    task_checks.check_split(task, cfg.split)
    task_checks.check_source(task, cfg.use_cached)
    given = set(cfg.task_feature_lengths or {})
    if missing := sorted(set(converter.TASK_FEATURES) - given):
        near = nearest(missing[0], given - set(converter.TASK_FEATURES))
        hint = f"; did you mean {missing[0]!r} by {near!r}?" if near else "."
        raise ValueError(
            f"TASK_FEATURE_LENGTHS = {cfg.task_feature_lengths} lacks {', '.join(missing)}, which "
            f"task {task.name!r} needs{hint}"
        )
    return task


def get_dataset(
    cfg: DatasetConfig,
    feature_converter_cls: FeatureConverterFactory,
    *,
    shard_index: int = 0,
    num_shards: int = 1,
    num_epochs: int | None = 1,
    seed: int | None = None,
) -> tf.data.Dataset:
    """Reads the converted, unbatched examples of one data shard: model features, each `[length]`.

    Args:
      cfg: The examples to read.
      feature_converter_cls: The model's `FEATURE_CONVERTER_CLS`.
      shard_index: The index of the data shard, in [0, num_shards).
      num_shards: The number of data shards; each draws its own random numbers.
      num_epochs: Passes over the data; None repeats them without end.
      seed: The seed if `cfg.seed` is None.

    Raises:
      ValueError: as `find_task` does.
    """
    converter = feature_converter_cls(
        pack=cfg.pack, use_custom_packing_ops=cfg.use_custom_packing_ops
    )
    task = find_task(cfg, converter)
    return seqio.get_dataset(
        with_shard_seed(task, shard_index),
        task_feature_lengths=cfg.task_feature_lengths,
        feature_converter=converter,
        dataset_split=cfg.split,
        use_cached=cfg.use_cached,
        shuffle=cfg.shuffle,
        num_epochs=num_epochs,
        shard_info=seqio.ShardInfo(index=shard_index, num_shards=num_shards),
        seed=cfg.seed if cfg.seed is not None else seed,
        verbose=False,
    )


class DatasetIterator:
    """An endless iterator of numpy batches whose position can be saved and restored exactly.

    A batch is a process's rows of a global batch, data shard by data shard. Beside the position of
    each shard there is a record of the examples that it gave and of the settings that decide their
    order and shape, so that a run may go on with other settings after as many examples.

    Attributes:
      num_shards: The number of data shards, over all processes.
      element_spec: Name -> (shape, dtype) of this process's batches.
    """

    def __init__(
        self,
        make: Callable[[int, int], tf.data.Dataset],
        layout: DataLayout,
        settings: Mapping[str, Any],
    ):
        """Starts reading.

        Args:
          make: Returns the endless batches of a shard, without its first rows: (shard, rows) ->
            batches.
          layout: The shards that this process reads.
          settings: All that decides the rows and their order, JSON values by the users' names.
        """
        self._make, self._layout = make, layout
        self._settings = json.loads(json.dumps({**settings, "data shards": layout.num_shards}))
        self.num_shards = layout.num_shards
        self._examples = dict.fromkeys(layout.shards, 0)
        self._skipped = dict.fromkeys(layout.shards, 0)
        self._iterators = {shard: iter(make(shard, 0)) for shard in layout.shards}
        rows = layout.shard_size * len(layout.shards)
        self.element_spec = {
            name: ((rows, *spec.shape[1:]), spec.dtype.as_numpy_dtype)
            for name, spec in self._iterators[layout.shards[0]].element_spec.items()
        }

    def __iter__(self) -> DatasetIterator:
        return self

    def __next__(self) -> Batch:
        shards = [self._next_of(shard) for shard in self._iterators]
        if len(shards) == 1:
            return shards[0]
        return {name: np.concatenate([batch[name] for batch in shards]) for name in shards[0]}

    def _next_of(self, shard: int) -> Batch:
        try:
            batch = next(self._iterators[shard])
        except StopIteration:
            raise ValueError(
                f"data shard {shard} of {self.num_shards} has no example; expected a split with at "
                "least one example for each data-parallel shard of the mesh."
            ) from None
        except tf.errors.InvalidArgumentError as error:
            if "Incompatible shapes" not in str(error):
                raise
            raise ValueError(
                "the checkpoint's position in the data is of another BATCH_SIZE or other "
                "TASK_FEATURE_LENGTHS, which it has no record of; set those, or "
                "checkpoints.SaveCheckpointConfig.save_dataset = False to start from the "
                "beginning of the data."
            ) from error
        batch = {name: value.numpy() for name, value in batch.items()}
        self._examples[shard] += int(_examples_by_row(batch).sum())
        return batch

    def _file(self, path: str | os.PathLike[str], shard: int) -> str:
        return f"{os.fspath(path)}-{shard:05}-of-{self.num_shards:05}"

    def _position(self, shard: int) -> tf.train.Checkpoint:
        return tf.train.Checkpoint(iterator=self._iterators[shard])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the positions of the next batch and their records, files named `path` and more.

        If several processes read a shard, one of them writes its position.
        """
        for shard in self._layout.saved:
            self._position(shard).write(self._file(path, shard))
            record = {
                "settings": self._settings,
                "examples": self._examples[shard],
                "skipped": self._skipped[shard],
            }
            epath.Path(f"{self._file(path, shard)}.json").write_text(json.dumps(record))

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Resumes at the batch before which `save(path)` was called, by any number of processes.

        With other settings it resumes after as many examples, all shards together, and says so.

        Raises:
          tf.errors.NotFoundError: if no position was saved at `path`, or if one without a record
            was saved for another number of data shards.
        """
        place = epath.Path(path)
        files = sorted(place.parent.glob(f"{place.name}-*.json"))
        records = [json.loads(file.read_text()) for file in files]
        changed = [
            f"{name} {records[0]['settings'].get(name)} is now {value}"
            for name, value in self._settings.items()
            if records and records[0]["settings"].get(name) != value
        ]
        if changed:
            self._skip_to(sum(record["examples"] for record in records), changed)
            return
        for shard in self._layout.shards:
            if records:
                self._examples[shard] = records[shard]["examples"]
                if records[shard]["skipped"] != self._skipped[shard]:
                    self._start_after(shard, records[shard]["skipped"])
            self._position(shard).read(self._file(path, shard)).assert_consumed()

    def _skip_to(self, examples: int, changed: Sequence[str]) -> None:
        """Moves to the row after `examples`, of which each shard has given an equal share."""
        if 0 in self._layout.saved:
            print(
                f"data: {', '.join(changed)}; going on after the {examples:,} examples that were "
                "seen, which are skipped.",
                flush=True,
            )
        for shard in self._layout.shards:
            share = examples * (shard + 1) // self.num_shards - examples * shard // self.num_shards
            rows = share
            if any(name.endswith("_segment_ids") for name in self.element_spec):
                rows = self._rows_of(shard, share)
            self._start_after(shard, rows)
            self._examples[shard] = share

    def _rows_of(self, shard: int, examples: int) -> int:
        """Reads the first rows of a shard, packed; returns the number that hold `examples`."""
        self._start_after(shard, 0)
        rows = 0
        while examples > 0:
            for count in _examples_by_row(self._next_of(shard)):
                examples -= int(count)
                rows += examples >= 0
                if examples <= 0:
                    break
        return rows

    def _start_after(self, shard: int, rows: int) -> None:
        self._skipped[shard] = rows
        self._iterators[shard] = iter(self._make(shard, rows))


def _examples_by_row(batch: Batch) -> np.ndarray:
    """Returns how many examples are in each row of a batch, `[rows]`: one, if it is not packed."""
    for name, value in batch.items():
        if name.endswith("_segment_ids"):
            return value.max(axis=1)
    return np.ones(len(next(iter(batch.values()))), np.int32)


def get_training_iterator(
    cfg: DatasetConfig,
    feature_converter_cls: FeatureConverterFactory,
    *,
    layout: DataLayout | None = None,
    seed: int = 0,
) -> DatasetIterator:
    """Returns an endless iterator of this process's rows of training batches, `[rows, length]`.

    The layout divides global batches of `cfg.batch_size`; None is for one shard, one process.

    Raises:
      ValueError: as `get_dataset` does; at the first batch, if a data shard has no example.
    """
    layout = layout or DataLayout(cfg.batch_size)
    options = tf.data.Options()
    options.deterministic = True
    # A task is a chain of small maps; fused, they cost much less host time.
    options.experimental_optimization.map_fusion = True
    options.experimental_optimization.filter_fusion = True
    options.experimental_optimization.map_and_batch_fusion = True

    def make(shard: int, rows: int) -> tf.data.Dataset:
        dataset = get_dataset(
            cfg,
            feature_converter_cls,
            shard_index=shard,
            num_shards=layout.num_shards,
            num_epochs=None,
            seed=seed,
        )
        if rows:  # a position is that of its chain of datasets, of which this would be one more
            dataset = dataset.skip(rows)
        batches = dataset.batch(layout.shard_size, drop_remainder=True)
        return batches.prefetch(4).with_options(options)

    settings = {
        "BATCH_SIZE": cfg.batch_size,
        "TASK_FEATURE_LENGTHS": dict(cfg.task_feature_lengths or {}),
        "MIXTURE_OR_TASK_NAME": cfg.mixture_or_task_name,
        "PACK": cfg.pack,
        "USE_CACHED_TASKS": cfg.use_cached,
        "split": cfg.split,
        "shuffle": cfg.shuffle,
        "seed": cfg.seed if cfg.seed is not None else seed,
    }
    return DatasetIterator(make, layout, settings)


def pad_batch(batch: Batch, batch_size: int) -> Batch:
    """Pads a batch to `batch_size` rows with rows of zeros, whose loss weights are zero."""
    missing = batch_size - len(next(iter(batch.values())))
    return {
        name: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1))
        for name, value in batch.items()
    }


def get_eval_batches(
    cfg: DatasetConfig,
    feature_converter_cls: FeatureConverterFactory,
    *,
    layout: DataLayout | None = None,
    num_batches: int | None = None,
    seed: int = 0,
) -> Iterator[Batch]:
    """Yields this process's rows, `[rows, length]`, of one pass over a split, in its order.

    The last batch is padded with rows of zeros. Every process reads the whole split and takes its
    rows of each batch after conversion. So no row is repeated or lost, and all processes get the
    same number of batches, whatever the number of source files and of texts packed into a row.
    `num_batches` is the most to yield, None for all; for the rest see `get_training_iterator`.
    """
    layout = layout or DataLayout(cfg.batch_size)
    dataset = get_dataset(cfg, feature_converter_cls, seed=seed)
    batches = dataset.batch(cfg.batch_size).prefetch(2).as_numpy_iterator()
    for batch in itertools.islice(batches, num_batches):
        yield layout.local_rows(pad_batch(batch, cfg.batch_size))
