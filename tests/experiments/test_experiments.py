"""An experiment is a list of commands: each runs once, whatever is killed, and all are compared.

The commands themselves are stand-ins that write what the real ones write.
"""

import dataclasses
import json
import pathlib
import shlex

import pytest

from diffusion_t5x.experiments import __main__ as experiments
from diffusion_t5x.experiments import experiment_graph, report
from diffusion_t5x.runtime.files import write_atomically

METHODS = ("autoregressive", "diffusion", "ar2diff_0", "ar2diff_N")
PRETRAININGS = 3  # two objectives and an adaptation
EXACT = {"autoregressive": 0.99, "diffusion": 0.8, "ar2diff_0": 0.85, "ar2diff_N": 0.9}
# Rows from all corners of the paper's tables: (table, row, columns).
PUBLISHED = [
    ("table1", "encoder_decoder/prefix_lm", (27.6, 75.8, 0.0)),
    ("table1", "decoder_only/prefix_lm", (29.8, 77.4, 12.2)),
    ("table1", "encoder_decoder/span_corruption", (28.7, 78.2, 0.0)),
    ("table1", "decoder_only/span_corruption", (29.1, 80.6, 11.1)),
    ("table2", "base/autoregressive", (33.27, 68.11, 5.5)),
    ("table2", "large/ar2diff_0", (31.14, 77.82, 3.3)),
    ("table2", "xl/ar2diff_100K", (32.55, 83.54, 15.5)),
    ("table3", "5_steps_8_samples", (77.41, 5.5)),
    ("table3", "10_steps_16_samples", (77.13, 13.3)),
]


def _values(argv):
    bindings = dict(flag.removeprefix("--gin.").split("=", 1) for flag in argv)
    return {name: value.strip("'") for name, value in bindings.items()}


class FakeCommands:
    """Writes what the commands write; dies at the stage that it is told to die at."""

    def __init__(self, die_at=None):
        self.calls = []
        self.die_at = die_at
        self.commands = {
            "train": self.train,
            "eval": self.eval,
            "sample": self.sample,
        }

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
        seed, name = int(values["RANDOM_SEED"]), values["MIXTURE_OR_TASK_NAME"]
        exact = EXACT.get(output.parent.name, 0.5) - 0.02 * seed
        metrics = {
            "exact_match": exact,
            **{metric: 100 * exact for metric in ("bleu", "f1", "pass_at_1")},
            "examples": 256,
            "decode_seconds_per_example": 0.5,
        }
        row = {"step": 10, "task": name, "metrics": metrics}
        results = {"rows": [row], "best": {"step": 10}}
        write_atomically(output / "results.json", json.dumps(results))
        record = {"inputs": "in", "target": "dans", "prediction": output.parent.name}
        text = (json.dumps(record) + "\n") * report.NUM_SAMPLES
        write_atomically(output / name / "predictions-10.jsonl", text)

    def sample(self, argv):
        print("sampled from", _values(argv)["CHECKPOINT_PATH"])


@pytest.fixture
def fake(monkeypatch):
    commands = FakeCommands()
    monkeypatch.setattr(experiments, "COMMANDS", commands.commands)
    return commands


def test_every_stage_runs_once_even_when_killed_in_between(tmp_path, fake):
    fake.die_at = 6
    with pytest.raises(KeyboardInterrupt):
        experiments.Run("families", None, tmp_path).run()
    first, fake.calls, fake.die_at = fake.calls, [], None
    experiments.Run("families", None, tmp_path).run()
    # The stage that was killed is given the same command again, to go on where it was.
    assert fake.calls[0] == first[-1]
    together = first[:-1] + fake.calls
    assert len(together) == len(set(together)) == 2 * (PRETRAININGS + 3 * len(METHODS) * 3)
    fake.calls = []
    experiments.Run("families", None, tmp_path).run()
    assert fake.calls == []


