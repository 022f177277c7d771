"""Long texts block by block: each canvas, once denoised, becomes part of the cached prefix.

Every pass reads one block, whatever the length of the text, where whole canvases read all of it;
texts that end early cost what they are long. What is cached stays true, since under the pattern
'causal_prefix' no token of the prefix sees what comes later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_t5x.decoding.growth import FIRST, cache_lengths
from diffusion_t5x.decoding.rerank import Decoded
from diffusion_t5x.interfaces import BoundNetwork
from diffusion_t5x.objectives.text_blocks import count_blocks

Array = jax.Array


class _State(NamedTuple):
    """What the loop over blocks carries.

    Attributes:
      block: scalar int32, blocks written.
      cache: keys and values of the prefixes and of the blocks so far.
      tokens: `[batch, num_blocks * block_length]` int32.
      trajectory: `[batch, num_steps + 1, num_blocks * block_length]` int32, or None.
      scores: `[batch]` float32.
      ended: `[batch]` bool.
      position_forwards: `[batch]` int32.
    """

    block: Array
    cache: Any
    tokens: Array
    trajectory: Array | None
    scores: Array
    ended: Array
    position_forwards: Array


def decode_blocks(
    network: BoundNetwork,
    length: int,
    rng: Array,
    decode_canvas: Callable[[BoundNetwork, Array], Decoded],
    *,
    block_length: int,
    eos_id: int,
) -> Decoded:
    """One text per prefix, of blocks each of which is the best sample of its canvas.

    A text's score is the sum of its blocks'. Decoding ends when every text of the batch has.

    Args:
      network: with cached prefixes, which may grow.
      length: most tokens.
      rng: for all draws.
      decode_canvas: `(network, rng) -> Decoded` of one block, its position-forwards without those
        that read the prefix.
      block_length: tokens per block.
      eos_id: the token that ends a text; blocks after it are padding. A negative one ends none.
    """
    count = count_blocks(length, block_length)
    rngs = jax.random.split(rng, count)
    batch_size = network.batch_size

    def body(state: _State) -> _State:
        decoded = decode_canvas(network.cached.with_cache(state.cache), rngs[state.block])
        best = jnp.where(state.ended[:, None], 0, decoded.tokens[:, -1])
        start = state.block * block_length
        tokens = jax.lax.dynamic_update_slice(state.tokens, best, (0, start))
        trajectory = state.trajectory
        if trajectory is not None:
            steps = jnp.where(state.ended[:, None, None], 0, decoded.trajectory[:, -1])
            trajectory = jax.lax.dynamic_update_slice(trajectory, steps, (0, 0, start))
        ended = state.ended | jnp.any(best == eos_id, axis=1)
        goes_on = (state.block + 1 < count) & ~jnp.all(ended)
        cache = jax.lax.cond(
            goes_on, lambda cache: network.cached.extend(cache, best), lambda c: c, state.cache
        )
        return _State(
            block=state.block + 1,
            cache=cache,
            tokens=tokens,
            trajectory=trajectory,
            scores=state.scores + jnp.where(state.ended, 0.0, decoded.scores[:, -1]),
            ended=ended,
            position_forwards=state.position_forwards
            + decoded.position_forwards
            + jnp.where(goes_on, block_length, 0),
        )

    one = jax.eval_shape(lambda: decode_canvas(network, rng))
    shape = (batch_size, count * block_length)
    trajectory = None
    if one.trajectory is not None:
        trajectory = jnp.zeros((batch_size, one.trajectory.shape[2], shape[1]), jnp.int32)
    state = _State(
        block=jnp.int32(0),
        cache=network.cached.cache,
        tokens=jnp.zeros(shape, jnp.int32),
        trajectory=trajectory,
        scores=jnp.zeros(batch_size),
        ended=jnp.zeros(batch_size, bool),
        position_forwards=jnp.zeros(batch_size, jnp.int32),
    )
    # As for single tokens, a cache with room for the whole text would be read in vain.
    blocks_before = 0
    for blocks in cache_lengths(count, max(1, FIRST // block_length)):
        room = (blocks - blocks_before) * block_length
        state = state._replace(cache=network.cached.grow(state.cache, room))
        state = jax.lax.while_loop(
            lambda state, blocks=blocks: (state.block < blocks) & ~jnp.all(state.ended), body, state
        )
        blocks_before = blocks
    trajectory = state.trajectory
    return Decoded(
        tokens=state.tokens[:, None, :length],
        scores=state.scores[:, None],
        trajectory=None if trajectory is None else trajectory[:, None, :, :length],
        position_forwards=state.position_forwards,
    )
