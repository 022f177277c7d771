"""Key-value caches, and what both networks read with them."""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from diffusion_t5x.networks.attention import LayerCache, repeat_rows
from diffusion_t5x.networks.config import TransformerConfig
from diffusion_t5x.networks.layers import Memory

Array = jax.Array
# Keys and values of canvases, per layer or with a leading `layers` axis.
CanvasMemory = list[LayerCache] | LayerCache


@flax.struct.dataclass
class DecodeCache:
    """Keys and values of what was read so far.

    Attributes:
      memory: per layer, each `[batch, cache_length, heads, head_dim]`.
      visible: `[batch, cache_length]` bool; padding before a prefix is never seen.
      index: scalar int32, where the next token goes.
      encoded_mask: `[batch, 1, encoder_length]` bool, where there is an encoder.
    """

    memory: list[Memory] | Memory
    visible: Array
    index: Array
    encoded_mask: Array | None = None


def make_cache(
    memory: list[Memory] | Memory,
    visible: Array,
    config: TransformerConfig,
    *,
    room: int,
    repeats: int,
    encoded_mask: Array | None = None,
) -> DecodeCache:
    """A cache from the keys and values of a first pass, with room for more tokens.

    Args:
      memory: keys and values of the tokens read, `[batch, length, heads, head_dim]`.
      visible: `[batch, length]` bool.
      config: the network's configuration.
      room: tokens to come.
      repeats: copies of each row.
      encoded_mask: `[batch, 1, encoder_length]` bool.
    """
    cache = DecodeCache(
        memory=repeat_rows(memory, repeats, 1 if config.scan_layers else 0),
        visible=repeat_rows(visible, repeats),
        index=jnp.int32(visible.shape[1]),
        encoded_mask=repeat_rows(encoded_mask, repeats),
    )
    return grow(cache, room)


def grow(cache: DecodeCache, room: int) -> DecodeCache:
    """The cache with room for `room` tokens more."""

    def pad(x: Array) -> Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, room), (0, 0), (0, 0)])

    def grown(memory: Memory) -> Memory:
        return memory.replace(own=jax.tree.map(pad, memory.own))

    return cache.replace(
        memory=jax.tree.map(grown, cache.memory, is_leaf=lambda x: isinstance(x, Memory)),
        visible=jnp.pad(cache.visible, [(0, 0), (0, room)], constant_values=True),
    )


def append(network: nn.Module, cache: DecodeCache, tokens: Array) -> tuple[DecodeCache, Array]:
    """Reads tokens that follow what was read, each of them seeing none after itself.

    Args:
      network: a bound module with a `token_embedder` and a `decoder`.
      cache: of the tokens so far, with room for these.
      tokens: `[batch, length]` int32.

    Returns:
      The cache with `length` tokens more, and `[batch, length, embed]`.
    """
    length = tokens.shape[1]
    keys = jnp.arange(cache.visible.shape[1])
    queries = cache.index + jnp.arange(length)
    hidden, memory = network.decoder(
        network.token_embedder(tokens, True),
        cache.visible[:, None] & (keys <= queries[:, None]),
        deterministic=True,
        query_positions=queries,
        key_positions=keys,
        encoded_mask=cache.encoded_mask,
        memory=cache.memory,
        index=cache.index,
        keep_memory=True,
    )
    return cache.replace(memory=memory, index=cache.index + length), hidden


def denoise(network: nn.Module, cache: DecodeCache, canvas: Array) -> tuple[Array, CanvasMemory]:
    """Reads canvases that follow cached prefixes, all positions of a canvas seeing each other.

    Args:
      network: a bound module with a `token_embedder` and a `decoder`.
      cache: of `batch` prefixes.
      canvas: `[batch * n, length]` int32, where rows `i * n ... i * n + n - 1` belong to
        prefix `i`.

    Returns:
      `[batch * n, length, embed]`, and the canvases' keys and values.
    """
    seen = jnp.ones(canvas.shape, bool)
    queries = cache.index + jnp.arange(canvas.shape[1])
    return _denoise(network, cache, cache.memory, canvas, queries, seen, None)


def denoise_at(
    network: nn.Module,
    cache: DecodeCache,
    kept: CanvasMemory,
    tokens: Array,
    positions: Array,
    seen: Array,
) -> tuple[Array, CanvasMemory]:
    """Reads some positions of canvases; of the others, the keys and values kept are seen.

    Args:
      network: a bound module with a `token_embedder` and a `decoder`.
      cache: of `batch` prefixes.
      kept: the canvases' keys and values, from an earlier pass.
      tokens: `[batch * n, count]` int32, what the canvases have at `positions`.
      positions: `[batch * n, count]` int32, of the canvas.
      seen: `[batch * n, length]` bool, positions of the canvas that there still are.

    Returns:
      `[batch * n, count, embed]`, and the keys and values with those of `positions` renewed.
    """
    if isinstance(cache.memory, Memory):
        memory = cache.memory.replace(canvas=kept)
    else:
        memory = [m.replace(canvas=k) for m, k in zip(cache.memory, kept, strict=True)]
    return _denoise(network, cache, memory, tokens, cache.index + positions, seen, positions)


def _denoise(
    network: nn.Module,
    cache: DecodeCache,
    memory: list[Memory] | Memory,
    tokens: Array,
    queries: Array,
    seen: Array,
    index: Array | None,
) -> tuple[Array, CanvasMemory]:
    """Tokens at positions `queries` see the prefix and the positions `seen` of their canvas."""
    rows, length = seen.shape
    prefix_index = jnp.arange(cache.visible.shape[1])
    repeats = rows // cache.visible.shape[0]
    visible = repeat_rows(cache.visible & (prefix_index < cache.index), repeats)
    hidden, memory = network.decoder(
        network.token_embedder(tokens, True),
        jnp.concatenate([visible, seen], axis=1)[:, None],
        deterministic=True,
        query_positions=queries,
        key_positions=jnp.concatenate([prefix_index, cache.index + jnp.arange(length)]),
        encoded_mask=repeat_rows(cache.encoded_mask, repeats),
        memory=memory,
        index=index,
        keep_memory=True,
    )
    if isinstance(memory, Memory):
        return hidden, memory.own
    return hidden, [layer.own for layer in memory]
