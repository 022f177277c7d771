"""Attention patterns: who sees whom in `[prefix; target]`."""

from __future__ import annotations

import difflib

import jax
import jax.numpy as jnp

Array = jax.Array

# 'causal': each token sees itself and what comes before it. 'prefix_bidirectional': the same, but
# prefix tokens see the whole prefix.
AUTOREGRESSIVE_PATTERNS = ("causal", "prefix_bidirectional")
# 'bidirectional': all see all, which is what denoising needs (arXiv 2401.17181, section 3).
# 'cached_prefix': the target sees all, the prefix only itself, so that a prefix's keys and values
# serve every canvas. 'causal_prefix': the same, but a prefix token sees only what comes before it,
# so that a finished canvas may become part of the prefix, and what is cached stays true.
CACHED_PATTERNS = ("cached_prefix", "causal_prefix")
DENOISING_PATTERNS = ("bidirectional", *CACHED_PATTERNS)
ATTENTION_PATTERNS = (*AUTOREGRESSIVE_PATTERNS, *DENOISING_PATTERNS)


def check_pattern(pattern: str) -> None:
    """Refuses unknown attention patterns.

    Raises:
      ValueError: naming the nearest known pattern.
    """
    if pattern not in ATTENTION_PATTERNS:
        near = difflib.get_close_matches(pattern, ATTENTION_PATTERNS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"attention pattern {pattern!r} is unknown; did you mean {near!r}? "
            f"Known: {', '.join(ATTENTION_PATTERNS)}."
        )


def check_shares_prefix(pattern: str) -> None:
    """Refuses patterns under which a prefix's keys and values depend on the canvas.

    Raises:
      ValueError: naming the pattern under which they do not.
    """
    if pattern not in CACHED_PATTERNS:
        raise ValueError(
            f"attention pattern {pattern!r}: the prefix sees the canvas, so its keys and values "
            f"cannot be cached; train with 'cached_prefix' "
            "(objectives/diffusion_cached_prefix.gin), or set prefix_cache = False."
        )


def check_prefix_may_grow(pattern: str) -> None:
    """Refuses patterns under which what a prefix's tokens hold changes as the prefix grows.

    Raises:
      ValueError: naming the pattern under which it does not.
    """
    if pattern != "causal_prefix":
        raise ValueError(
            f"attention pattern {pattern!r}: tokens of the prefix see later ones, so a finished "
            "block cannot join it; train with 'causal_prefix' (objectives/diffusion_blocks.gin), "
            "or set block_length = 0."
        )


def make_mask(pattern: str, segment_ids: Array, is_prefix: Array) -> Array:
    """Which keys each query sees: bool `[batch, length, length]`, or a leading 1.

    Args:
      pattern: one of `ATTENTION_PATTERNS`.
      segment_ids: `[batch, length]`; tokens of different segments never see each other, and
        padding is a segment of its own.
      is_prefix: `[batch, length]` bool.
    """
    check_pattern(pattern)
    same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
    if pattern == "bidirectional":
        return same_segment
    if pattern == "cached_prefix":
        return same_segment & (is_prefix[:, None, :] | ~is_prefix[:, :, None])
    index = jnp.arange(segment_ids.shape[1])
    visible = (index[:, None] >= index[None, :])[None]
    if pattern == "causal_prefix":
        visible = visible | ~is_prefix[:, :, None]
    if pattern == "prefix_bidirectional":
        visible = visible | is_prefix[:, None, :]
    return same_segment & visible
