"""Cutting a long text into blocks, each a canvas that follows the blocks before it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def count_blocks(length: int, block_length: int) -> int:
    """Returns how many blocks `length` tokens fill, the last one perhaps in part."""
    return -(-length // block_length)


def count_used_blocks(tokens: Array, block_length: int) -> Array:
    """Counts the blocks of `tokens [batch, length]` up to the last with text: `[batch]`, >= 1.

    Token 0 is padding.
    """
    ends = jnp.where(tokens != 0, jnp.arange(1, tokens.shape[1] + 1), 1)  # [batch, length]
    return -(-jnp.max(ends, axis=1) // block_length)


def take_block(x: Array, block: Array, block_length: int) -> Array:
    """Takes block number `block [batch]` of each row of `x [batch, length]`, padded with 0."""
    padding = count_blocks(x.shape[1], block_length) * block_length - x.shape[1]
    index = block[:, None] * block_length + jnp.arange(block_length)  # [batch, block_length]
    return jnp.take_along_axis(jnp.pad(x, ((0, 0), (0, padding))), index, axis=1)
