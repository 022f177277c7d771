"""The encoder-decoder network: the encoder reads the prefix, the decoder the target."""

from __future__ import annotations

import flax.linen as nn
import flax.struct
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
from diffusion_t5x.networks.layers import Memory, Stack, TokenEmbedding
from diffusion_t5x.networks.row_layout import read_prefix
from diffusion_t5x.objectives.attention_patterns import DENOISING_PATTERNS, check_pattern, make_mask

Array = jax.Array


@flax.struct.dataclass
class EncodedPrefix:
    """The encoder's output.

    Attributes:
      hidden: `[batch, prefix_length, embed]`.
      segment_ids: `[batch, prefix_length]` int32; 0 is padding.
    """

    hidden: Array
    segment_ids: Array

    reread = 0

    @property
    def read_once(self) -> int:
        """Positions that are read once for all passes over a target."""
        return self.hidden.shape[1]


def shift_right(tokens: Array, segment_ids: Array | None) -> Array:
    """Decoder inputs of an AR decoder: `tokens [batch, length]` after a 0 at each text's start."""
    shifted = jnp.pad(tokens, [(0, 0), (1, 0)])[:, :-1]
    if segment_ids is None:
        return shifted
    previous = jnp.pad(segment_ids, [(0, 0), (1, 0)])[:, :-1]
    return jnp.where(segment_ids == previous, shifted, 0)


class EncoderDecoder(nn.Module):
    """A bidirectional encoder over the prefix, and a decoder over the target that attends to it.

    Attributes:
      config: shape and numerics.
    """

    config: TransformerConfig

    def setup(self):
        config = self.config
        self.token_embedder = TokenEmbedding(config)
        encoder_layers = config.num_encoder_layers or config.num_layers
        self.encoder = Stack(config, encoder_layers, config.relative_buckets)
        self.decoder = Stack(
            config, config.num_layers, config.decoder_buckets, cross_attention=True
        )

    def __call__(self, prefix: Array, target: Array, attention_pattern: str) -> Array:
        """Encodes and decodes without dropout: what initialisation runs."""
        context = self.encode(prefix, deterministic=True)
        hidden = self.decode(context, target, attention_pattern, deterministic=True)
        return self.logits(hidden)

    def encode(
        self, tokens: Array, segment_ids: Array | None = None, *, deterministic: bool
    ) -> EncodedPrefix:
        """Reads the prefix.

        Args:
          tokens: `[batch, prefix_length]` int32, padded with 0.
          segment_ids: `[batch, prefix_length]`, where rows are packed.
          deterministic: no dropout.
        """
        prefix = read_prefix(tokens, segment_ids, start=False)
        positions = jnp.arange(tokens.shape[1])
        hidden, _ = self.encoder(
            self.token_embedder(prefix.tokens, deterministic),
            make_mask("bidirectional", prefix.segment_ids, prefix.segment_ids > 0),
            deterministic=deterministic,
            query_positions=positions,
            key_positions=positions,
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
    ) -> Array:
        """Hidden states of the target positions: `[batch, length, embed]`.

        Args:
          prefix: from `encode`.
          target: `[batch, length]` int32, target tokens or canvas.
          attention_pattern: a denoising one reads the canvas as it is; any other reads the target
            shifted right behind a 0, so that each state predicts its position. The encoder sees
            the whole prefix, and no canvas, either way.
          segment_ids: `[batch, length]`, where rows are packed.
          deterministic: no dropout.
        """
        check_pattern(attention_pattern)
        if attention_pattern in DENOISING_PATTERNS:
            pattern, tokens = "bidirectional", target
        else:
            pattern, tokens = "causal", shift_right(target, segment_ids)
        segments = jnp.ones_like(target) if segment_ids is None else segment_ids
        positions = jnp.arange(target.shape[1])
        hidden, _ = self.decoder(
            self.token_embedder(tokens, deterministic),
            make_mask(pattern, segments, segments < 0),
            deterministic=deterministic,
            query_positions=positions,
            key_positions=positions,
            encoded=prefix.hidden,
            encoded_mask=segments[:, :, None] == prefix.segment_ids[:, None, :],
        )
        return hidden

    def cache_prefix(self, prefix: EncodedPrefix, attention_pattern: str) -> DecodeCache:
        """Keys and values of the encoder's output in every layer, which every canvas may share.

        Args:
          prefix: from `encode`, not packed.
          attention_pattern: any, since the encoder sees no canvas.
        """
        cache, _ = self.prefill(prefix, attention_pattern, 0, 1)
        drop = lambda memory: memory.replace(own=None)  # noqa: E731
        return cache.replace(
            memory=jax.tree.map(drop, cache.memory, is_leaf=lambda x: isinstance(x, Memory)),
            visible=cache.visible[:, :0],
            index=jnp.int32(0),
        )

    def denoise(self, cache: DecodeCache, canvas: Array) -> tuple[Array, CanvasMemory]:
        """What `decode` returns, from a cached prefix; see `cache.denoise`."""
        return denoise(self, cache, canvas)

    def denoise_at(
        self, cache: DecodeCache, kept: CanvasMemory, tokens: Array, positions: Array, seen: Array
    ) -> tuple[Array, CanvasMemory]:
        """Reads some positions of a canvas again; see `cache.denoise_at`."""
        return denoise_at(self, cache, kept, tokens, positions, seen)

    def extend(self, *args: Array) -> EncodedPrefix:
        """Not to be had: the encoder reads the prefix, and its layers see all of it.

        Raises:
          ValueError: always.
        """
        raise ValueError(
            "an encoder's prefix cannot grow: block_length needs a decoder-only network; set it 0."
        )

    extend_cached = extend

    def prefill(
        self, prefix: EncodedPrefix, attention_pattern: str, max_length: int, repeats: int
    ) -> tuple[DecodeCache, Array]:
        """Starts the decoder with a 0 and caches the keys and values of the encoder's output.

        Args:
          prefix: from `encode`, not packed.
          attention_pattern: 'causal' or 'prefix_bidirectional', the same here.
          max_length: target tokens to come.
          repeats: copies of each row.

        Returns:
          The cache, and `[batch * repeats, embed]`, which predicts the first target token.
        """
        del attention_pattern
        start = jnp.zeros((prefix.segment_ids.shape[0], 1), jnp.int32)
        encoded_mask = (prefix.segment_ids > 0)[:, None, :]
        hidden, memory = self.decoder(
            self.token_embedder(start, True),
            jnp.ones((1, 1, 1), bool),
            deterministic=True,
            query_positions=jnp.arange(1),
            key_positions=jnp.arange(1),
            encoded=prefix.hidden,
            encoded_mask=encoded_mask,
            keep_memory=True,
        )
        cache = make_cache(
            memory,
            start == 0,
            self.config,
            room=max_length,
            repeats=repeats,
            encoded_mask=encoded_mask,
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
