"""One denoising step over many canvases, and what is carried from step to step."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_t5x.decoding.growth import bucket_lengths
from diffusion_t5x.decoding.readout import CanvasReadout, read_canvas
from diffusion_t5x.decoding.updates import Canvas
from diffusion_t5x.interfaces import BoundNetwork

Array = jax.Array


class Rows(NamedTuple):
    """What is known of each canvas; every field has a leading axis of rows.

    Attributes:
      canvas: its tokens.
      readout: what the last step said of it.
      score: `[rows]` float32, in nats; higher is better.
      done: `[rows]` bool; a canvas that is done no longer changes.
      used: `[rows]` int32, positions up to which it is still computed.
      trajectory: `[rows, num_steps + 1, length]` int32, or None.
    """

    canvas: Canvas
    readout: CanvasReadout
    score: Array
    done: Array
    used: Array
    trajectory: Array | None


class State(NamedTuple):
    """What the loop over steps carries.

    Attributes:
      step: scalar int32, steps taken.
      rows: the canvases.
      position_forwards: scalar int32, positions sent through the network per example.
      kept: what an active set keeps of the canvases (see `active_set.Kept`), or None.
    """

    step: Array
    rows: Rows
    position_forwards: Array
    kept: Any = None


def start(noise: Array, num_steps: int, keep_trajectory: bool) -> Rows:
    """Rows before the first step, from canvases `noise [rows, length]` int32."""
    count, length = noise.shape
    unknown = jnp.full((count, length), -jnp.inf)
    nothing = jnp.full((count, length), -1, jnp.int32)
    trajectory = None
    if keep_trajectory:
        trajectory = jnp.zeros((count, num_steps + 1, length), jnp.int32).at[:, 0].set(noise)
    return Rows(
        Canvas(noise, noise, unknown),
        CanvasReadout(nothing, nothing, unknown, unknown, unknown, unknown),
        score=jnp.full(count, -jnp.inf),
        done=jnp.zeros(count, bool),
        used=jnp.full(count, length, jnp.int32),
        trajectory=trajectory,
    )


def windows(rows: Rows, trim_multiple: int) -> tuple[list[int], Array]:
    """Lengths up to which canvases may be read, and which of them holds all that is in use.

    Args:
      rows: the canvases.
      trim_multiple: the lengths are `bucket_lengths` of it; 0 for the whole alone.

    Returns:
      The lengths, and a scalar int32 index into them.
    """
    length = rows.canvas.tokens.shape[1]
    if not 0 < trim_multiple < length:
        return [length], jnp.int32(0)
    lengths = bucket_lengths(length, trim_multiple)
    longest = jnp.max(jnp.where(rows.done, 1, rows.used))
    return lengths, jnp.searchsorted(jnp.array(lengths), longest)


def read_used(
    network: BoundNetwork,
    rows: Rows,
    rng: Array,
    temperature: Array | float,
    *,
    trim_multiple: int,
    block_logits: int,
    keep: bool = False,
) -> tuple[CanvasReadout, Array, Any]:
    """Reads the canvases up to the longest one in use, or the next of `bucket_lengths`.

    Positions that are not read keep what was last said of them. One program is compiled for each
    length that can occur.

    Args:
      network: bound to as many prefixes as there are rows.
      rows: the canvases.
      rng: for the draws.
      temperature: of the draws.
      trim_multiple: 0 reads whole canvases.
      block_logits: see `read_canvas`.
      keep: also return the canvases' keys and values; the network's prefixes must be cached.

    Returns:
      The readout of all positions, how many positions of a row went through the network (scalar
      int32), and the keys and values, as long as the whole canvas; None unless kept.
    """
    tokens = rows.canvas.tokens
    length = tokens.shape[1]
    before = rows.readout._replace(drawn=rows.readout.argmax)

    def read(count: int) -> tuple[CanvasReadout, Array, Any]:
        part = tokens[:, :count]
        if keep:
            hidden, memory = network.cached.forward_keeping(part)
        else:
            hidden, memory = network.forward(part, None), None
        readout = read_canvas(
            hidden,
            network.logits,
            part,
            rng=rng,
            temperature=temperature,
            block_logits=block_logits,
        )
        readout = jax.tree.map(
            lambda new, old: jnp.concatenate([new, old[:, count:]], axis=1), readout, before
        )
        memory = jax.tree.map(lambda x: _pad_positions(x, length - count), memory)
        return readout, jnp.int32(count + network.reread), memory

    counts, index = windows(rows, trim_multiple)
    return jax.lax.switch(index, [functools.partial(read, count) for count in counts])


def _pad_positions(keys: Array, count: int) -> Array:
    """Keys or values `[..., length, heads, head_dim]` with `count` zeros after the last."""
    return jnp.pad(keys, [(0, 0)] * (keys.ndim - 3) + [(0, count), (0, 0), (0, 0)])


def count_used(rows: Rows, argmax: Array) -> Array:
    """Positions before the padding that ends both a canvas and what was made of it: `[rows]`."""
    is_text = (rows.canvas.tokens != 0) | (argmax != 0)
    end = jnp.max(jnp.where(is_text, jnp.arange(1, is_text.shape[1] + 1), 1), axis=1)
    return jnp.minimum(rows.used, end.astype(jnp.int32))


def keep_done(new: Rows, old: Rows) -> Rows:
    """`new`, but `old` for canvases that were done before."""

    def choose(n: Array, o: Array) -> Array:
        return jnp.where(old.done.reshape(-1, *[1] * (n.ndim - 1)), o, n)

    return jax.tree.map(choose, new, old)


def fill_trajectory(rows: Rows, step: Array) -> Rows:
    """The rows with their text as the canvas after step `step` and all later ones."""
    if rows.trajectory is None:
        return rows
    later = jnp.arange(rows.trajectory.shape[1])[:, None] >= step
    return rows._replace(trajectory=jnp.where(later, rows.canvas.text[:, None], rows.trajectory))
