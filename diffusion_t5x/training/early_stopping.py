"""Stopping when a metric on the validation split no longer improves."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """Stops training after so many evaluations in a row that were no better than the best.

    Attributes:
      metric: 'split/metric' of an evaluation during training, such as 'training_eval/loss' or
        'inference_eval/squad_v1_1/f1'.
      mode: whether 'min' or 'max' is better.
      patience: evaluations without improvement that are borne; None never stops.
    """

    metric: str = "training_eval/loss"
    mode: str = "min"
    patience: int | None = None

    def __post_init__(self):
        if self.mode not in ("min", "max"):
            raise ValueError(f"EarlyStopping.mode = {self.mode!r}; expected 'min' or 'max'.")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"PATIENCE = {self.patience}; expected at least 1, or None for never.")

    def should_stop(self, log: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the evaluations in a run's log say that it is enough.

        The log is all that is asked, so a run that is started again decides as it would have.

        Args:
          log: lines of `metrics.jsonl`, in order.

        Raises:
          ValueError: if there were evaluations but none has the metric.
        """
        if self.patience is None:
            return False
        split, _, name = self.metric.rpartition("/")
        values = [line[name] for line in log if line["split"] == split and name in line]
        evaluations = [line for line in log if line["split"] != "train"]
        if evaluations and not values:
            known = sorted(
                {f"{line['split']}/{key}" for line in evaluations for key in line}
                - {f"{line['split']}/{key}" for line in evaluations for key in ("step", "split")}
            )
            near = difflib.get_close_matches(self.metric, known, n=1, cutoff=0.0)
            raise ValueError(
                f"EarlyStopping.metric = {self.metric!r} is not evaluated; did you mean "
                f"{near[0]!r}? Known: {', '.join(known)}."
            )
        sign = 1.0 if self.mode == "max" else -1.0
        goodness = [-math.inf if math.isnan(value) else sign * value for value in values]
        if not goodness:
            return False
        return len(goodness) - 1 - goodness.index(max(goodness)) >= self.patience
