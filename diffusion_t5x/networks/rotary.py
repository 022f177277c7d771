"""Rotary positions (Su et al. 2021, arXiv 2104.09864), with the scalings of pretrained families.

Logits depend on distances alone, and the distance between two tokens of a text is that of their
indices in a row (see `row_layout`): padding and packing change nothing but the rounding.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_t5x.networks.config import RopeScaling, TransformerConfig

Array = jax.Array


class Rotation(flax.struct.PyTreeNode):
    """By how much each pair of a head's numbers is turned, `[length, head_dim / 2]` float32."""

    cos: Array
    sin: Array

    def __call__(self, x: Array) -> Array:
        """Turns `x [batch, length, heads, head_dim]`, in float32; the halves are the pairs."""
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = self.cos[:, None], self.sin[:, None]
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotation(positions: Array, frequencies: Array | np.ndarray) -> Rotation:
    """Returns the rotation of `positions [length]` at `frequencies [head_dim / 2]`."""
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def frequencies(config: TransformerConfig, *, sliding: bool) -> np.ndarray:
    """Returns the angles per position, `[head_dim / 2]` float32 in radians.

    They are those of layers with or without a sliding window.
    """
    local = sliding and config.rope_local_theta is not None
    theta = config.rope_local_theta if local else config.rope_theta
    powers = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    plain = (1.0 / np.float32(theta) ** powers).astype(np.float32)
    scaling = None if local else config.rope_scaling
    assert scaling is None or isinstance(scaling, RopeScaling)
    return plain if scaling is None else _scale(plain, scaling).astype(np.float32)


def _scale(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    if scaling.kind == "linear":
        return plain / scaling.factor
    turns = scaling.original_max_positions * plain / (2 * np.pi)  # in the longest text
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept * plain + (1 - kept) * plain / scaling.factor
