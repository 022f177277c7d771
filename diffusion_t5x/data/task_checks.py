"""What a task must have before anything long starts, and the error of a metric that fails then."""

from __future__ import annotations

import os
import traceback

import seqio

from diffusion_t5x.names import check_known


class MetricError(ValueError):
    """Metrics failed after decoding; the message names task, metric, place and error."""

    @classmethod
    def of(cls, task: str, error: BaseException) -> MetricError:
        """Describes an error of SeqIO's evaluator, whose cause is the metric's own."""
        cause = error.__cause__ or error
        frames = [
            frame
            for frame in traceback.extract_tb(cause.__traceback__)
            if not frame.filename.startswith(os.path.dirname(seqio.__file__))
        ]
        place = f" in {frames[0].name} ({frames[0].filename}:{frames[0].lineno})" if frames else ""
        return cls(f"task {task!r}: a metric failed{place}: {type(cause).__name__}: {cause}")


def check_split(task: seqio.Task | seqio.Mixture, split: str) -> None:
    """Refuses a split that a task lacks; the ValueError names the setting and all splits."""
    check_known(split, sorted(task.splits), f"task {task.name!r}: datasets.DatasetConfig.split")


def check_source(task: seqio.Task | seqio.Mixture, use_cached: bool, mixes: bool = True) -> None:
    """Checks that the caches that are asked for exist and, if it `mixes`, a mixture's rates.

    Raises:
      ValueError: if a cache or the number of examples that a rate needs is missing.
    """
    for subtask in seqio.get_subtasks(task):
        if use_cached and not subtask.cache_dir:
            places = ", ".join(seqio.utils.get_global_cache_dirs()) or "-"
            raise ValueError(
                f"USE_CACHED_TASKS = True, but task {subtask.name!r} has no cache in {places}; "
                "expected --seqio_additional_cache_dirs=DIRECTORY of what seqio_cache_tasks wrote, "
                "or USE_CACHED_TASKS = False."
            )
        if subtask.requires_caching and not use_cached:
            raise ValueError(
                f"USE_CACHED_TASKS = False, but task {subtask.name!r} is only read from a cache."
            )
        if mixes and isinstance(task, seqio.Mixture):
            try:
                task.get_rate(subtask)
            except (TypeError, AssertionError, OSError, KeyError) as error:
                raise ValueError(
                    f"MIXTURE_OR_TASK_NAME = {task.name!r}: the rate of task {subtask.name!r} "
                    f"cannot be computed ({type(error).__name__}: {error}). A rate by examples "
                    "needs their number: give the task's source num_input_examples, cache the "
                    "task, or give the mixture numbers as rates."
                ) from error


def check_not_empty(task: seqio.Task | seqio.Mixture, split: str) -> None:
    """Reads the first example of a split from its source, before preprocessors.

    Raises:
      ValueError: if there is none.
    """
    for subtask in seqio.get_subtasks(task):
        if split in subtask.splits:
            dataset = subtask.source.get_dataset(split=split, shuffle=False)
            if any(True for _ in dataset.take(1)):
                return
    raise no_example(split, task.name)


def no_example(split: str, name: str) -> ValueError:
    """Returns the error of a split that is empty."""
    return ValueError(
        f"split {split!r} of {name!r} has no example; expected one at least, after its "
        "preprocessors. datasets.DatasetConfig.split chooses another."
    )
