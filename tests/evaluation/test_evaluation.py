"""Batch evaluation: every checkpoint once, the best found, nothing redone."""

import json
import pathlib
import shutil
import threading

import numpy as np
import pytest
import toy

from diffusion_t5x.checkpointing import checkpoints, integrity
from diffusion_t5x.checkpointing.checkpoints import RestoreCheckpointConfig, list_checkpoints
from diffusion_t5x.checkpointing.integrity import DamagedCheckpointError
from diffusion_t5x.evaluation import checkpoint_queue, compiled_model, evaluation, results
from diffusion_t5x.runtime import resumable, terminal
from diffusion_t5x.runtime.partitioning import PjitPartitioner


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with checkpoints 1, 2 and 3."""
    directory = tmp_path_factory.mktemp("run")
    toy.run(directory, 3, toy.model("autoregressive"), period=1)
    return directory


def _evaluate(run_dir, output_dir, objective="autoregressive", mode="all", **kwargs):
    cfg = kwargs.pop("dataset_cfg", toy.dataset_cfg("validation", batch_size=4))
    return evaluation.evaluate(
        model=toy.model(objective),
        dataset_cfg=cfg,
        restore_checkpoint_cfg=RestoreCheckpointConfig(str(run_dir), mode),
        partitioner=PjitPartitioner(),
        output_dir=str(output_dir),
        **kwargs,
    )


@pytest.fixture
def count_predictions(monkeypatch):
    """The checkpoints' steps for which something was decoded."""
    steps = []
    original = evaluation.InferenceEvaluator._evaluate

    def counted(self, name, params, step, resume_key):
        steps.append(step)
        if self.fail_at == step:
            raise RuntimeError("killed")
        return original(self, name, params, step, resume_key)

    monkeypatch.setattr(evaluation.InferenceEvaluator, "_evaluate", counted)
    monkeypatch.setattr(evaluation.InferenceEvaluator, "fail_at", None, raising=False)
    return steps


def test_every_checkpoint_is_evaluated_once_even_when_killed_in_between(
    run_dir, tmp_path, count_predictions, monkeypatch, capsys
):
    monkeypatch.setattr(evaluation.InferenceEvaluator, "fail_at", 2)
    with pytest.raises(RuntimeError):
        _evaluate(run_dir, tmp_path)
    assert count_predictions == [1, 2]
    monkeypatch.setattr(evaluation.InferenceEvaluator, "fail_at", None)
    results = _evaluate(run_dir, tmp_path, best_metric="exact_match")
    assert count_predictions == [1, 2, 2, 3]
    assert [row["step"] for row in results["rows"]] == [1, 2, 3]
    assert all(row["metrics"]["examples"] == 11 for row in results["rows"])
    _evaluate(run_dir, tmp_path, best_metric="exact_match")
    assert count_predictions == [1, 2, 2, 3]
    file = tmp_path / "checkpoint_2" / f"{toy.TASK}.json"
    file.write_text(file.read_text()[:-9])
    assert _evaluate(run_dir, tmp_path, best_metric="exact_match")["best"] == results["best"]
    assert count_predictions == [1, 2, 2, 3, 2]
    assert f"{file} is damaged" in capsys.readouterr().out
    _evaluate(run_dir, tmp_path, random_seed=1)
    assert count_predictions == [1, 2, 2, 3, 2, 1, 2, 3]
    stored = json.loads((tmp_path / "results.json").read_text())
    assert len(stored["rows"]) == 3
    assert (tmp_path / "results.md").read_text().count("\n") == 5


