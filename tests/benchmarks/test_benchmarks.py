"""Benchmarks as commands, on networks too small to be measured."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import small_hf_models

from benchmarks import (
    decode_quality,
    document,
    figure3,
    plain_transformer,
    trained_models,
    workloads,
)
from diffusion_t5x import gin_utils
from diffusion_t5x.checkpointing.checkpoints import Checkpointer, SaveCheckpointConfig
from diffusion_t5x.runtime.train_state import INIT_SHAPES, TrainState

CACHED = "objectives/diffusion_cached_prefix.gin"


@pytest.mark.slow
def test_decode_quality_compares_settings_with_the_papers_sampler(tmp_path):
    model = decode_quality.make_model(["models/tiny.gin", CACHED], [])
    params = model.get_initial_variables(jax.random.PRNGKey(0), INIT_SHAPES)["params"]
    checkpointer = Checkpointer(str(tmp_path), SaveCheckpointConfig())
    checkpointer.save(TrainState(jax.numpy.int32(7), params, None))
    checkpointer.close()
    # A process of its own, in which no task has been imported before gin files are read.
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.decode_quality", "--task=translation", "--rounds=1",
         f"--checkpoint={tmp_path}", f"--objective={CACHED}", "--examples=16",
         "--settings", "objective"],
        cwd=gin_utils.config_dir().parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    plain, cached = map(json.loads, run.stdout.splitlines()[-2:])
    assert [line["decoder"] for line in (plain, cached)] == ["plain", "objective"]
    # 10 steps x 8 samples of 24 tokens after 24, by arithmetic.
    assert plain["position_forwards"] == 10 * 8 * (24 + 24)
    assert cached["position_forwards"] == 24 + 10 * 8 * 24
    assert cached["percent"] == plain["percent"]
    assert cached["passes"] == 10 * 8
    for line in (plain, cached):
        assert line["fewer_position_forwards"] == pytest.approx(
            plain["position_forwards"] / line["position_forwards"]
        )
        assert line["speedup"] == pytest.approx(plain["seconds"] / line["seconds"])


def test_the_last_change_of_a_canvas_by_hand():
    one, two, three = [0, 5, 6, 6, 6], [4, 4, 4, 4, 4], [1, 1, 1, 1, 2]
    trajectory = np.array([one, two, three])[..., None]
    np.testing.assert_array_equal(decode_quality.last_changes(trajectory), [2, 0, 4])


@pytest.mark.slow
def test_adapt_compares_recipes_on_a_model_and_does_nothing_twice(tmp_path):
    small_hf_models.write(tmp_path / "model")
    command = [
        sys.executable, "-m", "benchmarks.adapt", f"--model={tmp_path / 'model'}",
        f"--output={tmp_path / 'out'}", "--steps=2", "--batch_size=2", "--texts=2", "--draws=2",
    ]  # fmt: skip
    printed = [
        subprocess.run(
            command, cwd=gin_utils.config_dir().parent, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert printed[0] == printed[1]
    results = json.loads((tmp_path / "out/results.json").read_text())
    methods = {"direct", "AR beside", "scratch"}
    assert results["bits"].keys() > methods
    assert all(bits["bits_per_token"] > 1 for bits in results["bits"].values())
    assert all(len(results[f"train-{name}"]["held_out_loss"]) == 2 for name in methods)
    assert {path.name for path in (tmp_path / "out").iterdir()} > {"results.md", "curves.png"}


def test_a_model_of_blocks_goes_on_from_another_for_as_many_steps(monkeypatch):
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    model_dir = trained_models.adapt_to_blocks("code", "runs/other")
    assert model_dir == "runs/benchmarks/code/diffusion_blocks"
    (command,) = commands
    steps = trained_models.STEPS["code"]
    for argument in (
        "--gin_file=objectives/diffusion_blocks.gin",
        "--gin_file=runs/adapt.gin",
        "--gin.INITIAL_CHECKPOINT_PATH='runs/other'",
        "--gin.BLOCK_LENGTH=16",
        f"--gin.TRAIN_STEPS={2 * steps}",
        f"--gin.optimizers.create_learning_rate_scheduler.step_offset={steps}",
    ):
        assert argument in command


def test_figure3_leaves_the_baseline_out_of_the_longest_work(monkeypatch):
    monkeypatch.setattr(workloads, "our_decoding", lambda model, batch: None)
    monkeypatch.setattr(workloads, "baseline", lambda: pytest.fail("not wanted"))
    rounds = []

    def seconds(functions, count, warm_up):
        rounds.append((count, warm_up))
        return dict.fromkeys(functions, 2.0)

    monkeypatch.setattr(workloads, "interleaved_medians", seconds)
    records = figure3.measure(8, 2048)
    assert rounds == [(1, False)]
    assert {record["baseline"] for record in records} == {"AR"}
    assert [record["ratio"] for record in records] == [1.0] * 4


@pytest.mark.slow
def test_figure3_compares_every_way_with_both_ar_decoders(monkeypatch, capsys, tmp_path):
    shape = workloads.Shape(embed_dim=16, num_heads=2, head_dim=8, num_layers=1, mlp_dim=16)
    monkeypatch.setattr(figure3, "SHAPE", shape)
    monkeypatch.setattr(workloads, "baseline", lambda: plain_transformer)
    blocks = {**figure3.DIFFUSION["blocks, 5 steps"], "block_length": 4}
    monkeypatch.setattr(figure3, "DIFFUSION", {"blocks": blocks})
    plot = tmp_path / "plot.png"
    arguments = ["figure3", "--lengths", "8", "--batch-sizes", "2", f"--plot={plot}"]
    monkeypatch.setattr(sys, "argv", arguments)
    figure3.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    seconds = {line["method"]: line["seconds"] for line in lines}
    assert list(seconds) == ["plain transformer, AR", "AR", "blocks"]
    for line in lines:
        assert line["baseline_seconds"] == seconds["plain transformer, AR"]
        assert line["ratio"] == pytest.approx(line["seconds"] / line["baseline_seconds"])
        assert line["ratio_to_our_ar"] == pytest.approx(line["seconds"] / seconds["AR"])
    assert plot.stat().st_size > 1000


def test_the_document_has_a_place_for_every_table_and_takes_the_new_one():
    text = document.DOCUMENT.read_text(encoding="utf-8")
    for name in document.BENCHMARKS:
        replaced = document.replace_table(text, name, "| new |\n")
        assert f"<!-- benchmarks.{name} -->\n| new |\n<!-- end -->" in replaced
        assert document.replace_table(replaced, name, "| new |\n") == replaced
    with pytest.raises(ValueError, match=r"0 places for the table of benchmarks.nothing"):
        document.replace_table(text, "nothing", "")


def test_records_of_the_same_names_are_a_table():
    records = [
        {"benchmark": "x", "method": "AR", "packed": True, "seconds": 1.23456},
        {"benchmark": "x", "method": "T5X", "baseline_bytes": 2_100_000_000, "bytes_ratio": 0.5},
        {"benchmark": "x", "method": "plain", "packed": False, "seconds": 2.0},
    ]
    assert document.table(records) == (
        "| method | packed | seconds |\n| --- | --- | --- |\n"
        "| AR | True | 1.235 |\n| plain | False | 2 |\n\n"
        "| method | baseline bytes | bytes ratio |\n| --- | --- | --- |\n| T5X | 2.1 GB | 0.5 |\n"
    )


def test_a_benchmark_that_fails_leaves_its_table_and_the_others_are_run(monkeypatch, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(
        "a\n<!-- benchmarks.memory -->\nold\n<!-- end -->\n"
        "<!-- benchmarks.input -->\n<!-- end -->\n"
    )

    def run(name, arguments):
        if name == "memory":
            raise subprocess.CalledProcessError(1, name)
        return [{"benchmark": name, "ratio": 0.5}]

    monkeypatch.setattr(document, "DOCUMENT", path)
    monkeypatch.setattr(document, "run", run)
    monkeypatch.setattr(sys, "argv", ["document", "memory", "input"])
    with pytest.raises(SystemExit) as stopped:
        document.main()
    assert stopped.value.code == 1
    assert path.read_text() == (
        "a\n<!-- benchmarks.memory -->\nold\n<!-- end -->\n"
        "<!-- benchmarks.input -->\n| ratio |\n| --- |\n| 0.5 |\n<!-- end -->\n"
    )


def test_a_benchmark_that_does_not_exist_or_breaks_is_an_error():
    with pytest.raises(subprocess.CalledProcessError, match=r"benchmarks.nothing"):
        document.run("nothing", [])
