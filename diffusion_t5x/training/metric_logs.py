"""A run's metrics, as JSON lines and TensorBoard events, and the sizes of its parameters."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from diffusion_t5x import paths
from diffusion_t5x.runtime.files import LineLog, read_lines, write_atomically
from diffusion_t5x.runtime.train_state import TrainState, named_leaves

if TYPE_CHECKING:
    from clu.metric_writers import MetricWriter

COMPILE = "compile"  # the split of lines that say how long programs took to compile


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
        epath.Path(model_dir) / "model-info.txt",
        "\n".join([*lines, f"{'parameters':<60} {total:>14,}", ""]),
    )


def read_metrics(model_dir: str) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl`, but for the seconds of compilation."""
    lines = read_lines(epath.Path(model_dir) / "metrics.jsonl")
    return [line for line in lines if line["split"] != COMPILE]


class MetricLog:
    """A run's `metrics.jsonl` and TensorBoard events; only the first process writes.

    On resume, lines after the restored step are dropped, so that no step is logged twice. In a
    bucket both are written by `flush`, events from a directory of this machine.

    Attributes:
      lines: The lines of the run so far, of earlier processes too.
      last_step: Step of the last line of training metrics, or the restored step.
    """

    def __init__(self, model_dir: str, restored_step: int, batch_size: int):
        """Opens the log of a run from `restored_step` on, of `batch_size` examples per step."""
        self._dir = self._events = epath.Path(model_dir)
        self._batch_size = batch_size
        self._writers: dict[str, MetricWriter] = {}
        self._log = LineLog(self._dir / "metrics.jsonl", restored_step)
        self.lines = self._log.lines
        self._seconds = max((line.get("seconds", 0.0) for line in self.lines), default=0.0)
        self.last_step, self._last_seconds = restored_step, self._seconds
        if paths.is_remote(self._dir):
            self._local = tempfile.TemporaryDirectory(prefix="events-")
            self._events = epath.Path(self._local.name)

    def count(self, seconds: float) -> None:
        """Adds wall seconds spent on training steps."""
        self._seconds += seconds

    def training(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes training metrics averaged since the last such line, and rates."""
        rate = (step - self.last_step) / max(self._seconds - self._last_seconds, 1e-9)
        self.last_step, self._last_seconds = step, self._seconds
        rates = {"steps_per_second": rate, "examples_per_second": rate * self._batch_size}
        self.write(step, "train", {**metrics, "seconds": self._seconds, **rates})

    def compiled(self, step: int, seconds: dict[str, float]) -> None:
        """Writes a line of the seconds that programs took to compile, if any, and empties them."""
        if seconds:
            named = {f"{name.replace(' ', '_')}_seconds": s for name, s in seconds.items()}
            self.write(step, COMPILE, named)
        seconds.clear()

    def write(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        """Writes a line of metrics, JSON values, and the finite numbers to TensorBoard."""
        self._log.append({"step": step, "split": split, **metrics})
        if split != "train":  # of which there are few
            self._log.flush()
        if jax.process_index() != 0:
            return
        if split not in self._writers:
            from clu import metric_writers

            self._writers[split] = metric_writers.SummaryWriter(str(self._events / split))
        numbers = {name: v for name, v in metrics.items() if isinstance(v, int | float)}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        self._writers[split].write_scalars(step, finite)

    def flush(self) -> None:
        """Writes everything so far; to be called before a checkpoint that it belongs to."""
        self._log.flush()
        if self._events == self._dir:
            return
        for split, writer in self._writers.items():
            writer.flush()
            for file in (self._events / split).iterdir():
                write_atomically(self._dir / split / file.name, file.read_bytes())

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.flush()
        for writer in self._writers.values():
            writer.close()
