"""From a SeqIO task or mixture to batches: a process's share, resumable at the exact example."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

from diffusion_t5x.data.data_shards import DataLayout, with_shard_seed

Batch = dict[str, np.ndarray]
FeatureConverterFactory = Callable[..., seqio.FeatureConverter]


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Which examples to read, and how (the fields and meanings of T5X's `DatasetConfig`).

    Attributes:
      mixture_or_task_name: a registered SeqIO task or mixture; commands that evaluate also take
        a tuple of names.
      task_feature_lengths: maximum tokens per task feature, e.g. `{'inputs': 64, 'targets': 32}`;
        None, where evaluating, for the longest of the split.
      split: name of the split, e.g. 'train'.
      batch_size: examples per global batch, over all processes.
      shuffle: whether to shuffle examples.
      seed: of shuffling and of random preprocessors; None takes the run's `random_seed`.
      use_cached: read SeqIO's offline cache instead of preprocessing on the fly.
      pack: pack several examples into one row, where the objective allows it.
      use_custom_packing_ops: SeqIO's compiled packing.
      module: Python module to import first, which registers the task.

    Raises:
      ValueError: if a size or a length is no positive whole number.
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

    def __post_init__(self):
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
    """Imports the module that registers tasks, after gin is parsed so that its bindings apply.

    Raises:
      ModuleNotFoundError: if there is no such module; the message names the setting.
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
            "Python path that registers SeqIO tasks, such as 'tasks'.",
            name=error.name,
        ) from error


def get_mixture_or_task(name: str) -> seqio.Task | seqio.Mixture:
    """The registered task or mixture.

    Raises:
      ValueError: if `name` is not registered; the message offers the nearest names.
    """
    known = sorted(set(seqio.TaskRegistry.names()) | set(seqio.MixtureRegistry.names()))
    if name in known:
        return seqio.get_mixture_or_task(name)
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {known}."
    raise ValueError(
        f"MIXTURE_OR_TASK_NAME = {name!r} is not a registered task or mixture; {hint} "
        "MIXTURE_OR_TASK_MODULE names the module that registers it."
    )


