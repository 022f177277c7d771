"""What a run writes about itself: metrics as JSON lines and TensorBoard events, and its sizes."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from diffusion_t5x.runtime.files import read_lines, write_atomically
from diffusion_t5x.runtime.train_state import TrainState, named_leaves


def write_model_info(model_dir: str, abstract_state: TrainState) -> None:
    """Writes names, shapes and shardings of all parameters to `model-info.txt`."""
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
    """The lines of a run's `metrics.jsonl`."""
    return read_lines(pathlib.Path(model_dir) / "metrics.jsonl")


class MetricLog:
    """`metrics.jsonl` and TensorBoard events of a run; only the first process writes.

    A run that goes on from a checkpoint drops what it had logged beyond it, so that every step
    is told of once.

    Attributes:
      lines: what has been logged so far, by all of the run's programs.
    """

    def __init__(self, model_dir: str, restored_step: int, batch_size: int):
        """Opens the log.

        Args:
          model_dir: directory of the run.
          restored_step: step from which the run goes on.
          batch_size: examples per step.
        """
        self._dir = pathlib.Path(model_dir)
        self._batch_size = batch_size
        self._writers: dict[str, Any] = {}
        self._file = None
        self.lines = [line for line in read_metrics(model_dir) if line["step"] <= restored_step]
        self._seconds = max((line.get("seconds", 0.0) for line in self.lines), default=0.0)
        self._last = restored_step, self._seconds
        if jax.process_index() == 0:
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            write_atomically(self._dir / "metrics.jsonl", text)
            self._file = open(self._dir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def count(self, seconds: float) -> None:
        """Counts wall seconds spent on training steps."""
        self._seconds += seconds

    def training(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs training metrics averaged since the last such line."""
        steps, seconds = step - self._last[0], self._seconds - self._last[1]
        self._last = step, self._seconds
        rate = steps / max(seconds, 1e-9)
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
        numbers = {k: v for k, v in metrics.items() if math.isfinite(v)}
        self._writer(split).write_scalars(step, numbers)

    def _writer(self, split: str) -> Any:
        if split not in self._writers:
            from clu import metric_writers

            self._writers[split] = metric_writers.SummaryWriter(str(self._dir / split))
        return self._writers[split]

    def close(self) -> None:
        """Writes what is buffered."""
        for writer in self._writers.values():
            writer.close()
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()
