"""Reading canvases: one forward pass, and what its logits say about each position."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_t5x.decoding.canvases import windows
from diffusion_t5x.interfaces import Canvas, Network, Readout
from diffusion_t5x.objectives.logits import draw_tokens, first_largest, read_groups, read_in_chunks

Array = jax.Array


def read_canvas(
    network: Network,
    canvas: Canvas,
    rng: Array,
    temperature: Array | float,
    *,
    trim_multiple: int,
    chunk_logits: int,
) -> tuple[Readout, Array]:
    """Reads canvases with a network that is bound to one prefix per row.

    They are read up to the longest one in use, or the next of `canvases.windows`; positions beyond
    keep their last readout. One function is compiled for each length that can occur.

    Returns:
      The readout of all positions, and how many positions of a row were read, a scalar int32.
    """
    before = canvas.readout._replace(drawn=canvas.readout.argmax)

    def read(count: int) -> tuple[Readout, Array]:
        tokens = canvas.tokens[:, :count]
        hidden = network.forward(tokens, None)
        readout = read_hidden(hidden, network.logits, tokens, rng, temperature, chunk_logits)
        readout = jax.tree.map(
            lambda new, old: jnp.concatenate([new, old[:, count:]], axis=1), readout, before
        )
        return readout, jnp.int32(count)

    lengths, index = windows(canvas, trim_multiple)
    return jax.lax.switch(index, [functools.partial(read, count) for count in lengths])


def read_hidden(
    hidden: Array,
    logits_fn: Callable[[Array], Array],
    tokens: Array,
    rng: Array,
    temperature: Array | float,
    chunk_logits: int,
) -> Readout:
    """Reads the logits of every position once; see `read_in_chunks` for the other arguments.

    Args:
      tokens: `[rows, length]` int32, the canvas of which `hidden` are the states.
      temperature: of the draw; a Python 0 is the argmax, an array must be positive.
    """
    greedy = isinstance(temperature, int | float) and temperature == 0

    def read(logits: Array, tokens: Array, rng: Array | None) -> Readout:
        # Logits are read twice: for the largest, then for sums over groups of tokens. Sums and
        # single logits are kept, never all log-probabilities.
        top = jnp.max(logits, axis=-1)
        sums = functools.partial(_group_sums, top, None if greedy else temperature)
        firsts, totals, weighted, tempered = read_groups(sums, logits)  # [rows, length, groups]
        first = jnp.min(firsts, axis=-1)
        argmax = jnp.minimum(first, logits.shape[-1] - 1).astype(jnp.int32)
        total = jnp.sum(totals, axis=-1)
        log_total = jnp.log(total)
        drawn = argmax
        if not greedy:
            assert rng is not None  # read_in_chunks hands on the key that it was given
            drawn = draw_tokens(rng, logits, tempered, temperature)

        def log_prob(tokens: Array) -> Array:
            logit = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
            return logit - top - log_total

        entropy = log_total - jnp.sum(weighted, axis=-1) / total
        return Readout(drawn, argmax, log_prob(drawn), -log_total, log_prob(tokens), entropy)

    return read_in_chunks(read, hidden, logits_fn, tokens, rng, chunk_logits)


def _group_sums(
    top: Array, temperature: Array | float | None, logits: Array, tokens: Array, inside: Array
) -> tuple[Array, Array, Array, Array | None]:
    """Finds a group's first token with the largest logit, and sums the group's likelihoods.

    A likelihood is exp(logit - top), where `top` is the largest logit of the position; the last
    three arguments are those of `read_groups`.

    Returns:
      The token, float32, or infinity where there is none; the sums of likelihoods, of each times
      its logarithm, and of likelihoods at `temperature`, unless that is None.
    """
    missing = logits.ndim - top.ndim
    below = logits - top.reshape(*top.shape, *[1] * missing)

    def total(x: Array) -> Array:
        return jnp.sum(jnp.where(inside, x, 0), axis=-1)

    first = first_largest(below, tokens, inside)
    likelihoods = jnp.exp(below)
    tempered = None if temperature is None else total(jnp.exp(below / temperature))
    return first, total(likelihoods), total(likelihoods * below), tempered
