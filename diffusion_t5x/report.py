"""Collects the results of an experiment into a table, a picture and a few samples."""

from __future__ import annotations

import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from diffusion_t5x import tables
from diffusion_t5x.metric_logs import read_metrics, write_atomically

NUM_SAMPLES = 4
COLUMNS = ("train_steps", "train_seconds", "decode_seconds_per_example", "examples")


def collect(
    root: pathlib.Path,
    architectures: Sequence[str],
    tasks: Sequence[str],
    methods: Mapping[str, tuple[str, str]],
) -> dict[str, Any]:
    """Rows of a finished experiment, and what it ran on.

    'train_steps' and 'train_seconds' are those of the whole chain that led to the model: its
    pretraining, adaptation and fine-tuning up to the chosen checkpoint.

    Args:
      root: directory of the experiment.
      architectures: directories under `root`.
      tasks: names.
      methods: method -> (objective, directory of the run it was fine-tuned from).
    """
    rows = []
    for architecture in architectures:
        for task in tasks:
            for method, (_, start) in methods.items():
                run = root / architecture / task / method
                [row] = json.loads((run / "test" / "results.json").read_text())["rows"]
                values = dict(row["metrics"])
                chain = [root / architecture / "pretrain_autoregressive"] * (start == "adapt_N")
                chain += [root / architecture / start]
                rows.append(
                    {
                        "architecture": architecture,
                        "task": task,
                        "method": method,
                        "train_steps": row["step"],
                        "train_seconds": sum(_seconds(path) for path in chain)
                        + _seconds(run / "train", row["step"]),
                        "decode_seconds_per_example": values.pop("decode_seconds_per_example"),
                        "examples": int(values.pop("examples")),
                        "metrics": values,
                    }
                )
    return {"rows": rows, "environment": environment()}


def _seconds(run: pathlib.Path, step: int | None = None) -> float:
    """Seconds that a run trained for, until `step`."""
    lines = [line for line in read_metrics(str(run)) if line["split"] == "train"]
    return max(line["seconds"] for line in lines if step is None or line["step"] <= step)


def environment() -> dict[str, Any]:
    """What results depend on besides the configuration."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "seqio", "babel", "sacrebleu")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        **{name: metadata.version(name) for name in packages},
    }


def _table(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    rows = results["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    header = ["architecture", "task", "method", *names, *COLUMNS]
    body = [
        [row["architecture"], row["task"], row["method"]]
        + [row["metrics"].get(name) for name in names]
        + [row[name] for name in COLUMNS]
        for row in rows
    ]
    return header, body


def write(root: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Writes `results.json`, `results.md` and `results.png` under `root`."""
    write_atomically(root / "results.json", json.dumps(results, indent=1) + "\n")
    write_atomically(root / "results.md", tables.markdown(*_table(results)))
    plot(results, root / "results.png")


def plot(results: Mapping[str, Any], path: pathlib.Path) -> None:
    """A bar per method, a group per task, a panel per architecture: exact match."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["rows"]
    architectures = list(dict.fromkeys(row["architecture"] for row in rows))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, panels = pyplot.subplots(
        1, len(architectures), figsize=(2 + 4 * len(architectures), 3.6), sharey=True, squeeze=False
    )
    for panel, architecture in zip(panels[0], architectures, strict=True):
        for index, method in enumerate(methods):
            heights = {
                row["task"]: row["metrics"]["exact_match"]
                for row in rows
                if (row["architecture"], row["method"]) == (architecture, method)
            }
            places = [place + index / (len(methods) + 1) for place in range(len(tasks))]
            bars = panel.bar(
                places, [heights[task] for task in tasks], 1 / (len(methods) + 1.5), label=method
            )
            panel.bar_label(bars, fmt="%.2f", fontsize=7)
        middle = (len(methods) - 1) / (len(methods) + 1) / 2
        panel.set_xticks([place + middle for place in range(len(tasks))])
        panel.set_xticklabels([task.removeprefix("embedded_") for task in tasks])
        panel.set_title(architecture.replace("_", "-"))
        panel.set_ylim(0, 1.1)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("exact match, test split")
    panels[0][-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=150)
    pyplot.close(figure)
    os.replace(temporary, path)


def show(results: Mapping[str, Any], root: pathlib.Path) -> None:
    """Prints the table, and the first samples of every task beside each other."""
    tables.print_table(*_table(results), title="comparison")
    seen: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in results["rows"]:
        if row["architecture"] == results["rows"][0]["architecture"]:
            run = root / row["architecture"] / row["task"] / row["method"] / "test" / row["task"]
            [file] = run.glob(f"predictions-{row['train_steps']}.jsonl")
            lines = file.read_text(encoding="utf-8").splitlines()[:NUM_SAMPLES]
            seen.setdefault(row["task"], {})[row["method"]] = [json.loads(line) for line in lines]
    for task, by_method in seen.items():
        print(f"\n{task}:")
        for index in range(NUM_SAMPLES):
            first = next(iter(by_method.values()))[index]
            print(f"  input:          {first['inputs']!r}\n  target:         {first['target']!r}")
            for method, records in by_method.items():
                print(f"  {method + ':':<16}{records[index]['prediction']!r}")
