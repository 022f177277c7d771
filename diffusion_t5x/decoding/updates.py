"""Update rules: what a denoising step writes into a canvas, given what the network says of it.

Each is a frozen dataclass with `__call__(canvas, readout, rng, noise) -> Canvas` over rows of
canvases; `noise(rng, shape)` draws fresh random tokens. Fields are bound by gin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_t5x.decoding.readout import CanvasReadout

Array = jax.Array
Noise = Callable[[Array, tuple[int, ...]], Array]


class Canvas(NamedTuple):
    """A canvas between two steps; every field is `[rows, length]`.

    Attributes:
      tokens: what the next step reads, int32.
      text: what would be returned if this were the last step, int32.
      certainty: log-probability of each token under the logits it was taken from; -inf for noise.
    """

    tokens: Array
    text: Array
    certainty: Array


def _take(canvas: Canvas, where: Array, tokens: Array, log_prob: Array) -> Canvas:
    """The canvas with `tokens` at the positions `where`."""
    tokens = jnp.where(where, tokens, canvas.tokens)
    return Canvas(tokens, tokens, jnp.where(where, log_prob, canvas.certainty))


def _count(share: float, length: int) -> int:
    """How many of `length` positions a share is: at least one."""
    return max(1, round(share * length))


def _lowest(values: Array, count: int) -> Array:
    """Where the `count` lowest of each row of `values [rows, length]` are: bool, same shape."""
    rank = jnp.argsort(jnp.argsort(values, axis=-1, stable=True), axis=-1)
    return rank < count


def _check_share(name: str, share: float) -> None:
    if not 0.0 < share <= 1.0:
        raise ValueError(f"{name} = {share}; expected 0 < {name} <= 1.")


@dataclasses.dataclass(frozen=True)
class ResampleAll:
    """Every position takes its draw (the paper's sampler, arXiv 2401.17181, section 3)."""

    renoises: ClassVar[bool] = False

    def __call__(self, canvas: Canvas, readout: CanvasReadout, rng: Array, noise: Noise) -> Canvas:
        """The canvas that was drawn."""
        del canvas, rng, noise
        return Canvas(readout.drawn, readout.drawn, readout.drawn_log_prob)


@dataclasses.dataclass(frozen=True)
class ResampleShare:
    """A random share of positions takes its draw (SUNDAE, arXiv 2112.06749, section 2.3).

    Fewer positions at a time keep samples diverse at the price of more steps. What is still noise
    when the steps are over is returned as it is, so `num_steps * share` should be well above 1.

    Attributes:
      share: of the positions, at each step.
    """

    share: float = 0.5
    renoises: ClassVar[bool] = False

    def __post_init__(self):
        _check_share("share", self.share)

    def __call__(self, canvas: Canvas, readout: CanvasReadout, rng: Array, noise: Noise) -> Canvas:
        """The canvas with the draw at the chosen positions."""
        del noise
        where = _lowest(
            jax.random.uniform(rng, canvas.tokens.shape), _count(self.share, canvas.tokens.shape[1])
        )
        return _take(canvas, where, readout.drawn, readout.drawn_log_prob)


@dataclasses.dataclass(frozen=True)
class ArgmaxUnrolled:
    """SUNDAE's argmax-unrolled decoding (arXiv 2112.06749, section 2.3).

    The first step writes the argmax everywhere. Each later one keeps the tokens of which the
    network was certain when it wrote them, and gives the uncertain ones what it says now that it
    has read its own text. Temperature plays no part.

    Attributes:
      uncertain_share: of the positions, that are written again at each step.
    """

    uncertain_share: float = 0.3
    renoises: ClassVar[bool] = False

    def __post_init__(self):
        _check_share("uncertain_share", self.uncertain_share)

    def __call__(self, canvas: Canvas, readout: CanvasReadout, rng: Array, noise: Noise) -> Canvas:
        """The canvas with the argmax at noisy and at uncertain positions."""
        del rng, noise
        count = _count(self.uncertain_share, canvas.tokens.shape[1])
        where = _lowest(canvas.certainty, count) | (canvas.certainty == -jnp.inf)
        return _take(canvas, where, readout.argmax, readout.argmax_log_prob)


@dataclasses.dataclass(frozen=True)
class EntropyBound:
    """Accepts the draw where the network is sure, and gives all other positions fresh noise.

    Accepted are the positions of lowest entropy whose entropies, the largest of them aside, sum to
    at most `bound`, which bounds what drawing them independently may cost (arXiv 2505.24857);
    renoising the others keeps the canvas one that the model was trained on. The text is the argmax.

    Attributes:
      bound: in nats.
    """

    bound: float = 0.1
    renoises: ClassVar[bool] = True

    def __post_init__(self):
        if self.bound < 0:
            raise ValueError(f"bound = {self.bound}; expected a value >= 0, in nats.")

    def __call__(self, canvas: Canvas, readout: CanvasReadout, rng: Array, noise: Noise) -> Canvas:
        """The draw at accepted positions, noise elsewhere."""
        del canvas
        order = jnp.argsort(readout.entropy, axis=-1)
        ascending = jnp.take_along_axis(readout.entropy, order, axis=-1)
        before = jnp.cumsum(ascending, axis=-1) - ascending
        accepted_count = jnp.sum(before <= self.bound, axis=-1, keepdims=True)
        accepted = jnp.argsort(order, axis=-1) < accepted_count
        tokens = jnp.where(accepted, readout.drawn, noise(rng, readout.drawn.shape))
        certainty = jnp.where(accepted, readout.drawn_log_prob, -jnp.inf)
        return Canvas(tokens, readout.argmax, certainty)
