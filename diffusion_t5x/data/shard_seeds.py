"""Randomness of its own for each data shard."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import seqio
import tensorflow as tf

# Far more than the seeds that SeqIO counts up from the one it is given, one per preprocessor.
_STRIDE = 1_000_003


def with_shard_seed(task: seqio.Task | seqio.Mixture, shard: int) -> seqio.Task | seqio.Mixture:
    """The same task or mixture, whose random preprocessors and mixing draw anew for each shard.

    SeqIO gives all shards one seed. With a row or a few of each shard in a batch, all rows would be
    split, masked and drawn from a mixture's tasks alike. What orders the examples before they are
    dealt to shards keeps the common seed, or shards would overlap.

    Args:
      task: a registered task or mixture, which is left as it is.
      shard: index of the shard; 0 keeps the seed.
    """
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
