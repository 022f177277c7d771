"""Results of an experiment: tables, a picture and a few samples, read from its stages' files."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

from diffusion_t5x.experiments.experiment_graph import (
    Experiment,
    Row,
    Scale,
    TaskSettings,
    rows,
)
from diffusion_t5x.experiments.stages import Stage
from diffusion_t5x.runtime import resumable
from diffusion_t5x.runtime.files import write_atomically
from diffusion_t5x.runtime.terminal import format_value, markdown, print_table
from diffusion_t5x.training.metric_logs import read_metrics

NUM_SAMPLES = 4
MISSING = "missing"
# Columns beside the metrics -> how the seeds of a row are joined.
COLUMNS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "train_steps": statistics.mean,
    "train_seconds": statistics.mean,
    "decode_seconds_per_example": statistics.mean,
    "examples": min,
}


def best_step(validation: pathlib.Path) -> int | None:
    """Returns the checkpoint that a finished validation chose, or None if it has not finished."""
    best = (resumable.read_object(validation / "results.json") or {}).get("best")
    return best["step"] if best else None


def outcome(stage: Stage, directory: pathlib.Path) -> str:
    """Returns what a finished stage came to, in a few words."""
    if stage.command == "train":
        lines = [line for line in read_metrics(str(directory)) if line["split"] == "train"]
        loss = f", loss {format_value(lines[-1]['loss'])}" if "loss" in lines[-1] else ""
        return f"step {lines[-1]['step']:,}{loss}"
    results = resumable.read_object(directory / "results.json")
    if results is None:
        return "no results"
    if "metric" in (results["best"] or {}):
        best = results["best"]
        return f"step {best['step']:,}, {best['metric']} {format_value(best['value'])}"
    shown = [
        f"{name} {format_value(value)}"
        for row in results["rows"]
        for name, value in row["metrics"].items()
        if name not in COLUMNS
    ]
    return ", ".join(shown)


def collect(experiment: Experiment, scale: Scale, root: pathlib.Path) -> dict[str, Any]:
    """Collects the results of finished stages, and the environment.

    'train_steps' and 'train_seconds' are those of the whole chain that led to the model: its
    pretraining, adaptation and fine-tuning up to the chosen checkpoint.

    Args:
      experiment: What is compared.
      scale: How big everything is.
      root: Directory of the scale.

    Returns:
      `{'title', 'rows', 'environment'}`; a row for each name, task and seed whose test has
      finished.
    """
    found = []
    for name, row in rows(experiment):
        for role in experiment.tasks:
            for seed in range(scale.seeds.get(row.size, 1)):
                result = _collect_row(row, scale.tasks[role], seed, root)
                if result is not None:
                    found.append({"name": name, "role": role, **result})
    return {"title": experiment.title, "rows": found, "environment": environment()}


def _collect_row(
    row: Row, task: TaskSettings, seed: int, root: pathlib.Path
) -> dict[str, Any] | None:
    results = resumable.read_object(root / row.test(seed, task) / "results.json")
    if results is None:
        return None
    [result] = results["rows"]
    values = dict(result["metrics"])
    seconds = sum(_seconds(root / name) for name in row.chain(seed))
    return {
        "architecture": row.architecture,
        "size": row.size,
        "pretraining": row.pretraining,
        "method": row.method.name,
        "decoding": row.decoding,
        "task": task.name,
        "seed": seed,
        "train_steps": result["step"],
        "train_seconds": seconds + _seconds(root / row.run(seed, task) / "train", result["step"]),
        "decode_seconds_per_example": values.pop("decode_seconds_per_example"),
        "examples": int(values.pop("examples")),
        "metrics": values,
    }


def _seconds(run: pathlib.Path, step: int | None = None) -> float:
    """Returns the seconds that a run trained for, until the last line logged up to `step`."""
    lines = [line for line in read_metrics(str(run)) if line["split"] == "train"]
    before = [line["seconds"] for line in lines if step is None or line["step"] <= step]
    return max(before, default=lines[0]["seconds"])  # a checkpoint may precede the first line


def environment() -> dict[str, Any]:
    """Returns what results depend on besides the configuration: machine and package versions."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "seqio", "babel", "sacrebleu")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        **{name: metadata.version(name) for name in packages},
    }


def spread(values: Sequence[float]) -> str:
    """Formats 'mean' of one value, 'mean ± standard deviation' of several."""
    mean = format_value(float(statistics.mean(values)))
    if len(values) < 2:
        return mean
    return f"{mean} ± {format_value(float(statistics.stdev(values)))}"