def test_a_directory_of_other_settings_is_refused_before_anything_is_mixed(tmp_path, fake):
    experiments.Run("demo", None, tmp_path).run()
    other = experiments.Run("demo", None, tmp_path, ["--gin.BATCH_SIZE=8"])
    with pytest.raises(ValueError, match="made with other settings"):
        other.run()


def test_gin_flags_reach_every_stage_after_its_own_bindings(tmp_path):
    run = experiments.Run("demo", None, tmp_path, ["--gin.BATCH_SIZE=8"])
    assert all(stage.argv(tmp_path)[-1] == "--gin.BATCH_SIZE=8" for stage in run.stages)


def test_the_demo_is_a_part_of_the_larger_comparison(tmp_path):
    demo, larger = (
        {stage.name: stage for stage in experiments.Run(name, None, tmp_path).stages}
        for name in ("demo", "families")
    )
    assert demo.items() <= larger.items()


def test_the_tables_share_the_stages_that_they_have_in_common(tmp_path, fake):
    experiments.Run("table2", "embedded", tmp_path).run()
    fake.calls = []
    experiments.Run("table3", "embedded", tmp_path).run()
    # What is left of table 3 is decoding alone, for three seeds: five ways, two tasks.
    assert len(fake.calls) == 3 * 5 * 2
    assert all("/test_" in call for call in fake.calls)


def test_ar2diff_differs_from_diffusion_by_where_it_starts_alone(tmp_path):
    by_name = {stage.name: stage for stage in experiments.Run("demo", None, tmp_path).stages}
    base = "decoder_only/base/prefix_lm/seed_0/embedded_translation_en_fr"
    diffusion, zero, n = (
        by_name[f"{base}/{method}/train"] for method in ("diffusion", "ar2diff_0", "ar2diff_N")
    )
    assert diffusion.files == zero.files == n.files
    differing = {k for k, value in diffusion.bindings.items() if zero.bindings[k] != value}
    assert differing == {"MODEL_DIR", "INITIAL_CHECKPOINT_PATH"}
    assert n.bindings["INITIAL_CHECKPOINT_PATH"].endswith("adapt_N")
    assert zero.bindings["INITIAL_CHECKPOINT_PATH"].endswith("pretrain_autoregressive")


@pytest.mark.parametrize("scale", ["paper", "embedded"])
@pytest.mark.parametrize("name", ["table1", "table2", "table3"])
def test_a_plan_lists_each_stage_after_those_it_needs_with_a_command_line(name, scale, tmp_path):
    run = experiments.Run(name, scale, tmp_path)
    seen = set()
    for stage in run.stages:
        assert set(stage.after) <= seen
        seen.add(stage.name)
    assert len(seen) == len(run.stages)
    commands = [line for line in run.plan().splitlines() if line.startswith("python -m ")]
    assert len(commands) == len(run.stages)
    for line, stage in zip(commands, run.stages, strict=True):
        assert shlex.split(line)[2] == f"diffusion_t5x.{stage.command}"
        assert shlex.split(line)[3:] == stage.argv(run.stages_dir)


def test_the_papers_settings_are_the_papers():
    run = experiments.Run("table2", None, "runs")
    by_name = {stage.name: stage for stage in run.stages}
    base = "decoder_only/xl/prefix_lm/seed_0"
    assert by_name[f"{base}/pretrain_diffusion"].steps == 1_000_000
    assert by_name[f"{base}/pretrain_diffusion"].tokens == 1_000_000 * 128 * 1024
    assert by_name[f"{base}/adapt_100K"].steps == 100_000
    for task, steps, period in (
        ("wmt14_en_fr", 500_000, 1000), ("squad_v1_1", 250_000, 1000), ("mbpp", 5_000, 50),
    ):  # fmt: skip
        stage = by_name[f"{base}/{task}/ar2diff_10K/train"]
        assert (stage.steps, stage.bindings["CHECKPOINT_PERIOD"]) == (steps, period)
    assert by_name[f"{base}/mbpp/autoregressive/test"].bindings["NUM_DECODES"] == 80
    assert by_name[f"{base}/mbpp/autoregressive/test"].bindings["TEMPERATURE"] == 0.8
    assert "TEMPERATURE" not in by_name[f"{base}/mbpp/diffusion/test"].bindings


