"""Stop rules: when a canvas is done before its steps are over.

Each is an `interfaces.StopRule`: a frozen dataclass whose fields gin binds, called with the step
and the scores after it. A canvas that is done keeps the argmax of the step that ended it, and its
score; decoding ends when all canvases of a batch are done.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_t5x.interfaces import StepView

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Unchanged:
    """Done when the likeliest token everywhere is the one that the canvas already has.

    At temperature 0 every further step would write the same canvas, so nothing is lost; above it
    only draws off the argmax could still change it.
    """

    def __call__(self, step: StepView, score: Array) -> Array:
        del score
        return jnp.all(step.readout.argmax == step.canvas.tokens, axis=-1)


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

    def __call__(self, step: StepView, score: Array) -> Array:
        return jnp.abs(score - step.canvas.score) <= self.tolerance


@dataclasses.dataclass(frozen=True)
class StableAndConfident:
    """Done when the argmax is that of the step before and the mean entropy is below a bound.

    Attributes:
      max_entropy: mean over the canvas, in nats.
    """

    max_entropy: float = 0.005

    def __post_init__(self):
        if self.max_entropy <= 0:
            raise ValueError(f"max_entropy = {self.max_entropy}; expected a value > 0, in nats.")

    def __call__(self, step: StepView, score: Array) -> Array:
        del score
        stable = jnp.all(step.readout.argmax == step.canvas.readout.argmax, axis=-1)
        return stable & (jnp.mean(step.readout.entropy, axis=-1) < self.max_entropy)
