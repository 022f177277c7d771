"""Update rules: what a denoising step writes into a canvas, given what the network says about it.

Each is an `interfaces.UpdateRule`: a frozen dataclass whose fields gin binds, called with the step,
a key and the noise; it returns the canvases and their scores.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_t5x.interfaces import Canvas, Corruption, Readout, StepView

Array = jax.Array


def canvas_score(readout: Readout) -> Array:
    """Scores canvases by the log-likelihood of their tokens under the readout: `[rows]` in nats.

    This is minus the cross-entropy between the tokens that a step read and the logits that it
    returned, the paper's model score (arXiv 2401.17181, section 4.1).
    """
    return jnp.sum(readout.canvas_log_prob, axis=-1)


def _take(canvas: Canvas, where: Array, tokens: Array, log_prob: Array) -> Canvas:
    """Writes `tokens` at the positions `where`."""
    tokens = jnp.where(where, tokens, canvas.tokens)
    certainty = jnp.where(where, log_prob, canvas.certainty)
    return canvas._replace(tokens=tokens, text=tokens, certainty=certainty)


def _lowest(values: Array, share: float) -> Array:
    """Marks the share of lowest values, at least one, of each row of `values [rows, length]`."""
    rank = jnp.argsort(jnp.argsort(values, axis=-1, stable=True), axis=-1)
    return rank < max(1, round(share * values.shape[1]))


def _check_share(name: str, share: float) -> None:
    if not 0.0 < share <= 1.0:
        raise ValueError(f"{name} = {share}; expected 0 < {name} <= 1.")


@dataclasses.dataclass(frozen=True)
class ResampleAll:
    """Draws every position at each step: the paper's sampler (arXiv 2401.17181, section 4.1)."""

    def __call__(self, step: StepView, rng: Array, corruption: Corruption) -> tuple[Canvas, Array]:
        """Returns the drawn canvas."""
        del rng, corruption
        drawn, certainty = step.readout.drawn, step.readout.drawn_log_prob
        canvas = step.canvas._replace(tokens=drawn, text=drawn, certainty=certainty)
        return canvas, canvas_score(step.readout)


@dataclasses.dataclass(frozen=True)
class ResampleShare:
    """Draws a random share of the positions at each step (SUNDAE, arXiv 2112.06749, section 2.3).

    Fewer positions at a time keep samples diverse at the price of more steps. Positions that were
    never drawn are returned as noise, so `num_steps * share` should be well above 1.

    Attributes:
      share: share of the positions that each step draws.
    """

    share: float = 0.5

    def __post_init__(self):
        _check_share("share", self.share)

    def __call__(self, step: StepView, rng: Array, corruption: Corruption) -> tuple[Canvas, Array]:
        """Returns the canvas with draws at the chosen positions."""
        del corruption
        where = _lowest(jax.random.uniform(rng, step.canvas.tokens.shape), self.share)
        canvas = _take(step.canvas, where, step.readout.drawn, step.readout.drawn_log_prob)
        return canvas, canvas_score(step.readout)


@dataclasses.dataclass(frozen=True)
class ArgmaxUnrolled:
    """Argmax-unrolled decoding after SUNDAE (arXiv 2112.06749, section 2.3).

    The first step writes the argmax everywhere. Each later step rewrites the least certain
    positions with the argmax given the model's own text. Temperature plays no part.

    Attributes:
      uncertain_share: share of the positions that each later step rewrites.
    """

    uncertain_share: float = 0.3

    def __post_init__(self):
        _check_share("uncertain_share", self.uncertain_share)

    def __call__(self, step: StepView, rng: Array, corruption: Corruption) -> tuple[Canvas, Array]:
        """Returns the canvas with the argmax at noisy and at uncertain positions."""
        del rng, corruption
        certainty = step.canvas.certainty
        where = _lowest(certainty, self.uncertain_share) | (certainty == -jnp.inf)
        canvas = _take(step.canvas, where, step.readout.argmax, step.readout.argmax_log_prob)
        return canvas, canvas_score(step.readout)


@dataclasses.dataclass(frozen=True)
class EntropyBound:
    """Accepts draws of low entropy, and gives all other positions fresh noise.

    Accepted are the positions of lowest entropy whose entropies, the largest of them aside, sum to
    at most `bound`, which bounds the cost of drawing them independently (arXiv 2505.24857); fresh
    noise elsewhere keeps the canvas one that the model was trained on. The text, and with it the
    score, is the argmax.

    Attributes:
      bound: in nats.
    """

    bound: float = 0.1

    def __post_init__(self):
        if self.bound < 0:
            raise ValueError(f"bound = {self.bound}; expected a value >= 0, in nats.")

    def __call__(self, step: StepView, rng: Array, corruption: Corruption) -> tuple[Canvas, Array]:
        """Returns the draw at accepted positions, and noise elsewhere."""
        readout = step.readout
        order = jnp.argsort(readout.entropy, axis=-1)
        ascending = jnp.take_along_axis(readout.entropy, order, axis=-1)
        before = jnp.cumsum(ascending, axis=-1) - ascending
        accepted_count = jnp.sum(before <= self.bound, axis=-1, keepdims=True)
        accepted = jnp.argsort(order, axis=-1) < accepted_count
        tokens = jnp.where(accepted, readout.drawn, corruption.prior(rng, readout.drawn.shape))
        certainty = jnp.where(accepted, readout.drawn_log_prob, -jnp.inf)
        canvas = step.canvas._replace(tokens=tokens, text=readout.argmax, certainty=certainty)
        return canvas, jnp.sum(readout.argmax_log_prob, axis=-1)
