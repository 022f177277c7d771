"""The decoder-only network: one stack reads `[prefix; target]`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffusion_t5x.networks.kv_cache import KVCache, grow, repeat, repeat_rows
from diffusion_t5x.networks.network import Network
from diffusion_t5x.networks.row_layout import (
    Prefix,
    Row,
    drop_prefix,
    extend_prefix,
    merge,
    read_prefix,
    start_texts,
    take_targets,
    text_index,
)
from diffusion_t5x.networks.stack import Attended
from diffusion_t5x.objectives.attention_patterns import (
    AUTOREGRESSIVE_PATTERNS,
    CACHED_PATTERNS,
    Opening,
    make_mask,
)

Array = jax.Array


class DecoderOnly(Network):
    """A single stack over `[prefix; target]` whose hidden states are those of the target."""

    def encode(
        self, tokens: Array, segment_ids: Array | None = None, *, deterministic: bool
    ) -> Prefix:
        """Lays out the prefix; this network reads it together with the target."""
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
        shift: bool = False,
        opening: Opening | None = None,
        conditioning: Array | None = None,
    ) -> Array:
        """Reads prefix and target in one row.

        Under an autoregressive pattern, or with `shift`, the state returned at a position is that
        of the token before it, which predicts it; that of the first is the last prefix token's.

        Raises:
          ValueError: if packed canvases would need a start token, for which there is no room, or
            conditioning, since their tokens are not at the end of rows.
        """
        if prefix.packed and conditioning is not None:
            raise ValueError("self_conditioning: packed rows have none; set PACK = False.")
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
        hidden = self._read_row(
            row, attention_pattern, opening, conditioning, deterministic=deterministic
        )
        return take_targets(hidden, row, target.shape[1], before=(causal or shift) and not started)

    def _read_row(
        self,
        row: Row,
        attention_pattern: str,
        opening: Opening | None = None,
        conditioning: Array | None = None,
        *,
        deterministic: bool,
    ) -> Array:
        """Computes the states of all tokens of a row: `[batch, prefix_length + length, embed]`."""
        positions = jnp.arange(row.tokens.shape[1])
        mask = make_mask(attention_pattern, row.segment_ids, row.is_prefix, opening)
        embedded = self.token_embedder(row.tokens, deterministic, text_index(row.segment_ids))
        hidden, _, _ = self.decoder(
            self.condition(embedded, conditioning, deterministic),
            Attended(mask, positions, positions),
            deterministic=deterministic,
        )
        return hidden

    def prefill(
        self, prefix: Prefix, attention_pattern: str, max_length: int, repeats: int
    ) -> tuple[KVCache, Array]:
        cache = self._read_prefix(prefix, attention_pattern)
        return grow(repeat(cache, repeats), max_length), repeat_rows(cache.last, repeats)

    def _read_prefix(
        self,
        prefix: Prefix,
        attention_pattern: str,
        *,
        deterministic: bool = True,
        opening: Opening | None = None,
        keep_states: bool = False,
    ) -> KVCache:
        """Reads prefixes alone; the arguments are those of `Network.cache_prefix`."""
        length = prefix.tokens.shape[1]
        positions = jnp.arange(length)
        is_prefix = jnp.ones_like(prefix.tokens, bool)
        mask = make_mask(attention_pattern, prefix.segment_ids, is_prefix, opening)
        hidden, key_values, _ = self.decoder(
            self.token_embedder(prefix.tokens, deterministic, text_index(prefix.segment_ids)),
            Attended(mask, positions, positions),
            deterministic=deterministic,
            keep_key_values=True,
        )
        states = hidden if keep_states else None
        visible = prefix.segment_ids > 0
        return KVCache(key_values, visible, jnp.int32(length), hidden[:, -1], states)

    def read_text(
        self, prefix: Prefix, target: Array, attention_pattern: str, *, deterministic: bool
    ) -> tuple[Array, Array, Array]:
        row = merge(prefix, target, None)
        hidden = self._read_row(row, attention_pattern, deterministic=deterministic)
        return hidden[:, :-1], row.tokens[:, 1:], row.segment_ids[:, :-1] > 0

    def drop_prefix(self, prefix: Prefix, dropped: Array) -> Prefix:
        return drop_prefix(prefix, dropped)

    def extend(self, prefix: Prefix, tokens: Array, counts: Array) -> Prefix:
        return extend_prefix(prefix, tokens, counts)

    def cache_prefix(self, prefix: Prefix, attention_pattern: str, **reading: Any) -> KVCache:
        if attention_pattern not in CACHED_PATTERNS:
            raise ValueError(
                f"attention_pattern = {attention_pattern!r}: the prefix sees the canvas, so its "
                f"keys and values cannot be cached; expected one of {', '.join(CACHED_PATTERNS)}."
            )
        return self._read_prefix(prefix, attention_pattern, **reading)

    def extend_cached(self, cache: KVCache, tokens: Array, attention_pattern: str) -> KVCache:
        if attention_pattern != "causal_prefix":
            raise ValueError(
                f"attention_pattern = {attention_pattern!r}: tokens of the prefix see later ones, "
                "so a finished block cannot join it; expected causal_prefix."
            )
        cache, _ = self.append(cache, tokens)
        return cache
