"""Ends training when a metric on the validation split no longer improves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_t5x.names import did_you_mean


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """A rule that ends training after a number of evaluations in a row without improvement.

    Attributes:
      metric: 'split/metric' of an evaluation during training, such as 'training_eval/loss' or
        'inference_eval/squad_v1_1/f1'.
      mode: 'min' or 'max', the better direction.
      patience: Number of evaluations in a row without improvement; None never stops.
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
        """Returns True if the last `patience` evaluations are no better than the best before them.

        The decision depends on the lines of `metrics.jsonl` alone, so a resumed run decides as it
        would have.

        Raises:
          ValueError: If there are evaluations but none has the metric.
        """
        if self.patience is None:
            return False
        split, _, name = self.metric.rpartition("/")
        values = [line[name] for line in log if line["split"] == split and name in line]
        evaluations = [line for line in log if line["split"] != "train"]
        if evaluations and not values:
            known = {f"{line['split']}/{key}" for line in evaluations for key in line}
            known -= {f"{line['split']}/{key}" for line in evaluations for key in ("step", "split")}
            raise ValueError(
                f"EarlyStopping.metric = {self.metric!r} is not evaluated; "
                f"{did_you_mean(self.metric, sorted(known))}"
            )
        sign = 1.0 if self.mode == "max" else -1.0
        goodness = [-math.inf if math.isnan(value) else sign * value for value in values]
        if not goodness:
            return False
        return len(goodness) - 1 - goodness.index(max(goodness)) >= self.patience