@pytest.mark.parametrize(("table", "row", "values"), PUBLISHED)
def test_the_table_prints_ours_beside_the_papers_numbers(table, row, values, tmp_path, fake):
    run = experiments.Run(table, "embedded", tmp_path)
    header, body = run.table()
    assert len(body) == len(run.experiment.published)
    line = {name: rest for name, *rest in body}[row]
    assert tuple(line[1::2]) == values
    assert set(line[0::2]) == {report.MISSING}
    assert header[1::2] == [
        f"{role}, {run.scale.tasks[role].metric}" for role in run.experiment.tasks
    ]


def test_seeds_are_joined_to_a_mean_and_its_spread_and_missing_ones_are_left_out(tmp_path, fake):
    experiments.Run("table1", "embedded", tmp_path).run()
    run = experiments.Run("table2", "embedded", tmp_path)
    lines = {name: rest for name, *rest in run.table()[1]}
    # Table 1 has trained the diffusion row of Base with three seeds: 0.80, 0.78 and 0.76.
    assert lines["base/diffusion"][:4] == ["0.78 ± 0.02", 29.83, "78 ± 2", 77.41]
    assert lines["base/autoregressive"][0] == lines["xl/diffusion"][0] == report.MISSING


def test_results_hold_a_row_per_method_and_count_the_whole_chain(tmp_path, fake, capsys):
    results = experiments.Run("demo", None, tmp_path).run()
    directory = tmp_path / "demo"
    assert json.loads((directory / "results.json").read_text()) == results
    rows = {row["method"]: row for row in results["rows"]}
    assert tuple(rows) == METHODS
    row = rows["ar2diff_N"]
    assert row["task"] == "embedded_translation_en_fr"
    assert row["metrics"]["exact_match"] == 0.9
    assert (row["train_steps"], row["examples"]) == (10, 256)
    assert row["decode_seconds_per_example"] == 0.5
    # AR pretraining and adaptation took 20 s each, fine-tuning 10 s up to the chosen checkpoint.
    assert row["train_seconds"] == 50.0
    assert rows["ar2diff_0"]["train_seconds"] == 30.0
    assert results["environment"]["jax"]
    assert len((directory / "results.md").read_text().splitlines()) == 2 + len(METHODS)
    assert (directory / "results.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "ar2diff_N:      'ar2diff_N'" in printed
    assert "embedded_translation_en_fr/ar2diff_N/train/checkpoint_10" in printed


def test_what_is_unknown_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ValueError, match="'tabel2' is unknown; did you mean 'table2'"):
        experiments.Run("tabel2", None, tmp_path)
    with pytest.raises(ValueError, match="'embeded' is unknown; did you mean 'embedded'"):
        experiments.Run("table2", "embeded", tmp_path)
    with pytest.raises(ValueError, match="method 'ar2dif_0' is unknown"):
        experiment_graph.start_of("ar2dif_0")
    run = experiments.Run("table2", "embedded", tmp_path)
    other = dataclasses.replace(run.experiment, methods=("ar2diff_1K",))
    with pytest.raises(ValueError, match=r"'1K' is unknown; .*Known: 10K, 100K"):
        experiment_graph.stages(other, run.scale, tmp_path)


def test_the_command_lists_plans_and_refuses_other_flags(tmp_path, capsys):
    experiments.main(["--list"])
    assert "Table 2: AR, diffusion and AR2Diff" in capsys.readouterr().out
    experiments.main(["--plan", "table3", "--root", str(tmp_path), "--gin.VOCABULARY_PATH=v.model"])
    printed = capsys.readouterr().out
    assert printed.count("--gin.VOCABULARY_PATH=v.model") == 15
    assert "checkpoint_{best}" in printed
    experiments.main(["--table", "table3", "--root", str(tmp_path)])
    assert "missing" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        experiments.main(["--run", "demo", "--scal=embedded"])
