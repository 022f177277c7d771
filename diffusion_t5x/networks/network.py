"""The base of both networks: token embedding, decoder, and reading with a key-value cache."""

from __future__ import annotations

import abc
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_t5x.networks.config import TransformerConfig
from diffusion_t5x.networks.kv_cache import KVCache, repeat_rows
from diffusion_t5x.networks.layers import TokenEmbedding
from diffusion_t5x.networks.stack import Attended, Stack

Array = jax.Array


class Network(nn.Module):
    """A decoder whose hidden states are those of a target, given a prefix.

    The methods are those that a model applies with bound parameters. In all of them, `prefix` is
    the result of `encode`, and rows that share a prefix are neighbours.

    Attributes:
      config: Shape and numerics.
    """

    config: TransformerConfig

    def setup(self) -> None:
        config = self.config
        self.token_embedder = TokenEmbedding(config)
        self.decoder = Stack(config, config.num_layers, config.decoder_buckets)

    def __call__(self, prefix: Array, target: Array, attention_pattern: str) -> Array:
        """Computes logits without dropout; initialisation runs this."""
        encoded = self.encode(prefix, deterministic=True)
        hidden = self.decode(encoded, target, attention_pattern, deterministic=True)
        return self.logits(hidden)

    @abc.abstractmethod
    def encode(
        self, tokens: Array, segment_ids: Array | None = None, *, deterministic: bool
    ) -> Any:
        """Reads prefixes as far as that does not depend on the target.

        Args:
          tokens: `[batch, prefix_length]` int32, padded with 0.
          segment_ids: `[batch, prefix_length]` int32 if rows are packed, else None.
          deterministic: Disables dropout.
        """

    @abc.abstractmethod
    def decode(
        self,
        prefix: Any,
        target: Array,
        attention_pattern: str,
        segment_ids: Array | None = None,
        *,
        deterministic: bool,
    ) -> Array:
        """Computes hidden states of the target positions: `[batch, length, embed]`.

        Args:
          prefix: The prefixes.
          target: `[batch, length]` int32, target tokens or canvas.
          attention_pattern: One of `attention_patterns.ATTENTION_PATTERNS`. Under an autoregressive
            one the state at a position has seen only the tokens before it, which predict it.
          segment_ids: `[batch, length]` int32 if rows are packed, else None.
          deterministic: Disables dropout.
        """

    @abc.abstractmethod
    def prefill(
        self, prefix: Any, attention_pattern: str, max_length: int, repeats: int
    ) -> tuple[KVCache, Array]:
        """Reads prefixes into a key-value cache.

        Args:
          prefix: The prefixes, not packed.
          attention_pattern: One under which the prefix does not see the target.
          max_length: Number of target tokens that the cache has room for.
          repeats: Number of copies of each row.

        Returns:
          The cache, and `[batch * repeats, embed]`, which predicts the first target token.
        """

    def step(self, cache: KVCache, tokens: Array, attention_pattern: str) -> tuple[KVCache, Array]:
        """Appends `tokens [batch]` to a cache; returns it and `[batch, embed]`."""
        del attention_pattern
        cache, hidden = self.append(cache, tokens[:, None])
        return cache, hidden[:, 0]

    def append(self, cache: KVCache, tokens: Array) -> tuple[KVCache, Array]:
        """Appends tokens to a cache, none of which sees a later one.

        Args:
          cache: A cache with room for the tokens.
          tokens: `[batch, length]` int32.

        Returns:
          The cache with the tokens, and `[batch, length, embed]`.
        """
        length = tokens.shape[1]
        keys = jnp.arange(cache.visible.shape[1])  # [cache_length]
        queries = cache.index + jnp.arange(length)  # [length]
        attended = Attended(
            mask=cache.visible[:, None] & (keys <= queries[:, None]),  # [batch, length, keys]
            query_positions=queries,
            key_positions=keys,
            index=cache.index,
            encoded_mask=cache.encoded_mask,
        )
        hidden, key_values, _ = self.decoder(
            self.token_embedder(tokens, True),
            attended,
            deterministic=True,
            cache=cache,
            keep_key_values=True,
        )
        return cache.replace(key_values=key_values, index=cache.index + length), hidden

    def denoise(self, cache: KVCache, canvas: Array) -> Array:
        """Computes the states of canvases that follow cached prefixes, as `decode` would.

        Args:
          cache: The cached prefixes.
          canvas: `[batch * n, length]` int32; rows `i * n ... i * n + n - 1` follow prefix `i`.

        Returns:
          `[batch * n, length, embed]`.
        """
        prefix_index = jnp.arange(cache.visible.shape[1])  # [cache_length]
        canvas_index = cache.index + jnp.arange(canvas.shape[1])  # [length]
        repeats = canvas.shape[0] // cache.visible.shape[0]
        visible = repeat_rows(cache.visible & (prefix_index < cache.index), repeats)
        seen = jnp.concatenate([visible, jnp.ones(canvas.shape, bool)], axis=1)
        attended = Attended(
            mask=seen[:, None],  # [batch * n, 1, cache_length + length]
            query_positions=canvas_index,
            key_positions=jnp.concatenate([prefix_index, canvas_index]),
            encoded_mask=repeat_rows(cache.encoded_mask, repeats),
        )
        embedded = self.token_embedder(canvas, True)
        hidden, _, _ = self.decoder(embedded, attended, deterministic=True, cache=cache)
        return hidden

    def output_weights(self, batch_size: int) -> Array:
        """Returns the matrix of `logits`; see `TokenEmbedding.output_weights`."""
        return self.token_embedder.output_weights(batch_size)

    def logits(self, hidden: Array, weights: Array | None = None) -> Array:
        """Computes logits over the vocabulary; see `TokenEmbedding.logits`."""
        return self.token_embedder.logits(hidden, weights)
