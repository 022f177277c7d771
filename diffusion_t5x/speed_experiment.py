"""Decoding speed as an experiment: every way of decoding at every length (the paper's figure 3)."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from diffusion_t5x.experiments.experiment_graph import Stage
from diffusion_t5x.experiments.report import MISSING, environment, save_figure
from diffusion_t5x.runtime.files import write_atomically


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A way of decoding: the objective's gin file, and gin bindings beside it."""

    objective: str
    bindings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SpeedScale:
    """How big everything is.

    Attributes:
      model: gin file of the network.
      inputs: tokens of the prefix.
      lengths: tokens to decode.
      batch_size: texts decoded at once.
      repeats: timed decodings of each.
      settings: gin files that follow the run file.
    """

    model: str
    inputs: int
    lengths: tuple[int, ...]
    batch_size: int = 1
    repeats: int = 3
    settings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SpeedExperiment:
    """What is timed.

    Attributes:
      title: what the table shows.
      decodings: name -> way of decoding.
      baseline: name of the one that the others' speed-up is over.
      scales: name of a scale -> how big.
      published: name -> tokens -> the paper's speed-up.
      scale: the scale at which it is run unless another is asked for.
    """

    title: str
    decodings: Mapping[str, Decoding]
    baseline: str
    scales: Mapping[str, SpeedScale]
    published: Mapping[str, Mapping[int, float]] = dataclasses.field(default_factory=dict)
    scale: str = "paper"


def _name(decoding: str, length: int) -> str:
    return f"speed/{decoding}/{length}"


def stages(experiment: SpeedExperiment, scale: SpeedScale, root: pathlib.Path) -> list[Stage]:
    """A stage for every length and way of decoding, under the directory `root`."""
    return [
        Stage(
            _name(name, length),
            "speed",
            (
                scale.model,
                f"objectives/{decoding.objective}.gin",
                "runs/speed.gin",
                *scale.settings,
            ),
            {
                "TASK_FEATURE_LENGTHS": {"inputs": scale.inputs, "targets": length},
                "BATCH_SIZE": scale.batch_size,
                "REPEATS": scale.repeats,
                "OUTPUT_DIR": str(root / _name(name, length)),
                **decoding.bindings,
            },
        )
        for length in scale.lengths
        for name, decoding in experiment.decodings.items()
    ]


def collect(experiment: SpeedExperiment, scale: SpeedScale, root: pathlib.Path) -> dict[str, Any]:
    """`{'title', 'rows', 'environment'}`, with a row for every stage that has finished.

    A row's 'speedup' is the baseline's seconds at the same length over its own; None while the
    baseline is missing.
    """
    measured = {}
    for name in experiment.decodings:
        for length in scale.lengths:
            file = root / _name(name, length) / "results.json"
            if file.exists():
                measured[name, length] = json.loads(file.read_text())
    rows = []
    for (name, length), values in measured.items():
        baseline = measured.get((experiment.baseline, length))
        speedup = baseline["seconds"] / values["seconds"] if baseline else None
        rows.append({"name": name, "length": length, "speedup": speedup, **values})
    return {"title": experiment.title, "rows": rows, "environment": environment()}


def comparison(
    experiment: SpeedExperiment, scale: SpeedScale, results: Mapping[str, Any]
) -> tuple[list[str], list[list[Any]]]:
    """Header and body: seconds and speed-up of every way at every length, beside the paper's."""
    rows = {(row["name"], row["length"]): row for row in results["rows"]}
    body: list[list[Any]] = []
    for length in scale.lengths:
        for name in experiment.decodings:
            row = rows.get((name, length))
            ours = [row["seconds"], row["speedup"]] if row else [MISSING, MISSING]
            body.append([length, name, *ours, experiment.published.get(name, {}).get(length)])
    return ["tokens", "decoding", "seconds", "speed-up", "paper's"], body


def write(
    directory: pathlib.Path,
    experiment: SpeedExperiment,
    scale: SpeedScale,
    results: Mapping[str, Any],
) -> None:
    """Writes `results.json`, `results.md` and `results.png` into `directory`, atomically."""
    write_atomically(directory / "results.json", json.dumps(results, indent=1) + "\n")
    write_atomically(
        directory / "results.md", results.markdown(*comparison(experiment, scale, results))
    )
    plot(experiment, results, directory / "results.png")


def plot(experiment: SpeedExperiment, results: Mapping[str, Any], path: pathlib.Path) -> None:
    """Seconds against tokens, both logarithmic, a line per way of decoding."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(5.5, 3.6))
    for name in experiment.decodings:
        points = [(r["length"], r["seconds"]) for r in results["rows"] if r["name"] == name]
        if points:
            panel.plot(*zip(*points, strict=True), marker="o", label=name)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("tokens decoded")
    panel.set_ylabel("seconds")
    panel.legend(frameon=False, fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def show(
    experiment: SpeedExperiment,
    scale: SpeedScale,
    results: Mapping[str, Any],
    root: pathlib.Path,
) -> None:
    """Prints the table; `root`, the directory of the scale, holds no text to show."""
    del root
    results.print_table(*comparison(experiment, scale, results), title=experiment.title)
