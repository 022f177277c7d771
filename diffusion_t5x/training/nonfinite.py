"""Steps whose loss, gradient or update is not finite: what they were is kept, and how many may be.

`MODEL_DIR/nonfinite/step_{n}.npz` is the batch of such a step, and `skipped.jsonl` has a line for
each that was skipped. The lines are written before any checkpoint of a later step, so that a run
started again counts on from where it is.
"""

from __future__ import annotations

import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffusion_t5x.runtime.files import read_lines, write_atomically
from diffusion_t5x.training.train_step import Health, NonFiniteError

MAX_DUMPS = 20  # batches of skipped steps kept; that of the step which stops a run always is


class NonFiniteSteps:
    """Looks at each step of a run, and stops or counts those that went wrong."""

    def __init__(
        self,
        model_dir: str,
        restored_step: int,
        leaf_names: Sequence[str],
        max_skipped: int,
        seed: int,
        vocabularies: Mapping[str, Any],
    ):
        """Reads what the run has skipped so far.

        Args:
          model_dir: directory of the run.
          restored_step: step from which the run goes on.
          leaf_names: of the parameters, in the order of `Health.grad_squares`.
          max_skipped: so many updates in a row may be skipped; 0 to stop at the first.
          seed: of the training, for the dump.
          vocabularies: stack ('encoder', 'decoder') -> vocabulary of its tokens; for the dump.
        """
        self._dir = pathlib.Path(model_dir) / "nonfinite"
        self._names, self._max, self._seed = list(leaf_names), max_skipped, seed
        self._vocabularies = vocabularies
        self._log = self._dir / "skipped.jsonl"
        lines = [line for line in read_lines(self._log) if line["step"] <= restored_step]
        self._skipped = {line["step"] for line in lines}
        if self._log.exists() and jax.process_index() == 0:
            write_atomically(self._log, "".join(json.dumps(line) + "\n" for line in lines))

    def look_at(self, health: Health, batch: Mapping[str, np.ndarray]) -> None:
        """Waits for a step; keeps its batch if the step went wrong.

        Args:
          health: of the step.
          batch: this process's rows, `[batch / processes, length]` each.

        Raises:
          NonFiniteError: if the step went wrong, and no update or no further one may be skipped.
        """
        loss, bad = health.not_finite(self._names)
        if np.isfinite(loss) and not bad:
            return
        step = int(health.step)
        what = (
            f"step {step}: the loss is {loss} and gradient or update is not finite in "
            f"{len(bad)} of {len(self._names)} leaves: {', '.join(bad) or 'none'}."
        )
        in_a_row = self._in_a_row_before(step) + 1
        stops = in_a_row > self._max
        file = self._dump(step, loss, bad, batch, always=stops)
        where = f" Its batch is in {file}." if file else ""
        if stops:
            many = f" That is {in_a_row} in a row; Trainer.max_skipped_updates = {self._max}."
            raise NonFiniteError(
                f"{what}{where}{many if self._max else ''} Nothing of this step was saved. Lower "
                "the learning rate, or set Trainer.clip_norm."
            )
        self._skipped.add(step)
        if jax.process_index() == 0:
            print(f"{what}{where} The update is skipped, {in_a_row} in a row.", flush=True)
            self._dir.mkdir(parents=True, exist_ok=True)
            with open(self._log, "a", encoding="utf-8") as log:
                log.write(json.dumps({"step": step, "loss": str(loss), "leaves": bad}) + "\n")

    def _in_a_row_before(self, step: int) -> int:
        first = step - 1
        while first in self._skipped:
            first -= 1
        return step - 1 - first

    def skipped_since(self, step: int) -> int:
        """How many updates after that of `step` were skipped."""
        return sum(skipped > step for skipped in self._skipped)

    def _dump(
        self, step: int, loss: float, bad: list[str], batch: Mapping[str, np.ndarray], always: bool
    ) -> pathlib.Path | None:
        """Writes the batch, as text too where a vocabulary is known; None for enough dumps."""
        many = jax.process_count() > 1
        name = f"step_{step}.process_{jax.process_index()}.npz" if many else f"step_{step}.npz"
        kept = len({path.name.split(".")[0] for path in self._dir.glob("step_*.npz")})
        if kept >= MAX_DUMPS and not always:
            return None
        texts = {
            f"{feature}.text": np.array([_text(row, self._vocabularies[stack]) for row in value])
            for feature, value in batch.items()
            if feature.endswith("_tokens")
            and (stack := feature.partition("_")[0]) in self._vocabularies
        }
        content = io.BytesIO()
        np.savez(
            content, **batch, **texts, step=step, seed=self._seed, loss=loss, leaves=np.array(bad)
        )
        write_atomically(self._dir / name, content.getvalue())
        return self._dir / name


def _text(tokens: np.ndarray, vocabulary: Any) -> str:
    """All that is written in a row, a line for each text packed into it."""
    lines: list[list[int]] = [[]]
    for token in tokens.tolist():
        if token == vocabulary.eos_id:
            lines.append([])
        elif token != 0:
            lines[-1].append(token)
    return "\n".join(vocabulary.decode(line) for line in lines if line)
