"""A run's metrics, as JSON lines and TensorBoard events, and the sizes of its parameters."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from diffusion_t5x.runtime.files import read_lines, write_atomically
from diffusion_t5x.runtime.train_state import TrainState, named_leaves

if TYPE_CHECKING:
    from clu.metric_writers import MetricWriter


def write_model_info(model_dir: str, abstract_state: TrainState) -> None:
    """Writes names, shapes and shardings of all parameters to `model-info.txt`.

    Args:
      model_dir: Directory of the run.
      abstract_state: Shapes and shardings of the state.
    """
    if jax.process_index() != 0:
        return
    leaves = named_leaves(abstract_state.params)
    lines = [
        f"{name:<60} {leaf.size:>14,}  {list(leaf.shape)!s:<20} {leaf.sharding.spec}"
        for name, leaf in leaves.items()
    ]
    total = sum(leaf.size for leaf in leaves.values())
    write_atomically(
        pathlib.Path(model_dir) / "model-info.txt",
        "\n".join([*lines, f"{'parameters':<60} {total:>14,}", ""]),
    )


def read_metrics(model_dir: str) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl`."""
    return read_lines(pathlib.Path(model_dir) / "metrics.jsonl")


class MetricLog:
    """A run's `metrics.jsonl` and TensorBoard events; only the first process writes.

    On resume, lines after the restored step are dropped, so that no step is logged twice.

    Attributes:
      lines: The lines of the run so far, of earlier processes too.
      last_step: Step of the last line of training metrics, or the restored step.
    """

    def __init__(self, model_dir: str, restored_step: int, batch_size: int):
        """Opens the log.

        Args:
          model_dir: Directory of the run.
          restored_step: Step that the run starts or resumes from.
          batch_size: Examples per step.
        """
        self._dir = pathlib.Path(model_dir)
        self._batch_size = batch_size
        self._writers: dict[str, MetricWriter] = {}
        self._file = None
        self.lines = [line for line in read_metrics(model_dir) if line["step"] <= restored_step]
        self._seconds = max((line.get("seconds", 0.0) for line in self.lines), default=0.0)
        self.last_step, self._last_seconds = restored_step, self._seconds
        if jax.process_index() == 0:
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            write_atomically(self._dir / "metrics.jsonl", text)
            self._file = open(self._dir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def count(self, seconds: float) -> None:
        """Adds wall seconds spent on training steps."""
        self._seconds += seconds

    def training(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs training metrics averaged since the last such line."""
        rate = (step - self.last_step) / max(self._seconds - self._last_seconds, 1e-9)
        self.last_step, self._last_seconds = step, self._seconds
        self._write(
            step,
            "train",
            {
                **metrics,
                "seconds": self._seconds,
                "steps_per_second": rate,
                "examples_per_second": rate * self._batch_size,
            },
        )

    def evaluation(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Logs the metrics of an evaluation."""
        self._write(step, split, metrics)

    def _write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        self.lines.append({"step": step, "split": split, **metrics})
        if self._file is None:
            return
        self._file.write(json.dumps(self.lines[-1]) + "\n")
        self._file.flush()
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._writer(split).write_scalars(step, finite)

    def _writer(self, split: str) -> MetricWriter:
        if split not in self._writers:
            from clu import metric_writers

            self._writers[split] = metric_writers.SummaryWriter(str(self._dir / split))
        return self._writers[split]

    def close(self) -> None:
        """Writes everything that is buffered."""
        for writer in self._writers.values():
            writer.close()
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