def _groups(results: Mapping[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Returns (name, task) -> its rows, one per seed."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault((row["name"], row["task"]), []).append(row)
    return groups


def details(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Returns header and body: a line per name and task, every metric, cost, number of seeds."""
    names = list(dict.fromkeys(name for row in results["rows"] for name in row["metrics"]))
    body = []
    for (name, task), group in _groups(results).items():
        metrics = [[row["metrics"][m] for row in group if m in row["metrics"]] for m in names]
        line: list[Any] = [name, task, *(spread(values) if values else None for values in metrics)]
        line += [join([row[column] for row in group]) for column, join in COLUMNS.items()]
        body.append([*line, len(group)])
    return ["row", "task", *names, *COLUMNS, "seeds"], body


def comparison(
    experiment: Experiment, scale: Scale, results: Mapping[str, Any]
) -> tuple[list[str], list[list[Any]]]:
    """Returns header and body: a line per row of the table, for each task ours beside the paper's.

    Ours is the task's metric, the mean over seeds with its standard deviation; a test that has not
    run is marked as missing, a number that the paper lacks as a dash.
    """
    header = ["row"]
    for role in experiment.tasks:
        header += [f"{role}, {scale.tasks[role].metric}", "paper"]
    groups = _groups(results)
    body = []
    for name, _ in rows(experiment):
        line: list[Any] = [name]
        for role in experiment.tasks:
            task = scale.tasks[role]
            group = groups.get((name, task.name), [])
            ours = spread([row["metrics"][task.metric] for row in group]) if group else MISSING
            line += [ours, experiment.published.get(name, {}).get(role)]
        body.append(line)
    return header, body


def write(
    directory: pathlib.Path, experiment: Experiment, scale: Scale, results: Mapping[str, Any]
) -> None:
    """Writes `results.json`, `results.md` and `results.png` into `directory`, atomically."""
    write_atomically(directory / "results.json", json.dumps(results, indent=1) + "\n")
    parts = [markdown(*details(results))]
    if experiment.published:
        parts.insert(0, markdown(*comparison(experiment, scale, results)))
    write_atomically(directory / "results.md", "\n".join(parts))
    plot(experiment, scale, results, directory / "results.png")


def plot(
    experiment: Experiment, scale: Scale, results: Mapping[str, Any], path: pathlib.Path
) -> None:
    """Draws a panel per task, a bar per row of the table: the task's metric, and its spread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = _groups(results)
    names = [name for name, _ in rows(experiment)]
    size = (2.5 + 3.2 * len(experiment.tasks), 1.2 + 0.32 * len(names))
    figure, panels = pyplot.subplots(
        1, len(experiment.tasks), figsize=size, sharey=True, squeeze=False
    )
    for panel, role in zip(panels[0], experiment.tasks, strict=True):
        task = scale.tasks[role]
        values = [
            [row["metrics"][task.metric] for row in groups.get((name, task.name), [])]
            for name in names
        ]
        means = [statistics.mean(seeds) if seeds else 0.0 for seeds in values]
        errors = [statistics.stdev(seeds) if len(seeds) > 1 else 0.0 for seeds in values]
        bars = panel.barh(names, means, xerr=errors if any(errors) else None, color="#4c78a8")
        labels = [f"{mean:.3g}" if seeds else MISSING for mean, seeds in zip(means, values)]  # noqa: B905
        panel.bar_label(bars, labels, padding=3, fontsize=8)
        panel.set_title(f"{role}, {task.metric}", fontsize=10)
        panel.set_xlim(0, 1.2 * max([*means, 1e-9]))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].invert_yaxis()
    save_figure(figure, path)


def save_figure(figure: Any, path: pathlib.Path) -> None:
    """Writes a matplotlib figure, atomically, and closes it."""
    from matplotlib import pyplot

    figure.tight_layout()
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=150)
    pyplot.close(figure)
    os.replace(temporary, path)


def show(
    experiment: Experiment, scale: Scale, results: Mapping[str, Any], root: pathlib.Path
) -> None:
    """Prints the tables, and the first samples of every task beside each other."""
    print_table(*details(results), title=experiment.title)
    if experiment.published:
        print_table(*comparison(experiment, scale, results), title="beside the paper")
    for role in experiment.tasks:
        task = scale.tasks[role]
        by_name: dict[str, list[dict[str, Any]]] = {}
        for name, row in rows(experiment):
            directory = root / row.test(0, task) / task.name
            for file in directory.glob("predictions-*.jsonl"):
                lines = file.read_text(encoding="utf-8").splitlines()[:NUM_SAMPLES]
                by_name[name] = [json.loads(line) for line in lines]
        if by_name:
            _show_samples(task.name, by_name)


def _show_samples(task: str, by_name: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    print(f"\n{task}:")
    width = max(map(len, [*by_name, "target"])) + 2
    first = next(iter(by_name.values()))
    for index, record in enumerate(first):
        for what in ("input", "target"):
            text = record["inputs" if what == "input" else what]
            print(f"  {what + ':':<{width}}{text!r}")
        for name, records in by_name.items():
            print(f"  {name + ':':<{width}}{records[index]['prediction']!r}")
