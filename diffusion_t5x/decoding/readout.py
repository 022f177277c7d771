"""What one pass over a canvas says of each of its positions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_t5x.objectives.logits import draw_tokens, first_largest, read_groups
from diffusion_t5x.objectives.losses import read_in_blocks

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
        # Logits are read twice: for the largest, then for sums over groups of tokens. Sums and
        # single logits are kept, never all log-probabilities.
        top = jnp.max(logits, axis=-1)
        sums = functools.partial(_group_sums, top, None if greedy else temperature)
        firsts, totals, weighted, tempered = read_groups(sums, logits)
        first = jnp.min(firsts, axis=-1)
        argmax = jnp.minimum(first, logits.shape[-1] - 1).astype(jnp.int32)
        total = jnp.sum(totals, axis=-1)
        log_total = jnp.log(total)
        drawn = argmax if greedy else draw_tokens(rng, logits, tempered, temperature)

        def log_prob(tokens: Array) -> Array:
            logit = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
            return logit - top - log_total

        entropy = log_total - jnp.sum(weighted, axis=-1) / total
        return CanvasReadout(drawn, argmax, log_prob(drawn), -log_total, log_prob(canvas), entropy)

    return read_in_blocks(read, hidden, logits_fn, canvas, rng, block_logits)


def _group_sums(
    top: Array, temperature: Array | float | None, logits: Array, tokens: Array, inside: Array
) -> tuple[Array, Array, Array, Array | None]:
    """Of a group of tokens: the first that has the largest logit of all, and sums of likelihoods.

    Args:
      top: the largest logit of each position.
      temperature: of the draw, or None.
      logits: `[..., tokens]`; likelihoods are exp(logit - top).
      tokens: int32.
      inside: bool, which of them are of the group.

    Returns:
      The token, float32, or infinity where there is none; sums of likelihoods, of each times its
      logarithm, and of likelihoods at `temperature`.
    """
    missing = logits.ndim - top.ndim
    below = logits - top.reshape(*top.shape, *[1] * missing)

    def total(x: Array) -> Array:
        return jnp.sum(jnp.where(inside, x, 0), axis=-1)

    first = first_largest(below, tokens, inside)
    likelihoods = jnp.exp(below)
    tempered = None if temperature is None else total(jnp.exp(below / temperature))
    return first, total(likelihoods), total(likelihoods * below), tempered
