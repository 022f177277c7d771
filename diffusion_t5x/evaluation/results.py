"""Tables of results: JSON for programs, Markdown for documents, rich for terminals."""

from __future__ import annotations

import difflib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_t5x.runtime.files import write_atomically

Row = Mapping[str, Any]


def choose_best(rows: Sequence[Row], metric: str, mode: str) -> dict[str, Any]:
    """The row with the best value of a metric, the earliest where several are; NaN is the worst.

    Args:
      rows: each with 'step', 'task' and 'metrics'.
      metric: 'metric' or 'task/metric'.
      mode: 'max' or 'min'.

    Raises:
      ValueError: if no row has the metric, or several tasks have it and none is named.
    """
    values = {
        (row["step"], row["task"]): row["metrics"].get(metric.rpartition("/")[2])
        for row in rows
        if metric.rpartition("/")[0] in ("", row["task"])
    }
    values = {key: value for key, value in values.items() if value is not None}
    if not values:
        known = sorted({f"{row['task']}/{name}" for row in rows for name in row["metrics"]})
        near = difflib.get_close_matches(metric, known, n=1, cutoff=0.0)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"BEST_METRIC = {metric!r} is unknown; {hint}Known: {', '.join(known)}.")
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


def format_value(value: Any) -> str:
    """Numbers to four significant digits; integers whole; what is missing as a dash."""
    if value is None:
        return "–"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return f"{value:,.0f}" if isinstance(value, (int, float)) else str(value)


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [list(header), ["---"] * len(header)]
    lines += [[format_value(value) for value in row] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def tabulate(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: a row per checkpoint and task, a column per metric, the best marked."""
    rows, best = results["rows"], results["best"]
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    body = []
    for row in rows:
        is_best = best and (row["step"], row["task"]) == (best["step"], best["task"])
        step = f"{row['step']} (best)" if is_best else str(row["step"])
        body.append([step, row["task"], *(row["metrics"].get(name) for name in names)])
    return ["step", "task", *names], body


def write_results(output_dir: str, results: Mapping[str, Any]) -> None:
    """Writes `results.json` and `results.md`, atomically."""
    directory = pathlib.Path(output_dir)
    write_atomically(directory / "results.json", json.dumps(results, indent=1) + "\n")
    write_atomically(directory / "results.md", markdown(*tabulate(results)))


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    """Shows a table on the terminal, or as Markdown where there is none."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)  # names may hold brackets
    if not console.is_terminal:
        print(markdown(header, rows))  # rich would break its lines
        return
    table = Table(*header, title=title or None)
    for row in rows:
        table.add_row(*(format_value(value) for value in row))
    console.print(table)


def print_results(results: Mapping[str, Any]) -> None:
    """Shows the results of an evaluation."""
    print_table(*tabulate(results))
