"""An experiment is a list of commands: each runs once, whatever is killed, and all are compared.

The commands themselves are stand-ins that write what the real ones write.
"""

import dataclasses
import json
import re
import shlex

import pytest
from fake_commands import FakeCommands

from diffusion_t5x import gin_utils
from diffusion_t5x.experiments import __main__ as experiments
from diffusion_t5x.experiments import report, stages
from diffusion_t5x.runtime.files import write_atomically

METHODS = ("autoregressive", "diffusion", "ar2diff_0", "ar2diff_N")
PRETRAININGS = 3  # two objectives and an adaptation
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
    # The stage that was killed gets the same command again, which resumes it.
    assert fake.calls[0] == first[-1]
    together = first[:-1] + fake.calls
    assert len(together) == len(set(together)) == 2 * (PRETRAININGS + 3 * len(METHODS) * 3)
    fake.calls = []
    experiments.Run("families", None, tmp_path).run()
    assert fake.calls == []


def test_a_directory_of_other_settings_is_refused_before_anything_is_mixed(tmp_path, fake):
    experiments.Run("demo", None, tmp_path).run()
    other = experiments.Run("demo", None, tmp_path, ["--gin.BATCH_SIZE=8"])
    with pytest.raises(ValueError, match="is of a stage with other settings"):
        other.run()


def test_a_stage_whose_note_is_damaged_is_named_and_run_once_more(tmp_path, fake, capsys):
    run = experiments.Run("demo", None, tmp_path)
    run.run()
    fake.calls = []
    note = run.stages_dir / run.stages[0].name / "stage.json"
    note.write_text(note.read_text()[:20])
    run.run()
    assert len(fake.calls) == 1
    assert f"{note} is damaged" in capsys.readouterr().out


def test_notes_of_earlier_versions_are_recognised(tmp_path, fake):
    run = experiments.Run("demo", None, tmp_path)
    run.run()
    for stage in run.stages:
        note = run.stages_dir / stage.name / "stage.json"
        written = json.loads(note.read_text())
        del written["checksum"]
        assert written == {"argv": run.argv(stage), "finished": True}
        note.write_text(json.dumps(written))
    fake.calls = []
    run.run()
    assert not fake.calls


def test_gin_flags_and_search_paths_reach_every_stage_after_its_own_bindings(tmp_path):
    run = experiments.Run("demo", None, tmp_path, ["--gin.BATCH_SIZE=8"], ["a", "b"])
    last = ["--gin_search_paths=a,b", "--gin.BATCH_SIZE=8"]
    assert all(run.argv(stage)[-2:] == last for stage in run.stages)


def test_a_stage_is_one_line_in_words_and_commands_go_to_a_file(tmp_path, fake, capsys):
    run = experiments.Run("demo", None, tmp_path)
    run.run()
    lines = capsys.readouterr().out.splitlines()[: len(run.stages)]
    assert lines[:4] == [
        "[1/15] pretrain autoregressive: step 20, loss 2.5, 0 s",
        "[2/15] fine-tune autoregressive on embedded_translation_en_fr: step 20, loss 2.5, 0 s",
        "[3/15] choose a checkpoint of autoregressive on embedded_translation_en_fr: step 10, "
        "exact_match 0.99, 0 s",
        "[4/15] test autoregressive on embedded_translation_en_fr: exact_match 0.99, bleu 99, "
        "f1 99, pass_at_1 99, 0 s",
    ]
    commands = (tmp_path / "demo" / "commands.sh").read_text()
    assert all(shlex.join(run.argv(stage)) in commands for stage in run.stages)
    assert "{best}" not in run.argv(run.stages[-1])[-1]
    output = run.stages_dir / run.stages[3].name / "output.txt"
    assert output.read_text() == "a table of results\n"
    run.run()
    again = capsys.readouterr().out.splitlines()
    assert again[0] == "[1/15] pretrain autoregressive: step 20, loss 2.5, finished before"


def test_commands_and_their_output_are_shown_on_request(tmp_path, fake, capsys):
    experiments.main(["--run", "demo", "--root", str(tmp_path), "--commands"])
    out = capsys.readouterr().out
    assert out.count("\n$ python -m diffusion_t5x.") == 15
    assert out.count("a table of results") == 8


def test_a_stage_that_fails_names_the_file_of_its_output(tmp_path, fake, capsys):
    fake.die_at = 1
    with pytest.raises(KeyboardInterrupt):
        experiments.Run("demo", None, tmp_path).run()
    assert "stopped; its output is in" in capsys.readouterr().err


MINE = """
include 'experiments/common.gin'
from __gin__ import dynamic_registration
from diffusion_t5x.experiments import experiment_graph

experiment_graph.Experiment:
  title = 'Mine beside diffusion'
  tasks = ('translation',)
  methods = (
      @autoregressive/experiment_graph.Method(),
      @mine/experiment_graph.Method(),
      @ar2mine/experiment_graph.Method(),
  )
  scale = 'laptop'
  trajectory = 'Wednesday'
mine/experiment_graph.Method:
  name = 'mine'
  label = 'my method'
  objective = 'masked.gin'
  learning_rate = 0.01
  finetune_steps = 70
  checkpoint_period = 35
  bindings = {'MASKS': 3}
  decoding = {'NUM_STEPS': 4}
ar2mine/experiment_graph.Method:
  name = 'ar2mine'
  objective = 'masked.gin'
  start = @autoregressive/experiment_graph.Method()
  adapt_steps = 40
"""


