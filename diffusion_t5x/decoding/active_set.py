"""The active set: the positions of a canvas that a denoising step reads again."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_t5x.decoding.denoising import Rows, State
from diffusion_t5x.decoding.growth import bucket_lengths
from diffusion_t5x.decoding.readout import CanvasReadout, read_canvas
from diffusion_t5x.interfaces import BoundNetwork

Array = jax.Array


class Kept(NamedTuple):
    """What is kept of the canvases between steps.

    Attributes:
      memory: their keys and values; opaque here.
      tokens: `[rows, length]` int32, the tokens that these are of.
    """

    memory: Any
    tokens: Array


@dataclasses.dataclass(frozen=True)
class ActiveSet:
    """Between two passes over whole canvases, steps read only what is not settled.

    A position is settled when the token whose keys and values are kept is the likeliest one, with
    a log-probability of at least `settled_log_prob`, and the canvas still has it. Others see the
    keys and values kept of settled positions, which is approximate, since those no longer follow
    what changes around them. Where a canvas has fewer unsettled positions than others of the
    batch, its least certain settled ones are read as well.

    Attributes:
      refresh_every: steps from one whole pass to the next; 1 reads everything at each step.
      settled_log_prob: in nats, at most 0.
      multiple: how many positions are read is one of `bucket_lengths` of it; one program is
        compiled for each.
    """

    refresh_every: int = 4
    settled_log_prob: float = -0.05
    multiple: int = 8

    def __post_init__(self):
        for name in ("refresh_every", "multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; expected at least 1.")
        if self.settled_log_prob > 0:
            raise ValueError(
                f"settled_log_prob = {self.settled_log_prob}; expected a value <= 0, in nats."
            )

    def unsettled(self, rows: Rows, kept: Kept) -> Array:
        """Which positions in use must be read again: `[rows, length]` bool."""
        tokens, readout = rows.canvas.tokens, rows.readout
        settled = (tokens == kept.tokens) & (tokens == readout.argmax)
        settled &= readout.argmax_log_prob >= self.settled_log_prob
        return ~settled & (jnp.arange(tokens.shape[1]) < rows.used[:, None])


def empty_kept(network: BoundNetwork, tokens: Array) -> Kept:
    """Room for what a whole pass over canvases `tokens [rows, length]` leaves."""
    _, memory = jax.eval_shape(network.cached.forward_keeping, tokens)
    memory = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), memory)
    return Kept(memory, jnp.zeros_like(tokens))


def read_unsettled(
    network: BoundNetwork,
    state: State,
    rng: Array,
    temperature: Array | float,
    *,
    active_set: ActiveSet,
    window: Array,
    block_logits: int,
) -> tuple[CanvasReadout, Array, Kept]:
    """Reads the unsettled positions; the others stay as they were last read.

    Args:
      network: with cached prefixes.
      state: with what a whole pass left in `kept`.
      rng: for the draws.
      temperature: of the draws.
      active_set: what is unsettled, and in which counts it is read.
      window: scalar int32, positions that are still in use in some canvas; the others are not seen.
      block_logits: see `read_canvas`.

    Returns:
      The readout of all positions, how many of a row went through the network (scalar int32), and
      what is kept from now on.
    """
    rows, kept = state.rows, state.kept
    tokens, before = rows.canvas.tokens, rows.readout._replace(drawn=rows.readout.argmax)
    length = tokens.shape[1]
    unsettled = active_set.unsettled(rows, kept)
    index = jnp.arange(length)
    certainty = jnp.where(index < rows.used[:, None], before.argmax_log_prob, jnp.inf)
    order = jnp.argsort(jnp.where(unsettled, -jnp.inf, certainty), axis=1)
    longest = jnp.max(jnp.where(rows.done, 1, jnp.sum(unsettled, axis=1)))
    seen = jnp.broadcast_to(index < window, tokens.shape)
    row = jnp.arange(tokens.shape[0])[:, None]

    def read(count: int) -> tuple[CanvasReadout, Array, Kept]:
        positions = order[:, :count]
        part = jnp.take_along_axis(tokens, positions, axis=1)
        hidden, memory = network.cached.forward_at(kept.memory, part, positions, seen)
        readout = read_canvas(
            hidden,
            network.logits,
            part,
            rng=rng,
            temperature=temperature,
            block_logits=block_logits,
        )
        readout = jax.tree.map(lambda new, old: old.at[row, positions].set(new), readout, before)
        return readout, jnp.int32(count), Kept(memory, kept.tokens.at[row, positions].set(part))

    counts = bucket_lengths(length, active_set.multiple)
    branch = jnp.searchsorted(jnp.array(counts), longest)
    return jax.lax.switch(branch, [functools.partial(read, count) for count in counts])