def test_predictions_are_written_in_order_with_inputs_targets_and_scores(run_dir, tmp_path, capsys):
    lengths = {"inputs": 3, "targets": 6}
    cfg = toy.dataset_cfg("validation", batch_size=4, task_feature_lengths=lengths)
    [row] = _evaluate(run_dir, tmp_path, mode="latest", dataset_cfg=cfg)["rows"]
    # What the lengths cut is in the results, of the features that are cut.
    cut = {name: value for name, value in row["metrics"].items() if "cut" in name}
    assert cut == {"inputs_cut": 11, "inputs_tokens_cut": 11}
    assert f"{toy.TASK}:validation: 11 of 11 examples have longer inputs" in capsys.readouterr().out
    file = tmp_path / toy.TASK / "predictions-3.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    # A pass of the AR decoder gives one token; a batch waits for its longest text.
    metrics = row["metrics"]
    assert metrics["decode_steps_per_example"] == metrics["decode_passes_per_example"]
    assert 0 < metrics["decode_tokens_per_pass"] <= 1
    assert [record["inputs"] for record in records] == [f"v{number:03}" for number in range(11)]
    assert all(record["target"] == record["inputs"] for record in records)
    assert all(record["score"] <= 0 for record in records)


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_checkpoints_or_the_rows_filled_up(
    run_dir, tmp_path
):
    [row] = _evaluate(run_dir, tmp_path / "one", "diffusion", mode="latest")["rows"]
    rows = _evaluate(run_dir, tmp_path / "all", "diffusion")["rows"]
    cost = [
        row["metrics"][f"decode_{name}_per_example"] for name in ("steps", "passes", "positions")
    ]
    assert cost == [2, 2 * 2, 2 * 2 * 6]  # steps, samples, positions of a canvas
    drop = lambda metrics: {k: v for k, v in metrics.items() if "seconds" not in k}  # noqa: E731
    assert drop(row["metrics"]) == drop(rows[-1]["metrics"])
    texts = [
        (tmp_path / name / toy.TASK / "predictions-3.jsonl").read_text() for name in ("one", "all")
    ]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_several_tasks_at_once_and_all_decodes_for_metrics_that_want_them(run_dir, tmp_path):
    import seqio

    toy.register()
    name = "toy_any_of_samples"
    if name not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(toy._examples, splits=list(toy.NUM_EXAMPLES)),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            output_features=seqio.TaskRegistry.get(toy.TASK).output_features,
            metric_fns=[lambda targets, predictions: {"samples": len(predictions[0])}],
        )
    cfg = toy.dataset_cfg("test", batch_size=11, mixture_or_task_name=(name,))
    evaluator = evaluation.InferenceEvaluator(
        toy.model("diffusion"), cfg, PjitPartitioner(), str(tmp_path), return_all_decodes=True
    )
    cfg = RestoreCheckpointConfig(str(run_dir), "all")
    restore = compiled_model.restorer(toy.model("diffusion"), PjitPartitioner(), cfg)
    params = restore(list_checkpoints(str(run_dir))[-1][1])
    assert evaluator.evaluate(params, 3)[name]["samples"] == 2
    both = toy.dataset_cfg("test", batch_size=11, mixture_or_task_name=(name, toy.TASK))
    evaluator = evaluation.InferenceEvaluator(
        toy.model("autoregressive"), both, PjitPartitioner(), str(tmp_path), num_examples=5
    )
    results = evaluator.evaluate(params, 3)
    assert set(results) == {name, toy.TASK}
    assert all(metrics["examples"] == 5 for metrics in results.values())


def test_a_checkpoint_that_vanishes_before_all_tasks_are_evaluated_cannot_be_the_best(
    run_dir, tmp_path, monkeypatch, capsys
):
    class TwoTasks:
        """Measures 'a' and 'b'; the highest step is the best."""

        def __init__(self, **kwargs):
            self.tasks, self.settings = ("a", "b"), {}

        def evaluate(self, params, step, tasks, key):
            return {task: {"score": float(step)} for task in tasks}

        def forget(self, *args):
            pass

    restored = []

    def restore(path, **kwargs):
        restored.append(path)
        if path.endswith("_3"):
            raise FileNotFoundError(path)
        return {}

    monkeypatch.setattr(compiled_model, "restore_params", restore)
    known = tmp_path / "checkpoint_3" / "a.json"
    path = str(run_dir / "checkpoint_3")
    row = {"step": 3, "task": "a", "metrics": {"score": 3.0}}
    settings = {"checkpoint": path, "parameters": "averaged"}
    key = resumable.digest({**settings, "save": integrity.save_number(path)})
    resumable.save(known, key, row)
    found = _evaluate(run_dir, tmp_path, inference_evaluator_cls=TwoTasks, best_metric="a/score")
    assert [(row["step"], row["task"]) for row in found["rows"]] == [
        (1, "a"), (1, "b"), (2, "a"), (2, "b"), (3, "a"),
    ]  # fmt: skip
    assert found["best"]["step"] == 2
    assert len(restored) == 3
    assert "1 of 2 tasks are evaluated; it cannot be the best" in capsys.readouterr().out


@pytest.fixture
def going_on(tmp_path, monkeypatch):
    """A run that is being written: `during[step]` happens while that step is evaluated."""
    run, during = tmp_path / "run", {}
    for step in (1, 2, 3):
        (run / f"checkpoint_{step}").mkdir(parents=True)

    class Evaluator:
        def __init__(self, **kwargs):
            self.tasks, self.settings = ("a",), {}
            during.get("start", lambda: None)()

        def evaluate(self, params, step, tasks, key):
            during.get(step, lambda: None)()
            return {task: {"score": float(step)} for task in tasks}

        def forget(self, *args):
            pass

    def restore(path, **kwargs):
        if not pathlib.Path(path).exists():
            raise FileNotFoundError(path)
        during.get(path[-12:], lambda: None)()
        return {}

    monkeypatch.setattr(compiled_model, "restore_params", restore)
    monkeypatch.setattr(checkpoints, "newest_undamaged", lambda path, items: max(
        (step, path, ()) for step, path in list_checkpoints(path)
    ))  # fmt: skip
    monkeypatch.setattr(checkpoint_queue, "DELETION_SECONDS", 0.5)

    def evaluate(mode="all"):
        found = _evaluate(run, tmp_path / "out", mode=mode, inference_evaluator_cls=Evaluator)
        return [row["step"] for row in found["rows"]]

    return run, during, evaluate