def test_a_method_of_a_users_own_takes_one_gin_file_and_one_objective(tmp_path, fake, capsys):
    (tmp_path / "mine.gin").write_text(MINE)
    root = tmp_path / "runs"
    argv = ["--run", str(tmp_path / "mine.gin"), "--root", str(root), "--gin_search_paths=objs"]
    experiments.main(argv)
    run = experiments.Run(str(tmp_path / "mine.gin"), "laptop", root, (), ("objs",))
    by_name = {stage.name.partition("seed_0/")[2]: stage for stage in run.stages}
    task = "embedded_translation_en_fr"
    own = by_name[f"{task}/mine/train"]
    assert "masked.gin" in own.files
    scheduler = "optimizers.create_learning_rate_scheduler"
    assert own.bindings[f"{scheduler}.base_learning_rate"] == 0.01
    assert (own.steps, own.bindings["CHECKPOINT_PERIOD"], own.bindings["MASKS"]) == (70, 35, 3)
    assert own.after.endswith("/pretrain_mine")
    test = by_name[f"{task}/mine/test"].bindings
    assert (test["MASKS"], test["NUM_STEPS"]) == (3, 4)
    # What a method leaves open, the scale gives by the kind of decoding.
    adapted = by_name[f"{task}/ar2mine/train"]
    assert (adapted.steps, adapted.bindings[f"{scheduler}.step_offset"]) == (2800, 540)
    assert by_name["adapt_ar2mine"].steps == 40
    assert by_name["adapt_ar2mine"].after.endswith("/pretrain_autoregressive")
    results = json.loads((root / "mine" / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["autoregressive", "my method", "ar2mine"]
    out = capsys.readouterr().out
    assert "test my method on embedded_translation_en_fr" in out
    assert re.search("my method: +'mine'", out)  # a decoded sample
    assert "embedded_translation_en_fr/ar2mine/train/checkpoint_10" in out


def test_a_file_named_like_one_of_this_project_is_refused_for_it_would_share_its_directory(
    tmp_path,
):
    for name in ("table2.gin", "laptop.gin"):
        (tmp_path / name).write_text(MINE)
    with pytest.raises(ValueError, match=r"table2\.gin is named like the experiment 'table2'"):
        experiments.Run(str(tmp_path / "table2.gin"), None, tmp_path)
    with pytest.raises(ValueError, match=r"laptop\.gin is named like the scale 'laptop'"):
        experiments.Run("demo", "laptop.gin", tmp_path, (), [str(tmp_path)])
    for own in ("experiments/demo.gin", str(gin_utils.config_dir() / "experiments/demo.gin")):
        assert experiments.Run(own, "scales/laptop.gin", tmp_path).results_dir == tmp_path / "demo"


def test_methods_that_do_not_go_together_are_refused(tmp_path):
    diffusion = experiments.load("demo", None)[0].methods[1]
    run = experiments.Run("demo", None, tmp_path)

    def make(*methods):
        other = dataclasses.replace(run.experiment, methods=methods)
        return stages.make(other, run.scale, tmp_path)

    other = dataclasses.replace(diffusion, label="other", objective="other.gin")
    with pytest.raises(ValueError, match=r"'diffusion' needs a stage .*n' of other settings"):
        make(diffusion, other)
    with pytest.raises(ValueError, match="several methods named 'diffusion'"):
        make(diffusion, diffusion)
    with pytest.raises(ValueError, match="has 'diffusion'; expected a method's record"):
        make("diffusion")
    with pytest.raises(ValueError, match="adapt_steps = 5, but no start"):
        dataclasses.replace(diffusion, adapt_steps=5)
    with pytest.raises(ValueError, match="kind = 'difusion' is unknown; did you mean 'diffusion'"):
        make(dataclasses.replace(diffusion, kind="difusion"))


def test_the_old_name_of_the_binding_that_loads_an_experiment_gives_the_new_one(tmp_path):
    (tmp_path / "old.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "from diffusion_t5x.experiments import experiment_graph\n"
        "experiment_graph.configured.experiment = @experiment_graph.Experiment()\n"
    )
    with pytest.raises(ValueError, match=r"is now experiment_graph\.load"):
        experiments.load(str(tmp_path / "old.gin"), None)


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
        assert stage.after is None or stage.after in seen
        seen.add(stage.name)
    assert len(seen) == len(run.stages)
    commands = [line for line in run.plan().splitlines() if line.startswith("python -m ")]
    assert len(commands) == len(run.stages)
    for line, stage in zip(commands, run.stages, strict=True):
        assert shlex.split(line)[2] == f"diffusion_t5x.{stage.command}"
        assert shlex.split(line)[3:] == run.argv(stage)


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


def test_a_checkpoint_before_the_first_line_of_metrics_counts_up_to_that_line(tmp_path):
    line = {"step": 100, "split": "train", "seconds": 7.0}
    write_atomically(tmp_path / "metrics.jsonl", json.dumps(line) + "\n")
    assert report._seconds(tmp_path, 50) == report._seconds(tmp_path, 100) == 7.0


def test_what_is_unknown_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ValueError, match="experiment = 'tabel2' is unknown; did you mean 'table2'"):
        experiments.Run("tabel2", None, tmp_path)
    with pytest.raises(ValueError, match="scale = 'embeded' is unknown; did you mean 'embedded'"):
        experiments.Run("table2", "embeded", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.gin was not found"):
        experiments.Run("nowhere.gin", None, tmp_path)
    with pytest.raises(ValueError, match=r"adapt_steps = 'N' is unknown; .*Known: 10K, 100K"):
        experiments.Run("demo", "embedded", tmp_path)


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
