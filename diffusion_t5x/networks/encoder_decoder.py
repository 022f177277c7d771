"""The encoder-decoder network: the encoder reads the prefix, the decoder the target."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_t5x.networks.kv_cache import KVCache, grow, repeat, repeat_rows
from diffusion_t5x.networks.network import Network
from diffusion_t5x.networks.row_layout import read_prefix, shift_texts
from diffusion_t5x.networks.stack import Attended, Stack
from diffusion_t5x.objectives.attention_patterns import (
    DENOISING_PATTERNS,
    Opening,
    check_pattern,
    make_mask,
)

Array = jax.Array


class EncodedPrefix(flax.struct.PyTreeNode):
    """The encoder's output."""

    hidden: Array  # [batch, prefix_length, embed]
    segment_ids: Array  # [batch, prefix_length] int32; 0 is padding


class EncoderDecoder(Network):
    """A bidirectional encoder over the prefix, and a decoder over the target that attends to it."""

    def __post_init__(self) -> None:
        """Refuses settings that only decoder-only networks have."""
        config = self.config
        for name, setting in (
            ("positions", config.positions != "relative_bias"),
            ("sliding_window", config.sliding_window is not None),
            ("post_norms", config.post_norms),
        ):
            if setting:
                raise ValueError(
                    f"TransformerConfig.{name} = {getattr(config, name)!r}: an encoder-decoder has "
                    "T5's positions, windows and norms alone; use DecoderOnly."
                )
        super().__post_init__()

    def setup(self) -> None:
        super().setup()
        config = self.config
        layers = config.num_encoder_layers or config.num_layers
        self.encoder = Stack(config, layers, config.relative_buckets)

    def encode(
        self, tokens: Array, segment_ids: Array | None = None, *, deterministic: bool
    ) -> EncodedPrefix:
        prefix = read_prefix(tokens, segment_ids, start=False)
        positions = jnp.arange(tokens.shape[1])
        mask = make_mask("bidirectional", prefix.segment_ids, prefix.segment_ids > 0)
        hidden, _, _ = self.encoder(
            self.token_embedder(prefix.tokens, deterministic),
            Attended(mask, positions, positions),
            deterministic=deterministic,
        )
        return EncodedPrefix(hidden, prefix.segment_ids)

    def decode(
        self,
        prefix: EncodedPrefix,
        target: Array,
        attention_pattern: str,
        segment_ids: Array | None = None,
        *,
        deterministic: bool,
        shift: bool = False,
        opening: Opening | None = None,
        conditioning: Array | None = None,
    ) -> Array:
        """Reads the canvas as it is under a denoising pattern, else the target after a 0.

        So shifted right, each state predicts its position. The encoder sees the whole prefix, and
        no canvas, either way.

        Raises:
          ValueError: if `shift` is set, since no token is before a canvas.
        """
        if shift:
            raise ValueError("shift = True needs a decoder-only network; set SHIFT = False.")
        check_pattern(attention_pattern)
        segments = jnp.ones_like(target) if segment_ids is None else segment_ids
        if attention_pattern in DENOISING_PATTERNS:
            pattern, tokens = "bidirectional", target
        else:
            pattern, tokens = "causal", shift_texts(target, segments, 0)
        positions = jnp.arange(target.shape[1])
        attended = Attended(
            mask=make_mask(pattern, segments, segments < 0, opening),
            query_positions=positions,
            key_positions=positions,
            encoded=prefix.hidden,
            # [batch, length, prefix_length]
            encoded_mask=segments[:, :, None] == prefix.segment_ids[:, None, :],
        )
        embedded = self.token_embedder(tokens, deterministic)
        embedded = self.condition(embedded, conditioning, deterministic)
        hidden, _, _ = self.decoder(embedded, attended, deterministic=deterministic)
        return hidden

    def prefill(
        self, prefix: EncodedPrefix, attention_pattern: str, max_length: int, repeats: int
    ) -> tuple[KVCache, Array]:
        """Caches the encoder's output and starts the decoder with a 0."""
        del attention_pattern
        start = jnp.zeros((prefix.segment_ids.shape[0], 1), jnp.int32)
        attended = Attended(
            mask=jnp.ones((1, 1, 1), bool),
            query_positions=jnp.arange(1),
            key_positions=jnp.arange(1),
            encoded=prefix.hidden,
            encoded_mask=(prefix.segment_ids > 0)[:, None, :],
        )
        hidden, key_values, encoded = self.decoder(
            self.token_embedder(start, True), attended, deterministic=True, keep_key_values=True
        )
        last = hidden[:, -1]
        cache = KVCache(
            key_values, start == 0, jnp.int32(1), last,
            encoded=encoded, encoded_mask=attended.encoded_mask,
        )  # fmt: skip
        return grow(repeat(cache, repeats), max_length), repeat_rows(hidden[:, -1], repeats)

    def cache_prefix(
        self, prefix: EncodedPrefix, attention_pattern: str, **reading: Any
    ) -> KVCache:
        """Caches the encoder's output, under any pattern, since the encoder sees no canvas."""
        del reading  # its keys and values have no dropout, no opening and no states
        cache, _ = self.prefill(prefix, attention_pattern, 0, 1)
        return cache.replace(key_values=None, visible=cache.visible[:, :0], index=jnp.int32(0))

    def read_text(self, *args: Any, **kwargs: Any) -> Any:
        """Raises a ValueError: an encoder sees all of the prefix, and predicts nothing of it."""
        raise ValueError(
            "next_token_prefix = True needs a decoder-only network; set NEXT_TOKEN_PREFIX = False."
        )

    def drop_prefix(self, prefix: EncodedPrefix, dropped: Array) -> EncodedPrefix:
        """Puts in place of prefixes the encoder's output for an empty one, without dropout."""
        length = prefix.segment_ids.shape[1]
        empty = self.encode(jnp.zeros((1, 1), jnp.int32), deterministic=True)
        hidden = jnp.pad(empty.hidden, [(0, 0), (length - 1, 0), (0, 0)])
        segment_ids = jnp.pad(empty.segment_ids, [(0, 0), (length - 1, 0)])
        return EncodedPrefix(
            jnp.where(dropped[:, None, None], hidden, prefix.hidden),
            jnp.where(dropped[:, None], segment_ids, prefix.segment_ids),
        )

    def extend(self, *args: Any, **kwargs: Any) -> Any:
        """Raises a ValueError: an encoder's prefix cannot grow, since all of it sees all of it."""
        raise ValueError(
            "an encoder's prefix cannot grow: block_length needs a decoder-only network; set it 0."
        )

    extend_cached = extend
