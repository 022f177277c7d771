"""Attention patterns: which tokens of `[prefix; target]` see which."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_t5x.names import check_known

Array = jax.Array

# 'causal': each token sees itself and what comes before it. 'prefix_bidirectional': the same, but
# prefix tokens see the whole prefix.
AUTOREGRESSIVE_PATTERNS = ("causal", "prefix_bidirectional")
# 'bidirectional': all tokens see all, the paper's diffusion models (arXiv 2401.17181, section 4.1).
# 'cached_prefix': the target sees all, the prefix only itself, so that a prefix's keys and values
# serve every canvas. 'causal_prefix': the same, but a prefix token sees only what comes before it,
# so that a finished canvas may join the prefix without changing what is cached.
CACHED_PATTERNS = ("cached_prefix", "causal_prefix")
DENOISING_PATTERNS = ("bidirectional", *CACHED_PATTERNS)
ATTENTION_PATTERNS = (*AUTOREGRESSIVE_PATTERNS, *DENOISING_PATTERNS)


def check_pattern(pattern: str) -> None:
    """Refuses unknown patterns with a ValueError that names the nearest."""
    check_known(pattern, ATTENTION_PATTERNS, "attention_pattern")


class Opening(NamedTuple):
    """How far attention is open to later tokens, between causal and the pattern's own.

    A query sees a later key that its pattern allows with probability `share`, all rows, layers and
    passes of a step alike: the annealed mask of DiffuLLaMA (arXiv 2410.17891, section 3).
    """

    share: Array  # scalar float32; 0 is the pattern 'causal', 1 the pattern itself
    rng: Array  # key of the draws

    def sees(self, queries: Array, keys: Array) -> Array:
        """Draws which keys queries see, bool `[queries, keys]`, of their places in a row, int32.

        Each pair of places has its own draw, so that a text read in parts draws what it does whole.
        """

        def draw(query: Array, key: Array) -> Array:
            rng = jax.random.fold_in(jax.random.fold_in(self.rng, query), key)
            return jax.random.uniform(rng) < self.share

        drawn = jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(queries, keys)
        return (keys <= queries[:, None]) | drawn


def make_mask(
    pattern: str, segment_ids: Array, is_prefix: Array, opening: Opening | None = None
) -> Array:
    """Computes which keys each query sees: bool `[batch, length, length]`, or a leading 1.

    Args:
      pattern: one of `ATTENTION_PATTERNS`.
      segment_ids: `[batch, length]`; tokens of different segments never see each other, and
        padding is a segment of its own.
      is_prefix: `[batch, length]` bool.
      opening: how much of a denoising pattern is open; None for all of it.

    Raises:
      ValueError: if the pattern is unknown.
    """
    check_pattern(pattern)
    same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]  # [batch, query, key]
    index = jnp.arange(segment_ids.shape[1])
    visible = (index[:, None] >= index[None, :])[None]  # [1, query, key]
    if opening is not None:
        same_segment = same_segment & opening.sees(index, index)
    if pattern == "bidirectional":
        return same_segment
    if pattern == "cached_prefix":
        return same_segment & (is_prefix[:, None, :] | ~is_prefix[:, :, None])
    if pattern == "causal_prefix":
        visible = visible | ~is_prefix[:, :, None]
    if pattern == "prefix_bidirectional":
        visible = visible | is_prefix[:, None, :]
    return same_segment & visible


def make_block_mask(start: Array, earlier: Array, length: int, block_length: int) -> Array:
    """Computes what canvases of all blocks of a text see: bool `[length, keys + length]`.

    A block sees itself, the prefix and the clean blocks before its own: the masks M_BD and M_OBC
    of BD3-LM (Arriola et al., arXiv 2503.09573, section 3.1). That of the clean text, M_BC, is
    causal by block there; here it is the pattern's own, 'causal_prefix', as in decoding.

    Args:
      start: scalar int32, the place of the first token of canvas and clean text in the row.
      earlier: `[keys]` int32, the places of prefix and clean text.
      length: of the canvas.
      block_length: of its blocks.
    """
    block = jnp.arange(length) // block_length  # [length]
    before = earlier < start + block[:, None] * block_length
    return jnp.concatenate([before, block[:, None] == block], axis=1)
