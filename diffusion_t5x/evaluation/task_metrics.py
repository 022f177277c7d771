"""The tasks to evaluate, and what their metrics give: numbers, and what TensorBoard shows."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf

from diffusion_t5x.data import datasets, task_checks, vocabularies
from diffusion_t5x.evaluation.candidate_chunks import TaskJudges
from diffusion_t5x.models import Model


def find_tasks(model: Model, dataset_cfg: datasets.DatasetConfig) -> list[seqio.Task]:
    """Returns the tasks that a configuration names, mixtures resolved.

    Raises:
      ValueError: if a task is unknown, of another vocabulary than the model, or has no cache where
        one is asked for.
    """
    names = dataset_cfg.mixture_or_task_name
    tasks = [
        task
        for name in ([names] if isinstance(names, str) else names)
        for task in seqio.get_subtasks(datasets.get_mixture_or_task(name))
    ]
    for task in tasks:
        task_checks.check_source(task, dataset_cfg.use_cached, mixes=False)
        vocabularies.check_task(task, model.input_vocabulary, model.output_vocabulary)
    return tasks


class Unmeasured:
    """What evaluation asks of a `seqio.Evaluator`, which keeps no task without metrics.

    Attributes:
      cached_task_datasets: task -> its examples.
      cached_model_datasets: task -> the model's features of them, enumerated.
    """

    def __init__(self, name: str, examples: tf.data.Dataset, features: tf.data.Dataset):
        """Keeps the examples of task `name`, and the features of each."""
        self.cached_task_datasets = {name: examples}
        self.cached_model_datasets = {name: features.enumerate()}


def read_examples(
    task: seqio.Task,
    converter: seqio.FeatureConverter,
    cfg: datasets.DatasetConfig,
    num_examples: int | None,
) -> seqio.Evaluator | Unmeasured:
    """Reads the first `num_examples` examples of a task, or all.

    Raises:
      ValueError: if a task without metrics has no lengths.
    """
    common = {"use_cached": cfg.use_cached, "seed": cfg.seed}
    lengths = cfg.task_feature_lengths
    if task.metric_objs:
        return seqio.Evaluator(
            task.name,
            feature_converter=converter,
            eval_split=cfg.split,
            sequence_length=lengths,
            num_examples=num_examples,
            **common,
        )
    if lengths is None:
        raise ValueError(
            f"TASK_FEATURE_LENGTHS = None; task {task.name!r} has no metrics, and its likelihood "
            "needs the lengths."
        )
    examples = task.get_dataset(lengths, cfg.split, shuffle=False, num_epochs=1, **common)
    examples = examples.take(num_examples or -1).cache()
    count = examples.reduce(np.int64(0), lambda total, _: total + 1)
    examples = examples.apply(tf.data.experimental.assert_cardinality(count))
    return Unmeasured(task.name, examples, converter(examples, lengths))


def measured_tasks(
    model: Model, dataset_cfg: datasets.DatasetConfig, likelihood: bool = False
) -> list[seqio.Task]:
    """Returns the tasks that have the split and metrics, and says which have not.

    With `likelihood` tasks need no metrics.
    """
    datasets.import_task_module(dataset_cfg.module)
    measured = []
    for task in find_tasks(model, dataset_cfg):
        if dataset_cfg.split not in task.splits:
            why = f"has no split {dataset_cfg.split!r}, only {', '.join(sorted(task.splits))}"
        elif not task.metric_objs and not likelihood:
            why = "has no metrics"
        else:
            measured.append(task)
            continue
        if jax.process_index() == 0:
            print(f"task {task.name!r} {why}, and is not decoded for evaluation.", flush=True)
    return measured


def check_keys(
    evaluator: seqio.Evaluator, task: seqio.Task, reserved: Collection[str] = ()
) -> None:
    """Refuses two metrics of a task that give the same key, as far as one example shows the keys.

    `reserved` are keys that evaluation adds to all tasks. The target of the first example is the
    prediction. A metric that cannot judge it gives no key.

    Raises:
      ValueError: naming the task, the metrics and the key.
    """
    if len(task.metric_fns) + bool(reserved) < 2:
        return
    example = next(evaluator.cached_task_datasets[task.name].take(1).as_numpy_iterator())
    judges = TaskJudges(evaluator, task.name)
    target = judges.target(example)
    text = judges.text(example)
    seen = dict.fromkeys(reserved, "'likelihood = True'")
    predicted = task.postprocess_fn(text, example=example, is_target=False)
    for functions, outputs in (
        (task.predict_metric_fns, ([predicted],)),
        (task.score_metric_fns, ([0.0],)),
        (task.predict_with_aux_metric_fns, ([predicted], {"scores": [0.0]})),
    ):
        for function in functions:
            name = getattr(function, "__name__", repr(function))
            keys: list[str] = []
            with contextlib.suppress(Exception):
                keys = list(function([target], *outputs))
            for key in keys:
                if key in seen:
                    raise ValueError(
                        f"task {task.name!r}: the metrics {seen[key]} and {name} both give "
                        f"{key!r}; expected another key from one of them."
                    )
                seen[key] = name


def digest_of_examples(evaluator: seqio.Evaluator | Unmeasured, task: str) -> str:
    """Returns a digest of the examples of a task: files that change give other results."""
    found = hashlib.blake2b(digest_size=8)
    for example in evaluator.cached_task_datasets[task].as_numpy_iterator():
        values = {name: np.asarray(value).tolist() for name, value in example.items()}
        found.update(repr(sorted(values.items())).encode())
    return found.hexdigest()


def record(output_dir: str, task: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what metrics gave as JSON values, and writes to TensorBoard what are not numbers.

    A number is a float, a text is itself, of a histogram there are counts and edges, and of
    anything else its kind.

    Raises:
      TypeError: if a value is none that SeqIO knows.
    """
    shown = {
        name: value
        for name, value in values.items()
        if isinstance(value, seqio.metrics.MetricValue)
        and not isinstance(value, seqio.metrics.Scalar)
    }
    if shown and jax.process_index() == 0:
        logger = seqio.TensorBoardLogger(output_dir)
        logger(task, step, shown, dataset=None, inferences=None, targets=None)
    return {name: _json_value(name, value) for name, value in values.items()}


def _json_value(name: str, value: Any) -> Any:
    if isinstance(value, seqio.metrics.Text):
        text = value.textdata
        return text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    if isinstance(value, seqio.metrics.Histogram):
        counts, edges = np.histogram(np.asarray(value.values), bins=value.bins or 30)
        return {"counts": counts.tolist(), "edges": edges.tolist()}
    if isinstance(value, seqio.metrics.MetricValue) and not isinstance(value, seqio.metrics.Scalar):
        return {"in TensorBoard": type(value).__name__}
    try:
        return float(np.array(getattr(value, "value", value)))
    except (TypeError, ValueError):
        raise TypeError(
            f"{name!r} is {value!r}; expected a number or one of seqio.metrics' values."
        ) from None
