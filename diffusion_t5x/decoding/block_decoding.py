"""Decoding long texts block by block: each finished canvas becomes part of the cached prefix.

A pass reads one block, whatever the length of the text, where a single canvas is read as a whole;
a text that ends early costs what it is long. The cache stays valid, since under the pattern
'causal_prefix' no token of the prefix sees a later one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_t5x.decoding.canvases import last_given
from diffusion_t5x.decoding.lengths import FIRST, cache_lengths
from diffusion_t5x.interfaces import CachedNetwork, Decoded, Fixed, KVCache, Network
from diffusion_t5x.objectives.text_blocks import count_blocks

Array = jax.Array


class _State(NamedTuple):
    """What the loop over blocks carries."""

    block: Array  # scalar int32, blocks written
    cache: KVCache  # keys and values of the prefixes and of the blocks so far
    tokens: Array  # [batch, num_blocks * block_length] int32
    trajectory: Array | None  # [batch, num_steps + 1, num_blocks * block_length] int32
    scores: Array  # [batch] float32
    ended: Array  # [batch] bool
    passes: Array  # [batch] int32
    positions: Array  # [batch] int32
    steps: Array  # [batch] int32


def decode_blocks(
    network: CachedNetwork,
    length: int,
    rng: Array,
    decode_canvas: Callable[[Network, Array, Fixed | None], Decoded],
    *,
    block_length: int,
    eos_id: int,
    fixed: Fixed | None = None,
) -> Decoded:
    """Decodes one text per prefix, each of its blocks the best sample of its canvas.

    The score of a text is the sum of its blocks' scores. Decoding ends when every text of the batch
    has ended.

    Args:
      network: has cached prefixes that may grow.
      length: most tokens.
      rng: key for all draws.
      decode_canvas: maps `(network, rng, fixed)` to the `Decoded` samples of one block.
      block_length: tokens per block.
      eos_id: the token that ends a text; blocks after it are padding. A negative one ends none.
      fixed: positions that are given; no text ends before the last of them that is not padding.
    """
    count = count_blocks(length, block_length)
    last_fixed: Array = jnp.int32(0)  # the block before whose end no text ends
    if fixed is not None:
        last_fixed = last_given(fixed) // block_length
        padding = ((0, 0), (0, count * block_length - length))
        fixed = jax.tree.map(lambda x: jnp.pad(x, padding), fixed)

    def fixed_of(block: Array) -> Fixed | None:
        return jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, block * block_length, block_length, 1), fixed
        )

    rngs = jax.random.split(rng, count)

    def write_block(state: _State) -> _State:
        decoded = decode_canvas(
            network.with_cache(state.cache), rngs[state.block], fixed_of(state.block)
        )
        best = jnp.where(state.ended[:, None], 0, decoded.tokens[:, -1])
        start = state.block * block_length
        tokens = jax.lax.dynamic_update_slice(state.tokens, best, (0, start))
        trajectory = state.trajectory
        if trajectory is not None and decoded.trajectory is not None:
            steps = jnp.where(state.ended[:, None, None], 0, decoded.trajectory[:, -1])
            trajectory = jax.lax.dynamic_update_slice(trajectory, steps, (0, 0, start))
        ended = state.ended | (jnp.any(best == eos_id, axis=1) & (state.block >= last_fixed))
        counts = decoded.passes, decoded.positions, decoded.steps
        passes, positions, taken = (0 if x is None else x for x in counts)
        another = (state.block + 1 < count) & ~jnp.all(ended)
        cache = jax.lax.cond(
            another, lambda cache: network.append_tokens(cache, best), lambda c: c, state.cache
        )
        return _State(
            block=state.block + 1,
            cache=cache,
            tokens=tokens,
            trajectory=trajectory,
            scores=state.scores + jnp.where(state.ended, 0.0, decoded.scores[:, -1]),
            ended=ended,
            passes=state.passes + passes,
            positions=state.positions + positions + jnp.where(another, block_length, 0),
            steps=state.steps + taken,
        )

    block = jax.eval_shape(lambda: decode_canvas(network, rng, fixed_of(jnp.int32(0))))
    state = _start(network, block, count)
    # The cache grows with the text: one with room for all of it would be attended to in full.
    blocks_before = 0
    for blocks in cache_lengths(count, max(1, FIRST // block_length)):
        room = (blocks - blocks_before) * block_length
        state = state._replace(cache=network.add_room(state.cache, room))

        def unfinished(state: _State, blocks: int = blocks) -> Array:
            return (state.block < blocks) & ~jnp.all(state.ended)

        state = jax.lax.while_loop(unfinished, write_block, state)
        blocks_before = blocks
    trajectory = state.trajectory
    return Decoded(
        tokens=state.tokens[:, None, :length],
        scores=state.scores[:, None],
        trajectory=None if trajectory is None else trajectory[:, None, :, :length],
        passes=state.passes,
        positions=state.positions,
        steps=state.steps,
    )


def _start(network: CachedNetwork, block: Decoded, count: int) -> _State:
    """Returns the state before the first of `count` blocks; `block` has the shapes of one."""
    batch_size, (*_, block_length) = network.batch_size, block.tokens.shape
    length = count * block_length
    trajectory = None
    if block.trajectory is not None:
        trajectory = jnp.zeros((batch_size, block.trajectory.shape[2], length), jnp.int32)
    return _State(
        block=jnp.int32(0),
        cache=network.cache,
        tokens=jnp.zeros((batch_size, length), jnp.int32),
        trajectory=trajectory,
        scores=jnp.zeros(batch_size),
        ended=jnp.zeros(batch_size, bool),
        passes=jnp.zeros(batch_size, jnp.int32),
        positions=jnp.zeros(batch_size, jnp.int32),
        steps=jnp.zeros(batch_size, jnp.int32),
    )
