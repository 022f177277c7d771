"""Compiles every training step of the paper's tables for a TPU slice, without having one.

python -m benchmarks.dry_runs --output=runs/dry_runs.jsonl

Needs libtpu (`pip install 'diffusion_t5x[tpu]'`) and minutes per step. Steps differ by network,
objective and lengths. Only shapes matter, so embedded text stands in for the corpora, and
fine-tuning starts from fresh parameters. Layers are scanned. Each step is a JSON line; steps whose
line is in the file are not compiled again. A Markdown table of the file comes last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from benchmarks.compiler import compiled_program
from diffusion_t5x import train
from diffusion_t5x.experiments import __main__ as experiments
from diffusion_t5x.runtime import terminal
from diffusion_t5x.training import dry_run

# Kinds of devices for which the compiler's estimate of time has the size of what is measured.
TIMED = ("TPU v5",)
TABLES = ("table1", "table2", "table3")
HEADER = (
    "network", "objective", "prefix + target", "parameters", "state, GiB", "temporaries, GiB",
    "total, GiB", "all-reduce, GiB", "s per step", "fits",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """The settings that distinguish compiled training steps.

    Attributes:
      model: Gin file of the network.
      objective: Gin file of the objective.
      inputs: Length of the prefix in tokens.
      targets: Length of the target in tokens.
    """

    model: str
    objective: str
    inputs: int
    targets: int

    def argv(self, topology: str) -> list[str]:
        """Returns the arguments of its dry run."""
        files = (self.model, self.objective, "runs/pretrain.gin", "scales/paper_settings.gin")
        lengths = {"inputs": self.inputs, "targets": self.targets}
        return [
            *(f"--gin_file={file}" for file in files),
            "--gin.VOCABULARY_PATH=embedded",
            "--gin.MIXTURE_OR_TASK_NAME=embedded_pretrain_prefix_lm",
            f"--gin.TASK_FEATURE_LENGTHS={lengths}",
            "--gin.config.TransformerConfig.scan_layers=True",
            "--gin.TRAIN_STEPS=1_000_000",
            "--gin.MODEL_DIR=/nowhere",
            "--dry_run",
            f"--topology={topology}",
        ]


def steps() -> list[Step]:
    """Returns the distinct training steps of the tables at the paper's scale, pretraining first."""
    found: dict[Step, bool] = {}
    for name in TABLES:
        for stage in experiments.Run(name, "paper", "runs").stages:
            if stage.command == "train":
                lengths = stage.bindings["TASK_FEATURE_LENGTHS"]
                step = Step(*stage.files[:2], lengths["inputs"], lengths["targets"])
                found[step] = found.get(step, False) or "/pretrain_" in stage.name
    return sorted(found, key=lambda step: not found[step])


def measure(step: Step, topology: str) -> dict[str, Any]:
    """Compiles one step and returns its record."""
    started = time.monotonic()
    try:
        report = train.main(step.argv(topology))
    except dry_run.DoesNotFit as error:
        report = error.report
    sizes = {
        field.name: getattr(report, field.name)
        for field in dataclasses.fields(report)
        if field.name not in ("compiled", "collectives")
    }
    record = {
        **dataclasses.asdict(step),
        "topology": topology,
        "report": sizes,
        "fits": report.fits,
        "all_reduce_bytes": None,
        "seconds": None,
    }
    if report.compiled is not None:
        record["all_reduce_bytes"] = report.collectives.results.get("all-reduce", 0)
        if report.device in TIMED:
            record["seconds"] = compiled_program.estimated_seconds(report.compiled, unknown_trips=1)
    jax.clear_caches()
    return {**record, "wall_seconds": round(time.monotonic() - started)}


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the records of a file; none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def row(record: dict[str, Any]) -> list[Any]:
    """Returns a record's row of the table."""
    report = record["report"]

    def gib(size: int | None) -> str:
        return "–" if size is None else f"{size / dry_run.GIB:.1f}"

    def stem(file: str) -> str:
        return file.split("/", maxsplit=1)[1].removesuffix(".gin")

    seconds = record["seconds"]
    return [
        stem(record["model"]),
        stem(record["objective"]),
        f"{record['inputs']} + {record['targets']}",
        f"{report['parameter_count'] / 1e6:,.0f} M",
        gib(report["parameters"] + report["optimizer"]),
        gib(report["temporaries"]),
        gib(report["total"]),
        gib(record["all_reduce_bytes"]),
        "–" if seconds is None else f"{seconds:.3f}",
        "yes" if record["fits"] else "no",
    ]


def table(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yields a Markdown table for each topology."""
    for topology in dict.fromkeys(record["topology"] for record in records):
        yield f"\n{topology}:\n"
        yield terminal.markdown(
            HEADER, [row(record) for record in records if record["topology"] == topology]
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles the missing steps, then prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5p:4x4x8")
    parser.add_argument("--output", default="runs/dry_runs.jsonl", type=pathlib.Path)
    parser.add_argument("--only", default="", help="part of the model file's name")
    parser.add_argument("--at_most", type=int, help="steps to compile; by default all")
    args = parser.parse_args(argv)
    names = [field.name for field in dataclasses.fields(Step)]
    done = {(*(record[name] for name in names), record["topology"]) for record in read(args.output)}
    missing = [
        step
        for step in steps()
        if (*dataclasses.astuple(step), args.topology) not in done and args.only in step.model
    ]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for step in missing[: args.at_most]:
        record = json.dumps(measure(step, args.topology))
        with args.output.open("a") as file:
            file.write(record + "\n")
        print(record, flush=True)
    print("\n".join(table(read(args.output))))


if __name__ == "__main__":
    main()
