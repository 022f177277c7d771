"""Division of global batches among data shards, of shards among processes, and their seeds."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # the partitioner needs `DataLayout` alone, and not TensorFlow
    import seqio
    import tensorflow as tf

# Far larger than the number of preprocessors of a task, to each of which SeqIO gives the next seed.
_STRIDE = 1_000_003


@dataclasses.dataclass(frozen=True)
class DataLayout:
    """The part of each global batch that one process reads.

    A global batch is the concatenation of one batch per data shard. The examples of a shard depend
    only on the number of shards, so the rows of a batch and their order do not depend on the number
    of processes.

    Attributes:
      batch_size: Examples per global batch.
      num_shards: Number of data shards, one per data-parallel shard of the mesh.
      shards: Indices of the shards that this process reads, ascending. Several processes read the
        same shard if the devices of a data-parallel shard belong to several.
      saved: The members of `shards` whose position in the data this process saves.

    Raises:
      ValueError: if the shards do not divide the batch.
    """

    batch_size: int
    num_shards: int = 1
    shards: tuple[int, ...] = (0,)
    saved: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.num_shards:
            nearest = max(1, round(self.batch_size / self.num_shards)) * self.num_shards
            raise ValueError(
                f"BATCH_SIZE = {self.batch_size} is not a multiple of the {self.num_shards} data "
                f"shards, one for each data-parallel part of the mesh; the nearest that is: "
                f"{nearest}."
            )

    @property
    def shard_size(self) -> int:
        """The number of examples of one shard in each global batch."""
        return self.batch_size // self.num_shards

    def local_rows(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Selects this process's rows of a global batch, `[batch_size, ...]`, shard by shard."""
        size = self.shard_size
        rows = np.concatenate([np.arange(size) + shard * size for shard in self.shards])
        return {name: value[rows] for name, value in batch.items()}


def with_shard_seed(task: seqio.Task | seqio.Mixture, shard: int) -> seqio.Task | seqio.Mixture:
    """Returns a copy of a task or mixture whose random preprocessors and mixing depend on a shard.

    SeqIO gives the same seed to all shards. A batch holds one or a few rows of each shard, so all
    its rows would be split, masked and drawn from a mixture's tasks alike. The seed that orders the
    examples before they are divided among shards stays common, or shards would overlap. Shard 0
    keeps SeqIO's seed.
    """
    import seqio

    offset = shard * _STRIDE
    own = copy.copy(task)
    if isinstance(task, seqio.Mixture):
        get_task_dataset, sample = task.get_task_dataset, task._sample_fn
        own.get_task_dataset = lambda subtask, *args, **kwargs: get_task_dataset(
            with_shard_seed(subtask, shard), *args, **kwargs
        )
        own._sample_fn = lambda datasets, rates, seed: sample(datasets, rates, _add(seed, offset))
        return own
    for name in ("preprocess_precache", "preprocess_postcache"):
        setattr(own, name, functools.partial(_reseeded, getattr(task, name), offset))
    return own


def _add(seed: int | None, offset: int) -> int | None:
    return None if seed is None else seed + offset


def _reseeded(
    preprocess: Callable[..., tf.data.Dataset],
    offset: int,
    dataset: tf.data.Dataset,
    *,
    seed: int | None = None,
    **kwargs: Any,
) -> tf.data.Dataset:
    return preprocess(dataset, seed=_add(seed, offset), **kwargs)
