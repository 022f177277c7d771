"""Reading canvases: one forward pass, and what its logits say about each position."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from diffusion_t5x.decoding.canvases import windows
from diffusion_t5x.decoding.logits_rules import apply_rules
from diffusion_t5x.interfaces import Canvas, LogitsRule, Network, Readout
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
    rules: Sequence[LogitsRule] = (),
) -> tuple[Readout, Array | None, Array]:
    """Reads canvases with a network that is bound to one prefix per row.

    They are read up to the longest one in use, or the next of `canvases.windows`; positions beyond
    keep their last readout. One function is compiled for each length that can occur.

    Returns:
      The readout of all positions, the conditioning of the next pass (see `Canvas.conditioning`),
      and how many positions of a row were read, a scalar int32.
    """
    before = canvas.readout._replace(drawn=canvas.readout.argmax)
    with_margin = before.margin is not None

    def read(count: int) -> tuple[Readout, Array | None, Array]:
        tokens = canvas.tokens[:, :count]
        conditioning = canvas.conditioning
        given: tuple[Array, ...] = ()
        if conditioning is not None:
            given = (conditioning[:, :count],)
        hidden = network.forward(tokens, None, *given)
        if conditioning is not None:
            conditioning = conditioning.at[:, :count].set(network.expect_embedding(hidden))
        readout = read_hidden(
            hidden, network.logits, tokens, rng, temperature, chunk_logits, rules, with_margin
        )
        readout = jax.tree.map(
            lambda new, old: jnp.concatenate([new, old[:, count:]], axis=1), readout, before
        )
        return readout, conditioning, jnp.int32(count)

    lengths, index = windows(canvas, trim_multiple)
    return jax.lax.switch(index, [functools.partial(read, count) for count in lengths])


def read_hidden(
    hidden: Array,
    logits_fn: Callable[[Array], Array],
    tokens: Array,
    rng: Array,
    temperature: Array | float,
    chunk_logits: int,
    rules: Sequence[LogitsRule] = (),
    with_margin: bool = False,
) -> Readout:
    """Reads the logits of every position; see `read_in_chunks` for the other arguments.

    Logits may be -inf, but not all of a position.

    Args:
      tokens: `[rows, length]` int32, the canvas of which `hidden` are the states.
      temperature: of the draw; a Python 0 is the argmax, an array must be positive.
      rules: applied to the logits in order, before the temperature.
      with_margin: also compute `Readout.margin`.
    """
    greedy = isinstance(temperature, int | float) and temperature == 0

    def read(logits: Array, tokens: Array, rng: Array | None) -> Readout:
        # Logits are read twice: for the largest, then for sums over groups of tokens. Sums and
        # single logits are kept, never all log-probabilities.
        vocab_size = logits.shape[-1]
        top = jnp.max(logits, axis=-1)
        sums = functools.partial(_group_sums, top, None if greedy else temperature)
        firsts, totals, tempered, weighted = read_groups(sums, logits)  # [rows, length, groups]
        log_total = jnp.log(jnp.sum(totals, axis=-1))
        ruled = apply_rules(rules, logits, temperature)
        if rules:
            sums = functools.partial(
                _group_sums, jnp.max(ruled, axis=-1), None if greedy else temperature
            )
            firsts, _, tempered, weighted = read_groups(sums, ruled)
        argmax = jnp.minimum(jnp.min(firsts, axis=-1), vocab_size - 1).astype(jnp.int32)

        def log_prob(tokens: Array) -> Array:
            known = jnp.minimum(tokens, vocab_size - 1)[..., None]
            logit = jnp.take_along_axis(logits, known, axis=-1)[..., 0]
            return logit - top - log_total

        drawn, entropy = argmax, jnp.zeros_like(top)
        if not greedy:
            assert rng is not None  # read_in_chunks hands on the key that it was given
            drawn = draw_tokens(rng, ruled, tempered, temperature)
            total = jnp.sum(tempered, axis=-1)
            entropy = jnp.log(total) - jnp.sum(weighted, axis=-1) / total
        argmax_log_prob = log_prob(argmax) if rules else -log_total
        margin = None
        if with_margin:
            others = jnp.where(jnp.arange(vocab_size) == argmax[..., None], -jnp.inf, ruled)
            # Rules may have changed logits; probabilities are the network's own.
            second = jnp.argmax(others, axis=-1)
            left = jnp.max(others, axis=-1) > -jnp.inf
            margin = jnp.exp(argmax_log_prob) - jnp.where(left, jnp.exp(log_prob(second)), 0.0)
        return Readout(
            drawn=drawn,
            argmax=argmax,
            drawn_log_prob=log_prob(drawn),
            argmax_log_prob=argmax_log_prob,
            canvas_log_prob=jnp.where(tokens < vocab_size, log_prob(tokens), -jnp.inf),
            entropy=entropy,
            margin=margin,
        )

    return read_in_chunks(read, hidden, logits_fn, tokens, rng, chunk_logits)


def _group_sums(
    top: Array, temperature: Array | float | None, logits: Array, tokens: Array, inside: Array
) -> tuple[Array, Array, Array | None, Array | None]:
    """Finds a group's first token with the largest logit, and sums the group's likelihoods.

    A likelihood is exp(logit - top), where `top` is the largest logit of the position; the last
    three arguments are those of `read_groups`.

    Returns:
      The token, float32, or infinity where there is none; the sums of likelihoods, of likelihoods
      at `temperature`, and of each of these times its logarithm; no more than two if that is None.
    """
    missing = logits.ndim - top.ndim
    below = logits - top.reshape(*top.shape, *[1] * missing)

    def total(x: Array) -> Array:
        return jnp.sum(jnp.where(inside, x, 0), axis=-1)

    first, likelihoods = first_largest(below, tokens, inside), total(jnp.exp(below))
    if temperature is None:
        return first, likelihoods, None, None
    below = below / temperature
    tempered = jnp.exp(below)
    weighted = jnp.where(tempered > 0, tempered * below, 0.0)  # 0 and not NaN where it is -inf
    return first, likelihoods, total(tempered), total(weighted)
