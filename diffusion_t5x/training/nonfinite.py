"""Records steps with a non-finite loss, gradient or update, and limits how many may be skipped.

`MODEL_DIR/nonfinite/step_{n}.npz` is the batch of such a step, and `skipped.jsonl` has a line for
each skipped update. The lines are written before any checkpoint of a later step, so that a resumed
run counts on from them.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from etils import epath

from diffusion_t5x.runtime.files import LineLog, write_atomically
from diffusion_t5x.training.train_step import Health, NonFiniteError

# Skipped steps whose batches are kept; the batch of the step that stops a run always is.
MAX_DUMPS = 20


class NonFiniteSteps:
    """A record of a run's non-finite steps, which stops the run if there are too many in a row."""

    def __init__(
        self,
        model_dir: str,
        restored_step: int,
        leaf_names: Sequence[str],
        max_skipped: int,
        random_seed: int,
    ):
        """Reads the steps that the run has skipped so far; those after `restored_step` are dropped.

        Args:
          leaf_names: Names of the parameters, in the order of `Health.grad_squares`.
          max_skipped: Number of updates in a row that may be skipped; 0 stops at the first.
          random_seed: Seed of training, kept beside a batch.
        """
        self._dir = epath.Path(model_dir) / "nonfinite"
        self._names, self._max, self._seed = list(leaf_names), max_skipped, random_seed
        self._log = LineLog(self._dir / "skipped.jsonl", restored_step)
        self._skipped = {line["step"] for line in self._log.lines}

    def look_at(self, health: Health, batch: Mapping[str, np.ndarray]) -> None:
        """Waits for a step; if it is not finite, keeps its batch and counts it.

        Args:
          health: The health report of the step.
          batch: This process's rows of its batch, `[rows, length]` each.

        Raises:
          NonFiniteError: If the step is not finite and no further update may be skipped.
        """
        loss, *squares = jax.device_get((health.loss, health.grad_squares, health.update_squares))
        finite = np.isfinite(squares).all(axis=0)  # [leaves]
        bad = [name for name, fine in zip(self._names, finite, strict=True) if not fine]
        loss = float(loss)
        if np.isfinite(loss) and not bad:
            return
        step = int(health.step)
        text = (
            f"step {step}: the loss is {loss} and gradient or update is not finite in "
            f"{len(bad)} of {len(self._names)} leaves: {', '.join(bad) or 'none'}."
        )
        in_a_row = 1
        while step - in_a_row in self._skipped:
            in_a_row += 1
        stops = in_a_row > self._max
        if stops or len(self._skipped) < MAX_DUMPS:
            text += f" Its batch is in {self._dump(step, loss, bad, batch)}."
        if stops:
            many = f" That is {in_a_row} in a row; Trainer.max_skipped_updates = {self._max}."
            raise NonFiniteError(
                f"{text}{many if self._max else ''} Nothing of this step was saved. Lower "
                "the learning rate, or set Trainer.clip_norm."
            )
        self._skipped.add(step)
        self._log.append({"step": step, "loss": str(loss), "leaves": bad})
        self._log.flush()
        if jax.process_index() == 0:
            print(f"{text} The update is skipped, {in_a_row} in a row.", flush=True)

    def skipped_since(self, step: int) -> int:
        """Returns the number of skipped updates after that of `step`."""
        return sum(skipped > step for skipped in self._skipped)

    def _dump(
        self, step: int, loss: float, bad: list[str], batch: Mapping[str, np.ndarray]
    ) -> epath.Path:
        """Writes this process's rows of a batch; returns the file."""
        many = jax.process_count() > 1
        name = f"step_{step}.process_{jax.process_index()}.npz" if many else f"step_{step}.npz"
        content = io.BytesIO()
        facts = {"step": step, "seed": self._seed, "loss": loss, "leaves": bad}
        arrays = {name: np.asarray(value) for name, value in {**batch, **facts}.items()}
        np.savez(content, allow_pickle=False, **arrays)
        write_atomically(self._dir / name, content.getvalue())
        return self._dir / name
