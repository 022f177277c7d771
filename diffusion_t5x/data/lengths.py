"""Counts of texts that are longer than TASK_FEATURE_LENGTHS, and of the tokens that they lose."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import seqio
import tensorflow as tf

from diffusion_t5x.data import chat, preprocessors
from diffusion_t5x.data.datasets import DatasetConfig, get_mixture_or_task

# What is counted before training and inference, all tasks together; evaluation counts all.
EXAMPLES_COUNTED, TASKS_COUNTED = 1000, 8
_TRIMMING = (
    seqio.preprocessors.append_eos_after_trim,
    preprocessors.tokenize,
    chat.tokenize_turns,
)


class Cut(NamedTuple):
    """What of one feature is cut.

    Attributes:
      examples: The number of examples that lose tokens, `of_examples` that were counted.
      tokens: The number of tokens that they lose together, `of_tokens` that all have uncut.
      most: The number of tokens that one of them loses at most.
    """

    examples: int
    of_examples: int
    tokens: int
    of_tokens: int
    most: int


def _untrimmed(task: seqio.Task) -> seqio.Task:
    """Returns a copy of a task whose steps that trim know of no length."""
    return task.replace(
        preprocessors=[
            functools.partial(step, sequence_length=None)
            if getattr(step, "func", step) in _TRIMMING
            else step
            for step in task.preprocessors
        ]
    )


def _fits_by_itself(task: seqio.Task) -> bool:
    """Returns whether a task makes its texts as long as is asked for, as pretraining does."""
    parameters = (inspect.signature(step).parameters for step in task.preprocessors)
    found = (one["sequence_length"] for one in parameters if "sequence_length" in one)
    return any(parameter.default is inspect.Parameter.empty for parameter in found)


def count_cut(
    task: seqio.Task,
    lengths: Mapping[str, int],
    split: str,
    num_examples: int | None = None,
    trimmed: tf.data.Dataset | None = None,
    **kwargs: Any,
) -> dict[str, Cut]:
    """Counts, by feature, what a task's first examples lose; features that lose nothing are absent.

    Args:
      lengths: Maximum tokens by feature.
      num_examples: The number of examples; None for all of the split.
      trimmed: The same examples once trimmed, if they are there: unless one is as long as it may
        be, nothing is read.
      **kwargs: Further arguments of `seqio.Task.get_dataset`.
    """
    if _fits_by_itself(task) or (trimmed is not None and not _is_full(trimmed, lengths)):
        return {}
    dataset = _untrimmed(task).get_dataset(
        lengths, split, num_epochs=1, trim_output_features=False, **kwargs
    )
    spec = dataset.element_spec
    counted = [name for name in task.output_features if name in lengths and name in spec]
    found = {}
    for name, sizes in _sizes(dataset, counted, num_examples).items():
        over = np.maximum(sizes - lengths[name], 0)
        if over.any():
            totals = np.count_nonzero(over), len(sizes), over.sum(), sizes.sum(), over.max()
            found[name] = Cut(*map(int, totals))
    return found


def _sizes(
    dataset: tf.data.Dataset, features: Sequence[str], num_examples: int | None = None
) -> dict[str, np.ndarray]:
    """Returns the tokens of each feature of the first examples, `[examples]`."""
    if not features:
        return {}
    sizes = dataset.take(-1 if num_examples is None else num_examples).map(
        lambda example: tf.stack([tf.shape(example[name])[0] for name in features])
    )
    rows = [np.zeros([0, len(features)], np.int64), *sizes.batch(256).as_numpy_iterator()]
    return dict(zip(features, np.concatenate(rows).T, strict=True))


def _is_full(dataset: tf.data.Dataset, lengths: Mapping[str, int]) -> bool:
    sizes = _sizes(dataset, [name for name in lengths if name in dataset.element_spec])
    return any((of_one >= lengths[name]).any() for name, of_one in sizes.items())


def cut_of_evaluated(
    name: str, evaluator: Any, cfg: DatasetConfig, num_examples: int | None
) -> dict[str, Cut]:
    """Counts what the examples of a task that an evaluator has read lose."""
    if cfg.task_feature_lengths is None:
        return {}
    return count_cut(
        seqio.TaskRegistry.get(name),
        cfg.task_feature_lengths,
        cfg.split,
        num_examples,
        evaluator.cached_task_datasets[name],
        use_cached=cfg.use_cached,
        shuffle=False,
        seed=cfg.seed,
    )


def say(name: str, cut: Mapping[str, Cut], cfg: DatasetConfig) -> None:
    """Prints a line for each feature that loses tokens."""
    for feature, found in cut.items():
        length = (cfg.task_feature_lengths or {})[feature]
        print(
            f"{name}: {found.examples:,} of {found.of_examples:,} examples have longer {feature} "
            f"than TASK_FEATURE_LENGTHS[{feature!r}] = {length} tokens. They lose {found.tokens:,} "
            f"tokens, {found.tokens / found.of_tokens:.1%} of all, and up to {found.most:,} each.",
            flush=True,
        )


def report_cut(cfg: DatasetConfig, seed: int | None = None) -> None:
    """Prints what the first examples that a configuration reads lose, if they do.

    Of a mixture, the tasks with the highest rates are counted.
    """
    lengths = cfg.task_feature_lengths
    if lengths is None:
        return
    names = cfg.mixture_or_task_name
    tasks: list[seqio.Task] = []
    for provider in map(get_mixture_or_task, [names] if isinstance(names, str) else names):
        found = [
            task
            for task in seqio.get_subtasks(provider)
            if not _fits_by_itself(task) and cfg.split in task.splits
        ]
        if isinstance(provider, seqio.Mixture) and len(found) > TASKS_COUNTED:
            found.sort(key=provider.get_rate, reverse=True)
        tasks += found[:TASKS_COUNTED]
    for task in tasks:
        cut = count_cut(
            task,
            lengths,
            cfg.split,
            EXAMPLES_COUNTED // len(tasks),
            use_cached=cfg.use_cached,
            shuffle=cfg.shuffle,
            shuffle_buffer_size=1,
            seed=cfg.seed if cfg.seed is not None else seed,
        )
        say(f"the beginning of {task.name}:{cfg.split}", cut, cfg)
