"""Keys and values, and the cache of them that a network keeps of the tokens it has read."""

from __future__ import annotations

from typing import TypeAlias, TypeVar

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array
Tree = TypeVar("Tree")


class KeyValues(flax.struct.PyTreeNode):
    """Keys and values of attention in one layer, or in all layers with a leading `layers` axis."""

    keys: Array  # [batch, length, kv_heads, head_dim]
    values: Array  # of the same shape


# Keys and values in all layers of a stack: a list with one entry per layer, or a single entry if
# layers are scanned; None where there are none.
PerLayer: TypeAlias = list[KeyValues | None] | KeyValues | None


class KVCache(flax.struct.PyTreeNode):
    """What a network keeps of the tokens that it has read."""

    key_values: PerLayer  # with `cache_length` positions; None if only the encoder has read any
    visible: Array  # [batch, cache_length] bool; False for the padding before a prefix
    index: Array  # scalar int32, the position of the next token
    last: Array  # [batch, embed], the hidden state of the last token
    # [batch, cache_length, embed], hidden states of all tokens; None unless they are asked for.
    states: Array | None = None
    encoded: PerLayer = None  # of the encoder's output; None without an encoder
    encoded_mask: Array | None = None  # [batch, 1, encoder_length] bool; None without an encoder


def repeat_rows(tree: Tree, repeats: int) -> Tree:
    """Returns a tree of arrays with each row of each array repeated `repeats` times in place."""
    return jax.tree.map(lambda x: jnp.repeat(x, repeats, axis=0), tree)


def repeat(cache: KVCache, repeats: int) -> KVCache:
    """Returns the cache with each row repeated `repeats` times in place."""

    def repeat_key_values(key_values: PerLayer) -> PerLayer:
        # [..., batch, length, heads, head_dim]
        return jax.tree.map(lambda x: jnp.repeat(x, repeats, axis=x.ndim - 4), key_values)

    return cache.replace(
        key_values=repeat_key_values(cache.key_values),
        visible=repeat_rows(cache.visible, repeats),
        last=repeat_rows(cache.last, repeats),
        states=repeat_rows(cache.states, repeats),
        encoded=repeat_key_values(cache.encoded),
        encoded_mask=repeat_rows(cache.encoded_mask, repeats),
    )


def grow(cache: KVCache, room: int) -> KVCache:
    """Returns the cache with room for `room` more tokens."""

    def pad(x: Array) -> Array:
        # [..., length, heads, head_dim]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, room), (0, 0), (0, 0)])

    return cache.replace(
        key_values=jax.tree.map(pad, cache.key_values),
        visible=jnp.pad(cache.visible, [(0, 0), (0, room)], constant_values=True),
    )
