"""Metrics that are more than numbers are written, and those that cannot work are named."""

import json
import types

import numpy as np
import pytest
import seqio
import tensorflow as tf
import toy

from diffusion_t5x.checkpointing.checkpoints import RestoreCheckpointConfig
from diffusion_t5x.data.task_checks import MetricError
from diffusion_t5x.evaluation import evaluation, inference, task_metrics
from diffusion_t5x.runtime.partitioning import PjitPartitioner

values = seqio.metrics


def everything(targets, predictions):
    return {
        "accuracy": 1,
        "scalar": values.Scalar(np.float32(2.5)),
        "array": np.array([3.0]).mean(keepdims=False),
        "text": values.Text("hello"),
        "bytes": values.Text("é".encode()),
        "histogram": values.Histogram(np.array([1.0, 2.0, 2.5]), bins=2),
        "image": values.Image(np.zeros((1, 4, 4, 3), np.uint8)),
        "audio": values.Audio(np.zeros((1, 8, 1), np.float32)),
        "generic": values.Generic(np.float32(1), tf.compat.v1.SummaryMetadata()),
    }


def by_score(targets, scores):
    return {"accuracy": 1.0}


def accuracy(targets, predictions):
    return {"accuracy": 1.0}


def of_a_list(targets, predictions):
    return {"pieces": ["a", "b"]}


def raises(targets, predictions):
    raise KeyError("no such answer")


def duplicated_later(targets, predictions):
    return {"accuracy": 1.0} if len(targets) > 1 else {}


def _task(*metric_fns, **kwargs):
    name = "toy_" + "_".join(function.__name__ for function in metric_fns)
    return toy.register_with(name, *metric_fns, **kwargs)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    toy.run(directory, 1, toy.model("autoregressive"))
    return directory


def _evaluate(run_dir, output_dir, *tasks, split="validation"):
    return evaluation.evaluate(
        model=toy.model("autoregressive"),
        dataset_cfg=toy.dataset_cfg(split, batch_size=11, mixture_or_task_name=tasks),
        restore_checkpoint_cfg=RestoreCheckpointConfig(str(run_dir)),
        partitioner=PjitPartitioner(),
        output_dir=str(output_dir),
    )


def test_values_that_are_no_numbers_are_in_tensorboard_and_the_results(run_dir, tmp_path):
    name = _task(everything)
    [row] = _evaluate(run_dir, tmp_path, name)["rows"]
    metrics = row["metrics"]
    assert (metrics["accuracy"], metrics["scalar"], metrics["array"]) == (1.0, 2.5, 3.0)
    assert (metrics["text"], metrics["bytes"]) == ("hello", "é")
    assert metrics["histogram"] == {"counts": [1, 2], "edges": [1.0, 1.75, 2.5]}
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["metrics"] == metrics
    header = (tmp_path / "results.md").read_text().splitlines()[0]
    assert "scalar" in header and "text" not in header
    [events] = (tmp_path / name).glob("events*")
    tags = {
        value.tag
        for event in tf.compat.v1.train.summary_iterator(str(events))
        for value in event.summary.value
    }
    shown = {tag.removeprefix("eval/").partition("/")[0] for tag in tags}
    assert shown == {"text", "bytes", "histogram", "image", "audio", "generic"}


def test_two_metrics_with_one_key_are_found_before_decoding(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation.InferenceEvaluator, "_evaluate", None)
    for pair in ((everything, accuracy), (accuracy, by_score)):
        names = rf"{pair[0].__name__} and {pair[1].__name__} both give 'accuracy'"
        with pytest.raises(ValueError, match=names):
            _evaluate(run_dir, tmp_path, _task(*pair))


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ((raises,), r"in raises \(.*test_task_metrics.py:\d+\): KeyError: 'no such answer'"),
        ((of_a_list,), r"'pieces' is \['a', 'b'\]; expected a number"),
        ((accuracy, duplicated_later), r"Duplicate metric key 'accuracy'"),
    ],
)
def test_a_metric_that_fails_is_named_and_other_tasks_results_are_written(
    run_dir, tmp_path, functions, message
):
    with pytest.raises(
        MetricError, match=rf"task '{_task(*functions)}': a metric failed.*{message}"
    ):
        _evaluate(run_dir, tmp_path, _task(*functions), toy.TASK)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["task"] for row in rows] == [toy.TASK]
    assert (tmp_path / "results.md").exists()


def test_a_directory_that_cannot_be_written_to_is_named_before_decoding(run_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"EVAL_OUTPUT_DIR = '.*/file/out' cannot be written to"):
        _evaluate(run_dir, tmp_path / "file" / "out", toy.TASK)


def test_what_cannot_be_evaluated_is_said_with_the_reason(run_dir, tmp_path, capsys):
    train_only = _task(accuracy, splits=["train"])
    rows = _evaluate(run_dir, tmp_path, train_only, toy.TASK)["rows"]
    assert [row["task"] for row in rows] == [toy.TASK]
    assert f"{train_only!r} has no split 'validation', only train" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no task of .* has metrics and a split 'validation'"):
        _evaluate(run_dir, tmp_path, train_only)


def test_inference_on_a_split_that_is_not_there_is_refused_before_the_checkpoint_is_read(run_dir):
    with pytest.raises(
        ValueError, match=r"datasets.DatasetConfig.split = 'test' .*Known: train, val"
    ):
        inference.infer(
            model=toy.model("autoregressive"),
            dataset_cfg=toy.dataset_cfg("test", mixture_or_task_name=_task(raises)),
            restore_checkpoint_cfg=RestoreCheckpointConfig(str(run_dir)),
            partitioner=PjitPartitioner(),
            output_dir="/nowhere",
        )


def test_results_are_for_the_examples_that_were_read():
    def digest(**features):
        dataset = tf.data.Dataset.from_tensor_slices(features)
        evaluator = types.SimpleNamespace(cached_task_datasets={"a": dataset})
        return task_metrics.digest_of_examples(evaluator, "a")

    texts = {"inputs": [[1, 2]], "answers": [["one", "two"]]}
    assert digest(**texts) == digest(**dict(reversed(texts.items())))
    assert digest(**texts) != digest(**{**texts, "answers": [["one", "three"]]})
    assert digest(**texts) != digest(**{**texts, "inputs": [[1, 3]]})