def _advance(run, old, new):
    for step in old:
        (run / f"checkpoint_{step}").rmdir()
    for step in new:
        (run / f"checkpoint_{step}").mkdir()


def test_checkpoints_that_a_run_saves_meanwhile_are_evaluated_and_deleted_ones_named(
    going_on, capsys
):
    run, during, evaluate = going_on
    during["start"] = lambda: _advance(run, [1, 2], [4])
    during[3] = lambda: _advance(run, [3, 4], [5])
    during[5] = lambda: _advance(run, [], [6])
    assert evaluate() == [3, 5, 6]
    text = capsys.readouterr().out
    assert [step for step in range(1, 7) if f"checkpoint_{step} is gone" in text] == [1, 2, 4]


def test_the_latest_that_vanished_is_replaced_by_the_latest_now_and_no_other(going_on):
    run, during, evaluate = going_on
    during["start"] = lambda: _advance(run, [1, 2, 3], [4])
    during[4] = lambda: _advance(run, [], [5])
    assert evaluate("latest") == [4]


def test_where_nothing_is_left_to_evaluate_that_is_an_error(going_on):
    run, during, evaluate = going_on
    during["start"] = lambda: _advance(run, [1, 2, 3], [])
    for mode in ("all", "latest"):
        with pytest.raises(FileNotFoundError, match=r"nothing was evaluated.*keep"):
            evaluate(mode)
        _advance(run, [], [1, 2, 3])


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_gone_and_not_damaged(going_on):
    run, during, evaluate = going_on

    def fail():
        threading.Timer(0.2, _advance, (run, [2], [])).start()
        raise DamagedCheckpointError("params/d is missing")

    during["checkpoint_2"] = fail
    assert evaluate() == [1, 3]
    during["checkpoint_3"] = fail
    during.pop("checkpoint_2")
    shutil.rmtree(run.parent / "out")
    (run / "checkpoint_2").mkdir()
    with pytest.raises(DamagedCheckpointError, match="params/d is missing"):
        evaluate()


def test_a_damaged_checkpoint_is_left_out_and_named_again_at_the_end(going_on, tmp_path, capsys):
    _, during, evaluate = going_on

    def fail():
        raise DamagedCheckpointError("checkpoint_2 is damaged: params/d is missing")

    during["checkpoint_2"] = fail
    with pytest.raises(DamagedCheckpointError, match="checkpoint_2 is damaged"):
        evaluate()
    assert "params/d is missing\nIt is left out." in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["step"] for row in rows] == [1, 3]


def test_mistakes_are_refused_with_what_would_be_right(run_dir, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'toy_copy'"):
        cfg = toy.dataset_cfg("validation", mixture_or_task_name="toy_coppy")
        _evaluate(run_dir, tmp_path, dataset_cfg=cfg)
    with pytest.raises(ValueError, match="toy_copy/exact_match"):
        _evaluate(run_dir, tmp_path, best_metric="exact_matc")
    with pytest.raises(FileNotFoundError, match="neither a checkpoint nor a run"):
        _evaluate(tmp_path / "nowhere", tmp_path)
    with pytest.raises(ValueError, match="has metrics and a split 'nope'"):
        _evaluate(run_dir, tmp_path, dataset_cfg=toy.dataset_cfg("nope"))


def test_the_best_is_the_earliest_of_equals_and_needs_one_task():
    rows = [
        {"step": step, "task": task, "metrics": {"bleu": bleu}}
        for step, task, bleu in ((1, "a", 3.0), (2, "a", 5.0), (3, "a", 5.0), (1, "b", 9.0))
    ]
    assert results.choose_best(rows, "a/bleu", "max")["step"] == 2
    assert results.choose_best(rows, "a/bleu", "min")["step"] == 1
    with pytest.raises(ValueError, match="is a metric of a, b"):
        results.choose_best(rows, "bleu", "max")


def test_tables_show_missing_values_and_mark_the_best():
    rows = [
        {"step": 1, "task": "a", "metrics": {"x": 0.123456, "n": 5000.0}},
        {"step": 2, "task": "b", "metrics": {"y": 2.0}},
    ]
    best = {"step": 1, "task": "a", "metric": "x", "value": 0.123456}
    text = terminal.markdown(*results.tabulate({"rows": rows, "best": best}))
    assert text.splitlines()[0] == "| step | task | x | n | y |"
    assert text.splitlines()[2] == "| 1 (best) | a | 0.1235 | 5,000 | – |"
    assert text.splitlines()[3] == "| 2 | b | – | – | 2 |"
    assert np.all([line.startswith("|") for line in text.splitlines()])