def find_task(cfg: DatasetConfig, converter: seqio.FeatureConverter) -> seqio.Task | seqio.Mixture:
    """The task or mixture of `cfg`, whose split and lengths are there.

    Raises:
      ValueError: for an unknown task or split, or lengths that lack one of the task's features.
    """
    import_task_module(cfg.module)
    if not isinstance(cfg.mixture_or_task_name, str):
        raise ValueError(
            f"MIXTURE_OR_TASK_NAME = {cfg.mixture_or_task_name!r}; expected one name, of a task or "
            "of a mixture that joins several."
        )
    task = get_mixture_or_task(cfg.mixture_or_task_name)
    if cfg.split not in task.splits:
        near = difflib.get_close_matches(cfg.split, task.splits, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"split = {cfg.split!r} is not a split of {task.name!r}; {hint}"
            f"Known: {', '.join(sorted(task.splits))}."
        )
    given = set(cfg.task_feature_lengths or {})
    if missing := sorted(set(converter.TASK_FEATURES) - given):
        near = difflib.get_close_matches(missing[0], given - set(converter.TASK_FEATURES), n=1)
        hint = f"; did you mean {missing[0]!r} by {near[0]!r}?" if near else "."
        raise ValueError(
            f"TASK_FEATURE_LENGTHS = {cfg.task_feature_lengths} lacks {', '.join(missing)}, of "
            f"task {task.name!r}{hint}"
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
    """Converted, unbatched examples of one shard.

    Args:
      cfg: what to read.
      feature_converter_cls: the model's `FEATURE_CONVERTER_CLS`.
      shard_index: this shard, in [0, num_shards).
      num_shards: number of shards the examples are dealt to; each draws its own random numbers.
      num_epochs: passes over the data; None repeats for ever.
      seed: used where `cfg.seed` is None.

    Returns:
      A dataset of model features, each `[length]`.

    Raises:
      ValueError: for an unknown task or split, or lengths that lack one of the task's features.
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

    A batch is a process's rows of a global batch, shard by shard.

    Attributes:
      num_shards: data shards, over all processes.
      element_spec: name -> (shape, dtype) of this process's batches.
    """

    def __init__(self, datasets: Sequence[tf.data.Dataset], layout: DataLayout):
        """Starts reading.

        Args:
          datasets: endless, of batches of the shards that `layout` says this process reads.
          layout: how the data is dealt.
        """
        self._layout = layout
        self._iterators = dict(zip(layout.shards, map(iter, datasets), strict=True))
        self._checkpoints = {
            shard: tf.train.Checkpoint(iterator=iterator)
            for shard, iterator in self._iterators.items()
        }
        self.num_shards = layout.num_shards
        rows = layout.shard_size * len(layout.shards)
        self.element_spec = {
            name: ((rows, *spec.shape[1:]), spec.dtype.as_numpy_dtype)
            for name, spec in datasets[0].element_spec.items()
        }

    def __iter__(self) -> DatasetIterator:
        return self

    def __next__(self) -> Batch:
        parts = [self._next_of(shard) for shard in self._iterators]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _next_of(self, shard: int) -> Batch:
        try:
            batch = next(self._iterators[shard])
        except StopIteration:
            raise ValueError(
                f"data shard {shard} of {self.num_shards} has no example; expected a split with at "
                "least one example for each data-parallel part of the mesh."
            ) from None
        return {name: value.numpy() for name, value in batch.items()}

    def _file(self, path: str | os.PathLike[str], shard: int) -> str:
        return f"{os.fspath(path)}-{shard:05}-of-{self.num_shards:05}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the positions of the next batch to files that begin with `path`, one per shard.

        Where several processes read a shard, one of them writes it.
        """
        for shard in self._layout.saved:
            self._checkpoints[shard].write(self._file(path, shard))

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Goes on where `save(path)` was called, by however many processes.

        Raises:
          tf.errors.NotFoundError: if nothing was saved at `path`, or for another number of shards.
        """
        for shard, checkpoint in self._checkpoints.items():
            checkpoint.read(self._file(path, shard)).assert_consumed()


def get_training_iterator(
    cfg: DatasetConfig,
    feature_converter_cls: FeatureConverterFactory,
    *,
    layout: DataLayout | None = None,
    seed: int = 0,
) -> DatasetIterator:
    """Endless batches of this process's rows, `[rows, length]`.

    Args:
      cfg: what to read.
      feature_converter_cls: the model's `FEATURE_CONVERTER_CLS`.
      layout: how global batches of `cfg.batch_size` are dealt; None for one shard, one process.
      seed: used where `cfg.seed` is None.

    Raises:
      ValueError: as `get_dataset` does; from the first batch, if a shard has no example.
    """
    layout = layout or DataLayout(cfg.batch_size)
    options = tf.data.Options()
    options.deterministic = True
    # A task is a chain of small maps: joined, they cost the host much less.
    options.experimental_optimization.map_fusion = True
    options.experimental_optimization.filter_fusion = True
    options.experimental_optimization.map_and_batch_fusion = True
    shards = [
        get_dataset(
            cfg,
            feature_converter_cls,
            shard_index=shard,
            num_shards=layout.num_shards,
            num_epochs=None,
            seed=seed,
        )
        .batch(layout.shard_size, drop_remainder=True)
        .prefetch(4)
        .with_options(options)
        for shard in layout.shards
    ]
    return DatasetIterator(shards, layout)


def pad_batch(batch: Batch, batch_size: int) -> Batch:
    """Fills a batch up to `batch_size` rows with rows of zeros, whose loss weights are zero."""
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
    """One pass over a split: this process's rows of full global batches, in the data's order.

    The last batch is filled with rows of zeros. Every process reads the split and takes its rows of
    each batch after conversion, so no row is seen twice or lost, and all processes get as many
    batches, whatever the number of source files and of texts packed into a row.

    Args:
      cfg: what to read.
      feature_converter_cls: the model's `FEATURE_CONVERTER_CLS`.
      layout: how global batches of `cfg.batch_size` are dealt; None for one shard, one process.
      num_batches: at most so many batches; None for the whole split.
      seed: used where `cfg.seed` is None.

    Raises:
      ValueError: as `get_dataset` does.
    """
    layout = layout or DataLayout(cfg.batch_size)
    dataset = get_dataset(cfg, feature_converter_cls, num_epochs=1, seed=seed)
    for index, batch in enumerate(dataset.batch(cfg.batch_size).prefetch(2).as_numpy_iterator()):
        if num_batches is not None and index >= num_batches:
            return
        yield layout.local_rows(pad_batch(batch, cfg.batch_size))
