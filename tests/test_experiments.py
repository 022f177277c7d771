"""An experiment is a list of commands: each runs once, whatever is killed, and all are compared.

The commands themselves are stand-ins that write what the real ones write.
"""

import dataclasses
import json
import pathlib

import pytest

from diffusion_t5x import experiments, report
from diffusion_t5x.metric_logs import write_atomically

RECIPE = dataclasses.replace(
    experiments.DEMO, architectures=("decoder_only", "encoder_decoder"), adapt_steps=7
)
TASK = RECIPE.tasks[0]
STAGES_PER_ARCHITECTURE = 3 + 3 * len(experiments.METHODS)
EXACT = {"autoregressive": 0.99, "diffusion": 0.8, "ar2diff_0": 0.85, "ar2diff_N": 0.9}


def _values(argv):
    bindings = dict(flag.removeprefix("--gin.").split("=", 1) for flag in argv)
    return {name: value.strip("'") for name, value in bindings.items()}


class FakeCommands:
    """Writes what `train` and `eval` write; dies at the stage that it is told to die at."""

    def __init__(self, die_at=None):
        self.calls = []
        self.die_at = die_at
        self.commands = {"train": self.train, "eval": self.eval, "sample": self.sample}

    def _count(self, directory):
        self.calls.append(directory)
        if len(self.calls) == self.die_at:
            raise KeyboardInterrupt

    def train(self, argv):
        values = _values(argv)
        self._count(values["MODEL_DIR"])
        lines = [{"step": step, "split": "train", "seconds": float(step)} for step in (10, 20)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(pathlib.Path(values["MODEL_DIR"]) / "metrics.jsonl", text)

    def eval(self, argv):
        values = _values(argv)
        output = pathlib.Path(values["EVAL_OUTPUT_DIR"])
        self._count(str(output))
        metrics = {
            "exact_match": EXACT[output.parent.name],
            "bleu": 50.0,
            "examples": 256,
            "decode_seconds_per_example": 0.5,
        }
        row = {"step": 10, "task": TASK.name, "metrics": metrics}
        results = {"rows": [row], "best": {"step": 10}}
        write_atomically(output / "results.json", json.dumps(results))
        record = {"inputs": "in", "target": "dans", "prediction": output.parent.name}
        text = (json.dumps(record) + "\n") * report.NUM_SAMPLES
        write_atomically(output / TASK.name / "predictions-10.jsonl", text)

    def sample(self, argv):
        print("sampled from", _values(argv)["CHECKPOINT_PATH"])


def _run(root, monkeypatch, **kwargs):
    fake = FakeCommands(**kwargs)
    monkeypatch.setattr(experiments, "COMMANDS", fake.commands)
    return fake, lambda: experiments.run("test", RECIPE, root)


def test_every_stage_runs_once_even_when_killed_in_between(tmp_path, monkeypatch):
    first, run = _run(tmp_path, monkeypatch, die_at=6)
    with pytest.raises(KeyboardInterrupt):
        run()
    second, run = _run(tmp_path, monkeypatch)
    run()
    # The stage that was killed is given the same command again, to go on where it was.
    assert second.calls[0] == first.calls[-1]
    together = first.calls[:-1] + second.calls
    assert len(together) == len(set(together)) == 2 * STAGES_PER_ARCHITECTURE
    third, run = _run(tmp_path, monkeypatch)
    run()
    assert third.calls == []


def test_a_directory_of_other_settings_is_refused_before_anything_is_mixed(tmp_path, monkeypatch):
    _, run = _run(tmp_path, monkeypatch)
    run()
    other = dataclasses.replace(RECIPE, adapt_steps=8)
    with pytest.raises(ValueError, match="made with other settings"):
        experiments.run("test", other, tmp_path)


def test_the_demo_is_a_part_of_the_larger_comparison(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "_best_step", lambda run: 10)
    demo, larger = (
        {stage.name: stage.argv() for stage in experiments.stages(recipe, tmp_path)}
        for recipe in (experiments.RECIPES["demo"], experiments.RECIPES["embedded"])
    )
    assert demo.items() <= larger.items()


def test_ar2diff_differs_from_diffusion_by_where_it_starts_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "_best_step", lambda run: 10)
    by_name = {stage.name: stage for stage in experiments.stages(RECIPE, tmp_path)}
    base = f"decoder_only/{TASK.name}"
    diffusion, zero, n = (
        by_name[f"{base}/{method}/train"] for method in ("diffusion", "ar2diff_0", "ar2diff_N")
    )
    assert diffusion.files == zero.files == n.files
    differing = {
        name for name, value in diffusion.bindings().items() if zero.bindings()[name] != value
    }
    assert differing == {"MODEL_DIR", "INITIAL_CHECKPOINT_PATH"}
    assert n.bindings()["INITIAL_CHECKPOINT_PATH"].endswith("adapt_N")
    assert zero.bindings()["INITIAL_CHECKPOINT_PATH"].endswith("pretrain_autoregressive")


def test_results_hold_a_row_per_method_and_count_the_whole_chain(tmp_path, monkeypatch, capsys):
    _, run = _run(tmp_path, monkeypatch)
    results = run()
    assert json.loads((tmp_path / "results.json").read_text()) == results
    rows = {(row["architecture"], row["method"]): row for row in results["rows"]}
    assert set(rows) == {(a, m) for a in RECIPE.architectures for m in experiments.METHODS}
    row = rows["decoder_only", "ar2diff_N"]
    assert row["task"] == TASK.name
    assert row["metrics"] == {"exact_match": 0.9, "bleu": 50.0}
    assert (row["train_steps"], row["examples"]) == (10, 256)
    assert row["decode_seconds_per_example"] == 0.5
    # AR pretraining and adaptation took 20 s each, fine-tuning 10 s up to the chosen checkpoint.
    assert row["train_seconds"] == 50.0
    assert rows["decoder_only", "ar2diff_0"]["train_seconds"] == 30.0
    assert results["environment"]["jax"]
    table = (tmp_path / "results.md").read_text().splitlines()
    assert len(table) == 2 + 2 * len(experiments.METHODS)
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "ar2diff_N:      'ar2diff_N'" in printed
    assert f"{TASK.name}/ar2diff_N/train/checkpoint_10" in printed
