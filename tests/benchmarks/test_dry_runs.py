"""The dry runs of the paper's tables: which there are, and that what is done is not done again."""

import dataclasses
import json

from benchmarks import dry_runs
from diffusion_t5x import gin_utils
from diffusion_t5x.training import dry_run
from diffusion_t5x.training.collectives import Sent

GIB = dry_run.GIB
REPORT = dry_run.Report(
    device="TPU v5", mesh={"data": 128, "model": 1}, parameter_count=281_562_240,
    parameters=3 * GIB, optimizer=GIB, batch=0, temporaries=8 * GIB, total=12 * GIB,
    limit=95 * GIB, refusal=None, compiled=object(),
    collectives=Sent({"all-reduce": 2 * GIB, "all-gather": 5 * GIB}),
)  # fmt: skip


def test_every_training_of_the_papers_tables_is_there_once_and_pretraining_first():
    steps = dry_runs.steps()
    assert len(set(steps)) == len(steps)
    lengths = {(512, 512), (256, 256), (512, 64), (512, 256)}
    for size in ("base", "large", "xl"):
        for objective in ("autoregressive", "diffusion"):
            model, file = f"models/{size}.gin", f"objectives/{objective}.gin"
            assert {dry_runs.Step(model, file, *pair) for pair in lengths} <= set(steps)
    base = "models/encoder_decoder/base.gin"
    assert dry_runs.Step(base, "objectives/diffusion.gin", 837, 187) in steps
    totals = [step.inputs + step.targets == 1024 for step in steps]
    assert totals == sorted(totals, reverse=True)


def test_every_dry_run_is_a_command_whose_configuration_parses():
    for step in dry_runs.steps():
        flags = step.argv("v5p:4x4x8")
        files = [flag.partition("=")[2] for flag in flags if flag.startswith("--gin_file")]
        bindings = [flag.removeprefix("--gin.") for flag in flags if flag.startswith("--gin.")]
        gin_utils.gin.clear_config()
        gin_utils.parse_config(files, bindings)
        assert flags[-2:] == ["--dry_run", "--topology=v5p:4x4x8"]


def test_what_is_in_the_file_is_not_compiled_again_and_the_table_has_all(
    tmp_path, monkeypatch, capsys
):
    compiled = []

    def compile_for(argv):
        compiled.append(argv)
        if "--gin_file=models/xl.gin" in argv:
            raise dry_run.DoesNotFit(dataclasses.replace(REPORT, total=99 * GIB))
        return REPORT

    monkeypatch.setattr(dry_runs.train, "main", compile_for)
    reads = dry_runs.compiled_program
    monkeypatch.setattr(reads, "estimated_seconds", lambda *args, **kwargs: 0.0321)
    argv = [f"--output={tmp_path}/runs.jsonl"]
    dry_runs.main([*argv, "--at_most=2"])
    dry_runs.main([*argv, "--only=/xl.gin"])
    assert len(compiled) == 2 + 8
    dry_runs.main([*argv, "--only=/xl.gin"])
    assert len(compiled) == 2 + 8
    assert len(dry_runs.read(tmp_path / "runs.jsonl")) == 2 + 8
    lines = capsys.readouterr().out.splitlines()
    records = [json.loads(line) for line in lines if line.startswith("{")]
    assert [record["fits"] for record in records] == [True] * 2 + [False] * 8
    rows = [line.split(" | ") for line in lines[-11:] if line.startswith("| ")]
    assert rows[0][1:] == [
        "diffusion", "512 + 512", "282 M", "4.0", "8.0", "12.0", "2.0", "0.032", "yes |"
    ]  # fmt: skip
    assert rows[2][0] == "| xl"
    assert rows[2][-1] == "no |"
