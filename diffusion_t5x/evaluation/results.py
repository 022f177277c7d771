"""Results of an evaluation: the choice of the best checkpoint, and the files written about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from diffusion_t5x.names import check_known
from diffusion_t5x.runtime import resumable
from diffusion_t5x.runtime.files import write_atomically
from diffusion_t5x.runtime.terminal import markdown

ResultRow = Mapping[str, Any]  # with 'step', 'task' and 'metrics'


def choose_best(rows: Sequence[ResultRow], metric: str, mode: str) -> dict[str, Any]:
    """Chooses the row with the best value of a metric, the earliest of equals; NaN is the worst.

    Args:
      metric: 'metric' or 'task/metric'.
      mode: 'max' or 'min'.

    Returns:
      `{'step', 'task', 'metric', 'value'}`.

    Raises:
      ValueError: if no row has the metric, or several tasks have it and none is named.
    """
    task_name, _, name = metric.rpartition("/")
    values = {
        (row["step"], row["task"]): row["metrics"][name]
        for row in rows
        if task_name in ("", row["task"]) and isinstance(row["metrics"].get(name), int | float)
    }
    if not values:
        known = sorted({f"{row['task']}/{name}" for row in rows for name in row["metrics"]})
        check_known(metric, known, "BEST_METRIC")
    tasks = sorted({task for _, task in values})
    if len(tasks) > 1:
        raise ValueError(
            f"BEST_METRIC = {metric!r} is a metric of {', '.join(tasks)}; name one, as in "
            f"'{tasks[0]}/{metric}'."
        )
    sign = 1 if mode == "max" else -1

    def goodness(key: tuple[int, str]) -> float:
        return -math.inf if math.isnan(values[key]) else sign * values[key]

    step, task = max(sorted(values), key=goodness)
    return {"step": step, "task": task, "metric": metric, "value": values[step, task]}


def tabulate(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Returns header and body: a line per checkpoint and task, of which the best is marked."""
    rows, best = results["rows"], results["best"]
    values = ((name, value) for row in rows for name, value in row["metrics"].items())
    names = list(dict.fromkeys(name for name, value in values if isinstance(value, int | float)))
    body = []
    for row in rows:
        is_best = best and (row["step"], row["task"]) == (best["step"], best["task"])
        step = f"{row['step']} (best)" if is_best else str(row["step"])
        body.append([step, row["task"], *(row["metrics"].get(name) for name in names)])
    return ["step", "task", *names], body


def write_results(directory: epath.Path, results: Mapping[str, Any]) -> None:
    """Writes `results.json` and `results.md`, atomically."""
    resumable.save_object(directory / "results.json", results, indent=1)
    write_atomically(directory / "results.md", markdown(*tabulate(results)))
