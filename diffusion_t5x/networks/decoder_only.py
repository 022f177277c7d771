"""The decoder-only network: one stack reads `[prefix; target]`."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_t5x.networks.attention import repeat_rows
from diffusion_t5x.networks.config import TransformerConfig
from diffusion_t5x.networks.kv_cache import (
    CanvasMemory,
    DecodeCache,
    append,
    denoise,
    denoise_at,
    make_cache,
)
from diffusion_t5x.networks.layers import Stack, TokenEmbedding
from diffusion_t5x.networks.row_layout import (
    Prefix,
    extend_prefix,
    merge,
    read_prefix,
    start_texts,
    take_targets,
)
from diffusion_t5x.objectives.attention_patterns import (
    AUTOREGRESSIVE_PATTERNS,
    check_prefix_may_grow,
    check_shares_prefix,
    make_mask,
)

Array = jax.Array


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
          attention_pattern: one of `patterns.ATTENTION_PATTERNS`. Under an autoregressive one the
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

    def extend(self, prefix: Prefix, tokens: Array, counts: Array) -> Prefix:
        """Prefixes that go on with tokens; see `layout.extend_prefix`."""
        return extend_prefix(prefix, tokens, counts)

    def cache_prefix(self, prefix: Prefix, attention_pattern: str) -> DecodeCache:
        """Keys and values of the prefix, which every canvas may share.

        Args:
          prefix: from `encode`, not packed.
          attention_pattern: one of `patterns.CACHED_PATTERNS`.

        Raises:
          ValueError: if the prefix sees the canvas under this pattern.
        """
        check_shares_prefix(attention_pattern)
        cache, _ = self.prefill(prefix, attention_pattern, 0, 1)
        return cache

    def denoise(self, cache: DecodeCache, canvas: Array) -> tuple[Array, CanvasMemory]:
        """What `decode` returns, from a cached prefix; see `cache.denoise`."""
        return denoise(self, cache, canvas)

    def denoise_at(
        self, cache: DecodeCache, kept: CanvasMemory, tokens: Array, positions: Array, seen: Array
    ) -> tuple[Array, CanvasMemory]:
        """Reads some positions of a canvas again; see `cache.denoise_at`."""
        return denoise_at(self, cache, kept, tokens, positions, seen)

    def extend_cached(
        self, cache: DecodeCache, tokens: Array, attention_pattern: str
    ) -> DecodeCache:
        """The cache with `tokens [batch, length]` at the end of every prefix.

        Args:
          cache: from `cache_prefix`, grown by at least as much room as there are tokens.
          tokens: int32.
          attention_pattern: that of the cache.

        Raises:
          ValueError: if what is cached would no longer be true under this pattern.
        """
        check_prefix_may_grow(attention_pattern)
        cache, _ = append(self, cache, tokens)
        return cache

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
        cache, hidden = append(self, cache, tokens[:, None])
        return cache, hidden[:, 0]

    def output_weights(self, batch_size: int) -> Array:
        """What `logits` multiplies by; see `TokenEmbedding.output_weights`."""
        return self.token_embedder.output_weights(batch_size)

    def logits(self, hidden: Array, weights: Array | None = None) -> Array:
        """Logits over the vocabulary; see `TokenEmbedding.logits`."""
        return self.token_embedder.logits(hidden, weights)
