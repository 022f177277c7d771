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
from diffusion_t5x.objectives.attention_patterns import Opening

Array = jax.Array


class Network(nn.Module):
    """A decoder whose hidden states are those of a target, given a prefix.

    The methods are those that `bound_network` applies with bound parameters. In all of them,
    `prefix` is the result of `encode`, `attention_pattern` one of
    `attention_patterns.ATTENTION_PATTERNS`, and rows that share a prefix are neighbours.
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
        """Reads prefixes, `tokens [batch, prefix_length]`, as far as the target plays no part.

        `segment_ids` are of the same shape if rows are packed, else None.
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
        shift: bool = False,
        opening: Opening | None = None,
    ) -> Array:
        """Computes hidden states of `target [batch, length]`: see `interfaces.Network.forward`.

        Args:
          segment_ids: of the same shape if rows are packed, else None.
          shift: return at each position the state of the token before it also under a denoising
            pattern.
          opening: how far attention is open to later tokens; None for all that the pattern allows.

        Raises:
          ValueError: if the network cannot shift.
        """

    @abc.abstractmethod
    def prefill(
        self, prefix: Any, attention_pattern: str, max_length: int, repeats: int
    ) -> tuple[KVCache, Array]:
        """Reads prefixes, not packed, into a key-value cache: see `interfaces.Network.prefill`.

        The pattern is one under which the prefix does not see the target.
        """

    @abc.abstractmethod
    def extend(self, prefix: Any, tokens: Array, counts: Array) -> Any:
        """Appends tokens to prefixes: see `interfaces.Network.extend_prefix`."""

    @abc.abstractmethod
    def cache_prefix(self, prefix: Any, attention_pattern: str) -> KVCache:
        """Computes keys and values of prefixes, not packed, which all their canvases may share.

        Raises:
          ValueError: if the prefix sees the canvas under this pattern.
        """

    @abc.abstractmethod
    def extend_cached(self, cache: KVCache, tokens: Array, attention_pattern: str) -> KVCache:
        """Appends `tokens [batch, length]` to prefixes cached under a pattern, where there is room.

        Raises:
          ValueError: if earlier tokens would see later ones under this pattern.
        """

    def append(self, cache: KVCache, tokens: Array) -> tuple[KVCache, Array]:
        """Appends `tokens [batch, length]`, none of which sees a later one, where there is room.

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
            self.token_embedder(tokens, True, _text_index(cache, queries)),
            attended,
            deterministic=True,
            cache=cache,
            keep_key_values=True,
        )
        index = cache.index + length
        return cache.replace(key_values=key_values, index=index, last=hidden[:, -1]), hidden

    def denoise(self, cache: KVCache, canvas: Array, shift: bool = False) -> Array:
        """Computes the states of canvases that follow cached prefixes, as `decode` would.

        Of `canvas [batch * n, length]`, rows `i * n ... i * n + n - 1` follow prefix `i`.
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
        index = repeat_rows(_text_index(cache, canvas_index), repeats)
        embedded = self.token_embedder(canvas, True, index)
        hidden, _, _ = self.decoder(embedded, attended, deterministic=True, cache=cache)
        if not shift:
            return hidden
        before = repeat_rows(cache.last, repeats)  # [batch * n, embed]
        return jnp.concatenate([before[:, None], hidden[:, :-1]], axis=1)

    def output_weights(self, batch_size: int) -> Array:
        return self.token_embedder.output_weights(batch_size)

    def logits(self, hidden: Array, weights: Array | None = None) -> Array:
        return self.token_embedder.logits(hidden, weights)


def _text_index(cache: KVCache, row_index: Array) -> Array:
    """Returns the place in its text of each `row_index [length]`: int32 `[batch, length]`."""
    padding = jnp.sum(~cache.visible, axis=1, dtype=jnp.int32)  # [batch], before the prefix
    return row_index - padding[:, None]
