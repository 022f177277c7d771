"""Training as a whole: it goes on where it was, and stops when something is wrong."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal

import jax
import numpy as np
import pytest
import toy

from diffusion_t5x.checkpointing.checkpoints import (
    RestoreCheckpointConfig,
    SaveCheckpointConfig,
    list_checkpoints,
)
from diffusion_t5x.checkpointing.reading import CheckpointMismatchError
from diffusion_t5x.data import datasets
from diffusion_t5x.data.task_checks import MetricError
from diffusion_t5x.evaluation import InferenceEvaluator
from diffusion_t5x.runtime.guards import Preempted
from diffusion_t5x.training import optimizers
from diffusion_t5x.training.early_stopping import EarlyStopping
from diffusion_t5x.training.metric_logs import read_metrics
from diffusion_t5x.training.train_step import NonFiniteError


def _same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path):
    make = lambda: toy.model(dropout_rate=0.2)  # noqa: E731
    straight = toy.run(tmp_path / "straight", 6, make())
    toy.run(tmp_path / "stopped", 3, make(), period=10)
    resumed = toy.run(tmp_path / "stopped", 6, make())
    _same(straight, resumed)
    assert int(resumed.step) == 6


def test_sigterm_saves_everything_and_a_restart_goes_on(tmp_path, monkeypatch):
    straight = toy.run(tmp_path / "straight", 6)
    original = datasets.DatasetIterator.__next__
    drawn = []

    def draw(self):
        drawn.append(1)
        if len(drawn) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(datasets.DatasetIterator, "__next__", draw)
    with pytest.raises(Preempted):
        toy.run(tmp_path / "told", 6, period=100)
    monkeypatch.undo()
    [(step, _)] = list_checkpoints(str(tmp_path / "told"))
    assert 0 < step < 6
    _same(straight, toy.run(tmp_path / "told", 6))


@pytest.mark.slow
def test_a_finished_run_is_not_trained_further(tmp_path):
    first = toy.run(tmp_path, 2)
    lines = read_metrics(str(tmp_path))
    again = toy.run(tmp_path, 2)
    _same(first, again)
    assert read_metrics(str(tmp_path)) == lines


def test_metrics_of_steps_that_were_lost_are_dropped_on_resume(tmp_path):
    toy.run(tmp_path, 4)
    log = tmp_path / "metrics.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 6, "split": "train"}) + '\n{"step": 7, "s')
    toy.run(tmp_path, 8)
    steps = [line["step"] for line in read_metrics(str(tmp_path)) if line["split"] == "train"]
    assert steps == [2, 4, 6, 8]


def test_the_loss_falls_and_everything_a_run_writes_is_there(tmp_path):
    toy.run(
        tmp_path,
        60,
        toy.model("autoregressive"),
        learning_rate=3e-2,
        period=30,
        train_eval_dataset_cfg=toy.dataset_cfg("validation"),
        eval_period=30,
        summarize_config_fn=lambda directory: open(f"{directory}/config.gin", "w").close(),
    )
    lines = read_metrics(str(tmp_path))
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert losses[-1] < 0.7 * losses[0]
    evaluated = [line for line in lines if line["split"] == "training_eval"]
    assert [line["step"] for line in evaluated] == [30, 60]
    assert "token_embedder/embedding" in (tmp_path / "model-info.txt").read_text()
    assert {path.name for path in tmp_path.iterdir()} >= {
        "checkpoint_30",
        "checkpoint_60",
        "config.gin",
        "train",
        "training_eval",
    }
    assert list((tmp_path / "train").glob("events*"))


@pytest.mark.slow  # test_models.py has the share of a step
def test_attention_opens_from_the_first_step_of_an_adaptation_also_over_a_restart(tmp_path):
    toy.run(tmp_path / "ar", 2, toy.model("autoregressive"))
    restore = RestoreCheckpointConfig(str(tmp_path / "ar"))

    def adapt(name, steps):
        model = toy.model()
        model.objective = dataclasses.replace(model.objective, opening_steps=5)
        return toy.run(tmp_path / name, 0, model, restore=restore, relative_steps=steps)

    straight = adapt("straight", 6)
    adapt("stopped", 2)
    _same(straight, adapt("stopped", 6))
    for name in ("straight", "stopped"):  # each line is the mean of two steps
        shares = [line["openness"] for line in read_metrics(str(tmp_path / name))]
        np.testing.assert_allclose(shares, [0.3, 0.7, 1.0], rtol=1e-6)


@pytest.mark.slow
def test_ar2diff_is_an_initial_checkpoint_and_another_objective(tmp_path):
    pretrained = toy.run(tmp_path / "ar", 2, toy.model("autoregressive"))
    path = str(tmp_path / "ar")
    adapted = toy.run(
        tmp_path / "adapted",
        0,
        toy.model("diffusion"),
        learning_rate=0.0,
        restore=RestoreCheckpointConfig(path),
        relative_steps=3,
    )
    assert int(adapted.step) == 5
    _same(pretrained.params, adapted.params)
    shutil.rmtree(path)  # a run that resumes needs its own checkpoints alone
    resumed = toy.run(
        tmp_path / "adapted",
        0,
        toy.model("diffusion"),
        restore=RestoreCheckpointConfig(path),
        relative_steps=3,
    )
    assert int(resumed.step) == 5


@pytest.mark.slow
def test_params_only_starts_at_step_zero_with_another_optimizer(tmp_path):
    toy.run(tmp_path / "first", 2)
    other = toy.model(optimizer=optimizers.adafactor())
    path = str(tmp_path / "first" / "checkpoint_2")
    with pytest.raises(CheckpointMismatchError, match="params_only"):
        toy.run(tmp_path / "second", 3, other, restore=RestoreCheckpointConfig(path))
    state = toy.run(
        tmp_path / "third", 1, other, restore=RestoreCheckpointConfig(path, params_only=True)
    )
    assert int(state.step) == 1


def test_a_checkpoint_of_another_model_is_refused_with_names_and_shapes(tmp_path):
    toy.run(tmp_path / "first", 1)
    with pytest.raises(CheckpointMismatchError) as error:
        toy.run(
            tmp_path / "second",
            2,
            toy.model(num_layers=2, mlp_dim=8),
            restore=RestoreCheckpointConfig(str(tmp_path / "first")),
        )
    text = str(error.value)
    assert "decoder/layers_0/mlp/wo/kernel: the checkpoint has [16, 16], the model [8, 16]" in text
    assert "the checkpoint lacks decoder/layers_1/mlp/wo/kernel: float32[8, 16]" in text


def test_a_loss_that_is_not_finite_stops_with_step_and_leaves_and_is_never_saved(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 1: .*decoder/.*Lower the learning rate"):
        toy.run(tmp_path, 6, period=1, learning_rate=float("nan"))
    assert not list(tmp_path.glob("checkpoint_*"))


@pytest.mark.parametrize("keep", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_only_the_latest_n_checkpoints_are_kept(tmp_path, keep):
    toy.run(tmp_path, 4, save=SaveCheckpointConfig(period=1, keep=keep))
    assert [step for step, _ in list_checkpoints(str(tmp_path))] == [1, 2, 3, 4][-keep:]


def _losses(directory):
    lines = read_metrics(str(directory))
    return {line["step"]: line["loss"] for line in lines if line["split"] == "training_eval"}


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_beside_the_latest_also_over_a_restart(tmp_path):
    # The loss goes up and down under such a learning rate.
    for steps in (3, 5):
        toy.run(
            tmp_path,
            steps,
            learning_rate=3.0,
            train_eval_dataset_cfg=toy.dataset_cfg("validation"),
            eval_period=1,
            save=SaveCheckpointConfig(period=1, keep=1, keep_best_metric="training_eval/loss"),
        )
        losses = _losses(tmp_path)
        best = min(losses, key=losses.get)
        assert {step for step, _ in list_checkpoints(str(tmp_path))} == {best, steps}


@pytest.mark.slow
def test_training_stops_when_the_validation_loss_no_longer_falls_and_stays_stopped(tmp_path):
    def train():
        # Nothing is learned, so no evaluation is better than the first.
        return toy.run(
            tmp_path,
            20,
            learning_rate=0.0,
            train_eval_dataset_cfg=toy.dataset_cfg("validation"),
            eval_period=3,
            period=100,
            early_stopping=EarlyStopping(patience=2),
        )

    assert int(train().step) == 9
    assert [step for step, _ in list_checkpoints(str(tmp_path))] == [9]
    lines = read_metrics(str(tmp_path))
    assert int(train().step) == 9
    assert read_metrics(str(tmp_path)) == lines


def test_an_unfinished_checkpoint_is_no_checkpoint(tmp_path):
    toy.run(tmp_path, 2)
    (tmp_path / "checkpoint_9.orbax-checkpoint-tmp-1" / "params").mkdir(parents=True)
    assert [step for step, _ in list_checkpoints(str(tmp_path))] == [2]
    assert int(toy.run(tmp_path, 3).step) == 3


def test_microbatches_change_no_number(tmp_path):
    whole = toy.run(tmp_path / "whole", 2, toy.model("autoregressive"))
    parts = toy.run(
        tmp_path / "parts", 2, toy.model("autoregressive"), trainer={"num_microbatches": 4}
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), whole.params, parts.params
    )


def test_clipping_bounds_the_update_of_plain_gradient_descent(tmp_path):
    import optax

    start = toy.run(tmp_path / "a", 1, toy.model(optimizer=optax.sgd(1.0)), learning_rate=0.0)
    clipped = toy.run(
        tmp_path / "b",
        1,
        toy.model(optimizer=optax.sgd(1.0)),
        learning_rate=1.0,
        trainer={"clip_norm": 0.01},
    )
    moved = jax.tree.map(lambda x, y: x - y, start.params, clipped.params)
    assert float(optax.global_norm(moved)) == pytest.approx(0.01, rel=1e-3)


def test_dry_run_compiles_reports_and_writes_nothing(tmp_path, capsys):
    toy.run(tmp_path / "run", 5, dry_run=True)
    text = capsys.readouterr().out
    assert "parameters: 6," in text
    assert "activations and temporaries" in text
    assert not (tmp_path / "run").exists()


def test_settings_out_of_range_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_microbatches = 0"):
        toy.run(tmp_path, 1, trainer={"num_microbatches": 0})
    with pytest.raises(ValueError, match="EVAL_PERIOD = 0"):
        toy.run(tmp_path, 1, eval_period=0)
    with pytest.raises(FileNotFoundError, match="neither a checkpoint nor a run"):
        toy.run(tmp_path, 1, restore=RestoreCheckpointConfig(str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match="needs pack = False"):
        datasets.get_dataset(toy.dataset_cfg(pack=True), toy.model().FEATURE_CONVERTER_CLS)


def _evaluated(directory, *tasks, steps=2, cfg=None, **kwargs):
    """A run that decodes tasks at its end."""
    return toy.run(
        directory,
        steps,
        train_eval_dataset_cfg=toy.dataset_cfg("validation"),
        infer_eval_dataset_cfg=cfg or toy.dataset_cfg("validation", mixture_or_task_name=tasks),
        inference_evaluator_cls=functools.partial(InferenceEvaluator, num_examples=2),
        eval_period=2,
        **kwargs,
    )


def divides_by_zero(targets, predictions):
    return {"x": 1 / (len(targets) - 2)}


def _splits(directory, step=2):
    return [line["split"] for line in read_metrics(str(directory)) if line["step"] == step]


@pytest.mark.parametrize("policy", ["continue", pytest.param("stop", marks=pytest.mark.slow)])
def test_a_metric_that_fails_is_named_and_costs_neither_the_step_nor_other_results(
    tmp_path, policy, capsys
):
    failing = toy.register_with("toy_fails", divides_by_zero)
    if policy == "stop":
        with pytest.raises(MetricError, match=r"'toy_fails'.*divides_by_zero.*ZeroDivisionError"):
            _evaluated(tmp_path, failing, toy.TASK, on_metric_error="stop")
    else:
        assert int(_evaluated(tmp_path, failing, toy.TASK).step) == 2
    assert re.search(r"step 2: task 'toy_fails'.*test_loop\.py:\d+", capsys.readouterr().out)
    assert [step for step, _ in list_checkpoints(str(tmp_path))] == [2]
    assert _splits(tmp_path) == ["train", "training_eval", f"inference_eval/{toy.TASK}"]


@pytest.mark.slow  # half a minute; the tests of evaluation kill it too
def test_an_evaluation_that_is_killed_is_made_up_for_from_the_saved_step(tmp_path, monkeypatch):
    _evaluated(tmp_path / "straight", toy.TASK, steps=4)
    original = InferenceEvaluator.evaluate
    killed = []

    def evaluate(self, params, step, *args):
        if not killed:
            killed.append(step)
            raise KeyboardInterrupt
        return original(self, params, step, *args)

    monkeypatch.setattr(InferenceEvaluator, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        _evaluated(tmp_path / "killed", toy.TASK, steps=4)
    assert [step for step, _ in list_checkpoints(str(tmp_path / "killed"))] == [2]
    assert _splits(tmp_path / "killed") == ["train", "training_eval"]
    _evaluated(tmp_path / "killed", toy.TASK, steps=4)

    def lines(run):
        noise = ("seconds", "steps_per_second", "examples_per_second", "decode_seconds_per_example")
        return [
            {name: value for name, value in line.items() if name not in noise}
            for line in read_metrics(str(tmp_path / run))
        ]

    assert lines("killed") == lines("straight")


@pytest.mark.slow
def test_a_finished_run_whose_last_evaluation_was_killed_makes_up_for_it(tmp_path):
    _evaluated(tmp_path, toy.TASK)
    log = tmp_path / "metrics.jsonl"
    whole = log.read_text().splitlines(keepends=True)
    log.write_text("".join(whole[:-1]))
    _evaluated(tmp_path, toy.TASK)
    assert _splits(tmp_path) == ["train", "training_eval", f"inference_eval/{toy.TASK}"]
    again = log.read_text()
    _evaluated(tmp_path, toy.TASK)
    assert log.read_text() == again


@pytest.mark.parametrize(("name", "splits"), [("train_only", ["train"]), ("no_metric", None)])
def test_a_task_that_cannot_be_evaluated_is_trained_with_a_line_that_says_so(
    tmp_path, name, splits, capsys
):
    metrics = [divides_by_zero] * (splits is not None)
    task = toy.register_with(f"toy_{name}", *metrics, splits=splits or ("train", "validation"))
    cfg = toy.dataset_cfg("validation", mixture_or_task_name=task)
    toy.run(
        tmp_path, 2, train_eval_dataset_cfg=cfg, infer_eval_dataset_cfg=cfg, eval_period=2,
        inference_evaluator_cls=InferenceEvaluator,
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert f"{task!r} has only a training split: training goes without" in printed or not splits
    assert f"task {task!r} has no {'split' if splits else 'metrics'}" in printed
    assert _splits(tmp_path) == ["train"] if splits else ["train", "training_eval"]


def test_an_empty_split_is_named_before_anything_is_trained(tmp_path):
    task = toy.register_with("toy_empty", divides_by_zero)
    cfg = toy.dataset_cfg("validation", mixture_or_task_name=task)
    kinds = {"train_eval_dataset_cfg": cfg}, {
        "infer_eval_dataset_cfg": cfg, "inference_evaluator_cls": InferenceEvaluator,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(toy.NUM_EXAMPLES, "validation", 0)
        for kind in kinds:
            with pytest.raises(ValueError, match=r"split 'validation' of 'toy_empty' has no exam"):
                toy.run(tmp_path, 2, **kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_with_another_batch_size_a_run_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    toy.run(tmp_path, 2)
    make = toy.dataset_cfg
    monkeypatch.setattr(toy, "dataset_cfg", lambda **kwargs: make(**{"batch_size": 16, **kwargs}))
    assert int(toy.run(tmp_path, 4).step) == 4
    assert "BATCH_SIZE 8 is now 16; going on after the 16 examples" in capsys.readouterr().out
