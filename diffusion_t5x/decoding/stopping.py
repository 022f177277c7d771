"""Stop rules: when a canvas is done before its steps are over.

Each is a frozen dataclass with `__call__(step: Step) -> [rows] bool`. A canvas that is done keeps
the argmax of the step that settled it, and its score; decoding ends when all of a batch are done.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_t5x.decoding.readout import CanvasReadout

Array = jax.Array


class Step(NamedTuple):
    """What a stop rule sees of a step.

    Attributes:
      canvas: `[rows, length]` int32, that the step read.
      readout: what the network said of it.
      previous_argmax: `[rows, length]` int32, of the step before; -1 before the first.
      score: `[rows]`, the canvases' scores, in nats.
      previous_score: `[rows]`, of the step before; -inf before the first.
    """

    canvas: Array
    readout: CanvasReadout
    previous_argmax: Array
    score: Array
    previous_score: Array


@dataclasses.dataclass(frozen=True)
class Unchanged:
    """Done when the likeliest token everywhere is the one that the canvas already has.

    At temperature 0 every further step would write the same canvas, so nothing is lost; above it
    only draws off the argmax could still change it.
    """

    def __call__(self, step: Step) -> Array:
        """Which rows are done."""
        return jnp.all(step.readout.argmax == step.canvas, axis=-1)


@dataclasses.dataclass(frozen=True)
class ScoreSettled:
    """Done when a step has changed the score by at most `tolerance`.

    Attributes:
      tolerance: in nats, of the whole canvas.
    """

    tolerance: float = 0.1

    def __post_init__(self):
        if self.tolerance < 0:
            raise ValueError(f"tolerance = {self.tolerance}; expected a value >= 0, in nats.")

    def __call__(self, step: Step) -> Array:
        """Which rows are done."""
        return jnp.abs(step.score - step.previous_score) <= self.tolerance


@dataclasses.dataclass(frozen=True)
class StableAndConfident:
    """Done when the argmax is that of the step before, at a mean entropy below a bound.

    Attributes:
      max_entropy: mean over the canvas, in nats.
    """

    max_entropy: float = 0.005

    def __post_init__(self):
        if self.max_entropy <= 0:
            raise ValueError(f"max_entropy = {self.max_entropy}; expected a value > 0, in nats.")

    def __call__(self, step: Step) -> Array:
        """Which rows are done."""
        stable = jnp.all(step.readout.argmax == step.previous_argmax, axis=-1)
        return stable & (jnp.mean(step.readout.entropy, axis=-1) < self.max_entropy)
