"""The base of both networks: token embedding, decoder, and reading with a key-value cache."""

from __future__ import annotations

import abc
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_t5x.networks.config import TransformerConfig
from diffusion_t5x.networks.kv_cache import KVCache, repeat_rows
from diffusion_t5x.networks.layers import SelfConditioning, TokenEmbedding
from diffusion_t5x.networks.stack import Attended, Stack
from diffusion_t5x.objectives.attention_patterns import Opening, make_block_mask

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
        if config.self_conditioning:
            self.self_conditioning = SelfConditioning(config)

    def __call__(self, prefix: Array, target: Array, attention_pattern: str) -> Array:
        """Computes logits without dropout; initialisation runs this."""
        encoded = self.encode(prefix, deterministic=True)
        conditioning = None
        if self.config.self_conditioning:
            conditioning = jnp.zeros((*target.shape, self.config.embed_dim), self.config.dtype)
        hidden = self.decode(
            encoded, target, attention_pattern, deterministic=True, conditioning=conditioning
        )
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
        conditioning: Array | None = None,
    ) -> Array:
        """Computes hidden states of `target [batch, length]`: see `interfaces.Network.forward`.

        Args:
          segment_ids: of the same shape if rows are packed, else None.
          shift: return at each position the state of the token before it also under a denoising
            pattern.
          opening: how far attention is open to later tokens; None for all that the pattern allows.
          conditioning: `[batch, length, embed]`, for networks with self-conditioning; None for 0.

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
    def read_text(
        self, prefix: Any, target: Array, attention_pattern: str, *, deterministic: bool
    ) -> tuple[Array, Array, Array]:
        """Reads prefixes and targets, not packed: see `interfaces.Network.read_text`."""

    @abc.abstractmethod
    def drop_prefix(self, prefix: Any, dropped: Array) -> Any:
        """Empties the prefixes of rows `dropped [batch]`: see `interfaces.Network.drop_prefix`."""

    @abc.abstractmethod
    def cache_prefix(
        self,
        prefix: Any,
        attention_pattern: str,
        *,
        deterministic: bool = True,
        opening: Opening | None = None,
        keep_states: bool = False,
    ) -> KVCache:
        """Computes keys and values of prefixes, not packed, which all their canvases may share.

        Gradients flow through them to the parameters. The states of all tokens are kept if asked.

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
        last = hidden[:, -1]
        return cache.replace(key_values=key_values, index=index, last=last, states=None), hidden

    def denoise(
        self,
        cache: KVCache,
        canvas: Array,
        shift: bool = False,
        *,
        deterministic: bool = True,
        opening: Opening | None = None,
        conditioning: Array | None = None,
        block_length: int = 0,
    ) -> Array:
        """Computes the states of canvases that follow cached prefixes, as `decode` would.

        Of `canvas [batch * n, length]`, rows `i * n ... i * n + n - 1` follow prefix `i`. With
        `block_length` they are all blocks of texts, whole ones, and the cache ends with the clean
        text up to the last block: a block sees what is before it, and itself.
        """
        length = canvas.shape[1]
        start = cache.index - (length - block_length if block_length else 0)
        prefix_index = jnp.arange(cache.visible.shape[1])  # [cache_length]
        canvas_index = start + jnp.arange(length)  # [length]
        repeats = canvas.shape[0] // cache.visible.shape[0]
        visible = repeat_rows(cache.visible & (prefix_index < cache.index), repeats)
        seen = jnp.concatenate([visible, jnp.ones(canvas.shape, bool)], axis=1)
        key_positions = jnp.concatenate([prefix_index, canvas_index])
        mask = seen[:, None]  # [batch * n, 1 or length, cache_length + length]
        if opening is not None:
            mask = mask & opening.sees(canvas_index, key_positions)
        if block_length:
            mask = mask & make_block_mask(start, prefix_index, length, block_length)
        attended = Attended(
            mask=mask,
            query_positions=canvas_index,
            key_positions=key_positions,
            encoded_mask=repeat_rows(cache.encoded_mask, repeats),
        )
        index = repeat_rows(_text_index(cache, canvas_index), repeats)
        embedded = self.token_embedder(canvas, deterministic, index)
        embedded = self.condition(embedded, conditioning, deterministic)
        hidden, _, _ = self.decoder(embedded, attended, deterministic=deterministic, cache=cache)
        if not shift:
            return hidden
        before = cache.last[:, None]  # [batch, blocks, embed]
        if block_length:
            assert cache.states is not None
            before = cache.states[:, start - 1 + jnp.arange(0, length, block_length)]
        blocks = hidden.reshape(*hidden.shape[:1], before.shape[1], -1, hidden.shape[-1])
        before = repeat_rows(before, repeats)[:, :, None]
        return jnp.concatenate([before, blocks[:, :, :-1]], axis=2).reshape(hidden.shape)

    def condition(self, embedded: Array, conditioning: Array | None, deterministic: bool) -> Array:
        """Adds the prediction of the pass before to `embedded [batch, n, embed]`, at its end.

        `conditioning [batch, length, embed]` is for the last `length` positions.
        """
        if conditioning is None:
            return embedded
        added = self.self_conditioning(conditioning, deterministic)
        before = embedded.shape[1] - conditioning.shape[1]
        return embedded + jnp.pad(added, [(0, 0), (before, 0), (0, 0)])

    def expect_embedding(self, probabilities: Array, weights: Array) -> Array:
        return self.token_embedder.expect(probabilities, weights)

    def output_weights(self, batch_size: int) -> Array:
        return self.token_embedder.output_weights(batch_size)

    def logits(self, hidden: Array, weights: Array | None = None) -> Array:
        return self.token_embedder.logits(hidden, weights)


def _text_index(cache: KVCache, row_index: Array) -> Array:
    """Returns the place in its text of each `row_index [length]`: int32 `[batch, length]`."""
    padding = jnp.sum(~cache.visible, axis=1, dtype=jnp.int32)  # [batch], before the prefix
    return row_index - padding[:, None]
