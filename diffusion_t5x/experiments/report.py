"""Results of an experiment: tables, a picture and a few samples, read from its stages' files."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

from etils import epath

from diffusion_t5x.experiments.experiment_graph import Experiment, Row, Scale, TaskSettings, rows
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
    "decode_passes_per_example": statistics.mean,
    "decode_steps_per_example": statistics.mean,
    "decode_positions_per_example": statistics.mean,
    "decode_tokens_per_pass": statistics.mean,
    "examples": min,
}
COSTS = tuple(name for name in COLUMNS if name.startswith("decode_"))
# What a curve of quality against cost has on its axis -> in words.
CURVES = {
    "decode_seconds_per_example": "seconds per text",
    "decode_passes_per_example": "forward passes per text",
}
STEPS = "NUM_STEPS"  # the setting along a curve
# What results depend on besides the configuration and the machine.
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "seqio", "babel", "sacrebleu")
Table = tuple[list[str], list[list[Any]]]  # header and body


class Point(NamedTuple):
    """A point of a curve of quality against cost."""

    steps: int | None  # denoising steps at most, where they are set
    values: list[float]  # the task's metric, of each seed
    costs: dict[str, float]


Curves = dict[str, dict[str, list[Point]]]  # task -> label of a curve -> its points


def best_step(validation: epath.Path) -> int | None:
    """Returns the checkpoint that a finished validation chose, or None if it has not finished."""
    best = (resumable.read_object(validation / "results.json") or {}).get("best")
    return best["step"] if best else None


def outcome(stage: Stage, directory: epath.Path) -> str:
    """Returns what a finished stage came to, in a few words."""
    if stage.command == "train":
        last = _training_lines(directory)[-1]
        loss = f", loss {format_value(last['loss'])}" if "loss" in last else ""
        return f"step {last['step']:,}{loss}"
    results = resumable.read_object(directory / "results.json")
    if results is None:
        return "no results"
    if "metric" in (results["best"] or {}):
        best = results["best"]
        return f"step {best['step']:,}, {best['metric']} {format_value(best['value'])}"
    return ", ".join(
        f"{name} {format_value(value)}"
        for row in results["rows"]
        for name, value in row["metrics"].items()
        if name not in COLUMNS
    )


def _training_lines(run: epath.Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(str(run)) if line["split"] == "train"]


def _seconds(run: epath.Path, step: int | None = None) -> float:
    """Returns the seconds that a run trained for, until the last line logged up to `step`."""
    lines = _training_lines(run)
    before = [line["seconds"] for line in lines if step is None or line["step"] <= step]
    return max(before, default=lines[0]["seconds"])  # a checkpoint may precede the first line


def _result(row: Row, task: TaskSettings, root: epath.Path) -> dict[str, Any] | None:
    """Returns what the test of a row and seed measured, or None if it has not finished."""
    results = resumable.read_object(root / row.test(task) / "results.json")
    if results is None:
        return None
    [result] = results["rows"]
    metrics = dict(result["metrics"])
    before = [root / row.base / stage for stage, _ in row.method.pretraining()]
    training = root / row.run(task) / "train"
    return {
        "architecture": row.architecture,
        "size": row.size,
        "pretraining": row.pretraining,
        "method": row.method.name,
        "decoding": row.decoding,
        "task": task.name,
        "seed": row.seed,
        "train_steps": result["step"],
        "train_seconds": sum(map(_seconds, before)) + _seconds(training, result["step"]),
        # Older evaluations counted the seconds alone.
        **{name: metrics.pop(name) for name in COSTS if name in metrics},
        "examples": int(metrics.pop("examples")),
        "metrics": metrics,
    }


def spread(values: Sequence[float]) -> str:
    """Formats 'mean' of one value, 'mean ± standard deviation' of several."""
    mean = format_value(float(statistics.mean(values)))
    if len(values) < 2:
        return mean
    return f"{mean} ± {format_value(float(statistics.stdev(values)))}"


class Report:
    """The results of an experiment's finished stages, as tables, a picture and samples.

    Attributes:
      results: `{'title', 'rows', 'environment'}`; a row for each name, task and seed whose test has
        finished. 'train_steps' and 'train_seconds' are those of the whole chain that led to the
        model: its pretraining, adaptation and fine-tuning up to the chosen checkpoint.
    """

    def __init__(self, experiment: Experiment, scale: Scale, root: epath.Path):
        """Reads what lies below the scale's directory `root`."""
        self._experiment, self._root = experiment, root
        self._rows = list(rows(experiment))
        self._tasks = {role: scale.tasks[role] for role in experiment.tasks}
        # (name, task) -> its rows, one per seed.
        self._groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for name, row in self._rows:
            for role, task in self._tasks.items():
                for seed in range(scale.seeds.get(row.size, 1)):
                    result = _result(dataclasses.replace(row, seed=seed), task, root)
                    if result is not None:
                        group = self._groups.setdefault((name, task.name), [])
                        group.append({"name": name, "role": role, **result})
        self.results = {
            "title": experiment.title,
            "rows": [row for group in self._groups.values() for row in group],
            "environment": {
                "python": platform.python_version(),
                "machine": platform.machine(),
                "cores": os.cpu_count(),
                **{name: metadata.version(name) for name in PACKAGES},
            },
        }

    def _values(self, name: str, task: TaskSettings) -> list[float]:
        """Returns the task's metric, one value per seed whose test has finished."""
        return [row["metrics"][task.metric] for row in self._groups.get((name, task.name), [])]

    def details(self) -> Table:
        """Makes a line per name and task: every metric, cost, number of seeds."""
        groups = self._groups.items()
        names = list(
            dict.fromkeys(m for _, group in groups for row in group for m in row["metrics"])
        )
        body = []
        for (name, task), group in groups:
            metrics = [[row["metrics"][m] for row in group if m in row["metrics"]] for m in names]
            line: list[Any] = [name, task, *(spread(seeds) if seeds else None for seeds in metrics)]
            for column, join in COLUMNS.items():
                values = [row[column] for row in group if column in row]
                line.append(join(values) if values else None)
            body.append([*line, len(group)])
        return ["row", "task", *names, *COLUMNS, "seeds"], body

    def comparison(self) -> Table:
        """Makes a line per row of the table, for each task ours beside the paper's.

        Ours is the task's metric, the mean over seeds with its standard deviation; a test that has
        not run is marked as missing, a number that the paper lacks as a dash.
        """
        header = ["row"]
        for role, task in self._tasks.items():
            header += [f"{role}, {task.metric}", "paper"]
        body = []
        for name, _ in self._rows:
            line: list[Any] = [name]
            for role, task in self._tasks.items():
                values = self._values(name, task)
                published = self._experiment.published.get(name, {}).get(role)
                line += [spread(values) if values else MISSING, published]
            body.append(line)
        return header, body

    def write(self, directory: epath.Path) -> None:
        """Writes `results.json`, `results.md` and `results.png` into `directory`, atomically.

        If a model is decoded in several ways, `cost.png` shows quality against cost.
        """
        write_atomically(directory / "results.json", json.dumps(self.results, indent=1) + "\n")
        parts = [markdown(*self.details())]
        if self._experiment.published:
            parts.insert(0, markdown(*self.comparison()))
        write_atomically(directory / "results.md", "\n".join(parts))
        self._plot(directory / "results.png")
        if curves := self._curves():
            plot_curves(curves, directory / "cost.png")

    def _curves(self) -> Curves:
        """Returns the points of each task's curves, one curve for all that differs in steps alone.

        There are none unless some model is decoded in several ways.
        """
        found: Curves = {}
        for name, row in self._rows:
            settings = dict(self._experiment.decoding[row.decoding])
            steps = settings.pop(STEPS, None)
            model = [part for part in name.split("/") if part != row.decoding]
            model = model or [row.method.shown]
            label = ", ".join([*model, *(f"{key} = {value}" for key, value in settings.items())])
            for role, task in self._tasks.items():
                group = self._groups.get((name, task.name), [])
                if all(set(CURVES) <= set(one) for one in group) and group:
                    curves = found.setdefault(f"{role}, {task.metric}", {})
                    values = self._values(name, task)
                    costs = {cost: statistics.mean(one[cost] for one in group) for cost in CURVES}
                    curves.setdefault(label, []).append(Point(steps, values, costs))
        return found if len(self._experiment.decoding) > 1 else {}

    def _plot(self, path: epath.Path) -> None:
        """Draws a panel per task, a bar per row of the table: the task's metric, and its spread."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        names = [name for name, _ in self._rows]
        size = (2.5 + 3.2 * len(self._tasks), 1.2 + 0.32 * len(names))
        figure, panels = pyplot.subplots(
            1, len(self._tasks), figsize=size, sharey=True, squeeze=False
        )
        for panel, (role, task) in zip(panels[0], self._tasks.items(), strict=True):
            values = [self._values(name, task) for name in names]
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

    def show(self) -> None:
        """Prints the tables, and the first samples of every task beside each other."""
        print_table(*self.details(), title=self._experiment.title)
        if self._experiment.published:
            print_table(*self.comparison(), title="beside the paper")
        for task in self._tasks.values():
            by_name: dict[str, list[dict[str, Any]]] = {}
            for name, row in self._rows:
                directory = self._root / row.test(task) / task.name
                for file in directory.glob("predictions-*.jsonl"):
                    lines = file.read_text().splitlines()[:NUM_SAMPLES]
                    by_name[name] = [json.loads(line) for line in lines]
            if by_name:
                _show_samples(task.name, by_name)


def plot_curves(curves: Curves, path: epath.Path) -> None:
    """Draws quality against each cost: a panel for each task and cost, points labelled by steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (1 + 4.2 * len(CURVES), 3.6 * len(curves))
    figure, panels = pyplot.subplots(len(curves), len(CURVES), figsize=size, squeeze=False)
    for line, (title, lines) in zip(panels, curves.items(), strict=True):
        for panel, (cost, words) in zip(line, CURVES.items(), strict=True):
            for label, unsorted in lines.items():
                points = sorted(unsorted, key=lambda point: point.costs[cost])
                means = [statistics.mean(point.values) for point in points]
                errors = [
                    statistics.stdev(point.values) if len(point.values) > 1 else 0.0
                    for point in points
                ]
                x = [point.costs[cost] for point in points]
                panel.errorbar(x, means, errors, marker="o", capsize=3, label=label)
                for point, mean in zip(points, means, strict=True):
                    text = "" if point.steps is None else str(point.steps)
                    place = (point.costs[cost], mean)
                    panel.annotate(text, place, (4, 4), textcoords="offset points", fontsize=7)
            panel.set(xscale="log", xlabel=words, ylabel=title)
            panel.spines[["top", "right"]].set_visible(False)
        line[0].legend(fontsize=7)
    save_figure(figure, path)


def save_figure(figure: Any, path: epath.Path) -> None:
    """Writes a matplotlib figure, atomically, and closes it."""
    from matplotlib import pyplot

    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, dpi=150)
    pyplot.close(figure)
    write_atomically(path, content.getvalue())


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
