"""The decoder-only network: one stack reads `[prefix; target]`."""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from diffusion_t5x.networks.attention import (
    AUTOREGRESSIVE_PATTERNS,
    check_shares_prefix,
    make_mask,
    repeat_rows,
)
from diffusion_t5x.networks.config import TransformerConfig
from diffusion_t5x.networks.layers import Memory, Stack, TokenEmbedding
from diffusion_t5x.networks.layout import Prefix, merge, read_prefix, start_texts, take_targets

Array = jax.Array


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
    return grow_cache(cache, room)


def grow_cache(cache: DecodeCache, room: int) -> DecodeCache:
    """The cache with room for `room` tokens more."""

    def pad(x: Array) -> Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, room), (0, 0), (0, 0)])

    def grown(memory: Memory) -> Memory:
        return memory.replace(own=jax.tree.map(pad, memory.own))

    return cache.replace(
        memory=jax.tree.map(grown, cache.memory, is_leaf=lambda x: isinstance(x, Memory)),
        visible=jnp.pad(cache.visible, [(0, 0), (0, room)], constant_values=True),
    )


class DecoderOnly(nn.Module):
    """A single stack over `[prefix; target]` whose hidden states are those of the target.

    Attributes:
      config: shape and numerics.
    """

    config: TransformerConfig

    def setup(self):
        self.token_embedder = TokenEmbedding(self.config)
        self.decoder = Stack(self.config, self.config.num_layers, self.config.decoder_buckets)

    def __call__(self, prefix: Array, target: Array, attention_pattern: str) -> Array:
        """Encodes and decodes without dropout: what initialisation runs."""
        context = self.encode(prefix, deterministic=True)
        hidden = self.decode(context, target, attention_pattern, deterministic=True)
        return self.logits(hidden)

    def encode(
        self, tokens: Array, segment_ids: Array | None = None, *, deterministic: bool
    ) -> Prefix:
        """The prefix, laid out; this network reads it together with the target.

        Args:
          tokens: `[batch, prefix_length]` int32.
          segment_ids: `[batch, prefix_length]`, where rows are packed.
          deterministic: unused here.
        """
        del deterministic
        return read_prefix(tokens, segment_ids, start=self.config.start_token)

    def decode(
        self,
        prefix: Prefix,
        target: Array,
        attention_pattern: str,
        segment_ids: Array | None = None,
        *,
        deterministic: bool,
    ) -> Array:
        """Hidden states of the target positions: `[batch, length, embed]`.

        Args:
          prefix: from `encode`.
          target: `[batch, length]` int32, target tokens or canvas.
          attention_pattern: one of `attention.ATTENTION_PATTERNS`. Under an autoregressive one the
            state returned at a position is that of the token before it, which predicts it.
          segment_ids: `[batch, length]`, where rows are packed.
          deterministic: no dropout.
        """
        causal = attention_pattern in AUTOREGRESSIVE_PATTERNS
        row = merge(prefix, target, segment_ids)
        started = prefix.packed and self.config.start_token
        if started:
            if not causal:
                raise ValueError(
                    "TransformerConfig.start_token = True: packed rows have no room for it under "
                    f"{attention_pattern!r} attention; set PACK = False."
                )
            row = start_texts(row)
        mask = make_mask(attention_pattern, row.segment_ids, row.is_prefix)
        positions = jnp.arange(row.tokens.shape[1])
        hidden, _ = self.decoder(
            self.token_embedder(row.tokens, deterministic),
            mask,
            deterministic=deterministic,
            query_positions=positions,
            key_positions=positions,
        )
        return take_targets(hidden, row, target.shape[1], before=causal and not started)

    def cache_prefix(self, prefix: Prefix, attention_pattern: str) -> DecodeCache:
        """Keys and values of the prefix, which every canvas may share.

        Args:
          prefix: from `encode`, not packed.
          attention_pattern: 'cached_prefix'.

        Raises:
          ValueError: if the prefix sees the canvas under this pattern.
        """
        check_shares_prefix(attention_pattern)
        cache, _ = self.prefill(prefix, attention_pattern, 0, 1)
        return cache

    def denoise(self, cache: DecodeCache, canvas: Array, attention_pattern: str) -> Array:
        """What `decode` returns, from a cached prefix.

        Args:
          cache: from `cache_prefix`, of `batch` prefixes.
          canvas: `[batch * n, length]` int32, where rows `i * n ... i * n + n - 1` belong to
            prefix `i`.
          attention_pattern: that of the cache.

        Returns:
          `[batch * n, length, embed]`.
        """
        read, length = cache.visible.shape[1], canvas.shape[1]
        visible = repeat_rows(cache.visible, canvas.shape[0] // cache.visible.shape[0])
        keys = jnp.arange(read + length)
        hidden, _ = self.decoder(
            self.token_embedder(canvas, True),
            jnp.pad(visible, [(0, 0), (0, length)], constant_values=True)[:, None],
            deterministic=True,
            query_positions=keys[read:],
            key_positions=keys,
            memory=cache.memory,
        )
        return hidden

    def prefill(
        self, prefix: Prefix, attention_pattern: str, max_length: int, repeats: int
    ) -> tuple[DecodeCache, Array]:
        """Reads the prefix in one pass.

        Args:
          prefix: from `encode`, not packed.
          attention_pattern: one under which the prefix does not see the target.
          max_length: target tokens to come.
          repeats: copies of each row.

        Returns:
          The cache, and `[batch * repeats, embed]`, which predicts the first target token.
        """
        length = prefix.tokens.shape[1]
        positions = jnp.arange(length)
        is_prefix = jnp.ones_like(prefix.tokens, bool)
        hidden, memory = self.decoder(
            self.token_embedder(prefix.tokens, True),
            make_mask(attention_pattern, prefix.segment_ids, is_prefix),
            deterministic=True,
            query_positions=positions,
            key_positions=positions,
            keep_memory=True,
        )
        cache = make_cache(
            memory, prefix.segment_ids > 0, self.config, room=max_length, repeats=repeats
        )
        return cache, repeat_rows(hidden[:, -1], repeats)

    def step(
        self, cache: DecodeCache, tokens: Array, attention_pattern: str
    ) -> tuple[DecodeCache, Array]:
        """Appends `tokens [batch]`; returns the cache and `[batch, embed]`."""
        del attention_pattern
        return step_stack(self, cache, tokens)

    def logits(self, hidden: Array) -> Array:
        """`hidden [..., embed] -> [..., vocab]`, float32."""
        return self.token_embedder.logits(hidden)


def step_stack(network: nn.Module, cache: DecodeCache, tokens: Array) -> tuple[DecodeCache, Array]:
    """One token through a network's `token_embedder` and `decoder` with a cache.

    Args:
      network: the bound module.
      cache: of the tokens so far.
      tokens: `[batch]` int32.

    Returns:
      The cache with one token more, and `[batch, embed]`.
    """
    keys = jnp.arange(cache.visible.shape[1])
    mask = cache.visible[:, None] & (keys <= cache.index)
    hidden, memory = network.decoder(
        network.token_embedder(tokens[:, None], True),
        mask,
        deterministic=True,
        query_positions=cache.index[None],
        key_positions=keys,
        encoded_mask=cache.encoded_mask,
        memory=cache.memory,
        index=cache.index,
        keep_memory=True,
    )
    return cache.replace(memory=memory, index=cache.index + 1), hidden[:, 0]
