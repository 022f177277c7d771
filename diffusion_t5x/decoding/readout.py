"""What one pass over a canvas says of each of its positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_t5x.losses import read_in_blocks

Array = jax.Array


class CanvasReadout(NamedTuple):
    """Every field is `[rows, length]`; probabilities are the network's own, at temperature 1.

    Attributes:
      drawn: a draw from softmax(logits / temperature), int32; the argmax at temperature 0.
      argmax: the likeliest token, int32.
      drawn_log_prob: log-probability of `drawn`, in nats.
      argmax_log_prob: log-probability of `argmax`, in nats.
      canvas_log_prob: log-probability of the token that the canvas has there, in nats.
      entropy: of the distribution, in nats.
    """

    drawn: Array
    argmax: Array
    drawn_log_prob: Array
    argmax_log_prob: Array
    canvas_log_prob: Array
    entropy: Array


def read_canvas(
    hidden: Array,
    logits_fn: Callable[[Array], Array],
    canvas: Array,
    *,
    rng: Array,
    temperature: Array | float,
    block_logits: int,
) -> CanvasReadout:
    """Reads every position once.

    Args:
      hidden: `[rows, length, embed]`, of a pass over `canvas`.
      logits_fn: `hidden [..., embed] -> logits [..., vocab]`.
      canvas: `[rows, length]` int32.
      rng: for the draw.
      temperature: of the draw; a Python 0 is the argmax, an array must be positive.
      block_logits: logits per canvas that may be alive at once.
    """
    greedy = isinstance(temperature, int | float) and temperature == 0

    def read(logits: Array, canvas: Array, rng: Array) -> CanvasReadout:
        # Sums over the vocabulary and single logits are kept, never all log-probabilities.
        top = jnp.max(logits, axis=-1)
        below = logits - top[..., None]
        total = jnp.sum(jnp.exp(below), axis=-1)
        log_total = jnp.log(total)
        argmax = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        drawn = argmax
        if not greedy:
            drawn = jax.random.categorical(rng, logits / temperature, axis=-1).astype(jnp.int32)

        def log_prob(tokens: Array) -> Array:
            logit = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
            return logit - top - log_total

        entropy = log_total - jnp.sum(jnp.exp(below) * below, axis=-1) / total
        return CanvasReadout(drawn, argmax, log_prob(drawn), -log_total, log_prob(canvas), entropy)

    return read_in_blocks(read, hidden, logits_fn, canvas, rng, block_logits)
