"""Infilling: positions of a text that are given, in training; the others are denoised.

Fixed positions are clean in every canvas, and no loss counts them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def draw_fixed(rng: Array, targets: Array, rate: float) -> Array:
    """Draws the positions of `targets [batch, length]` that are fixed: bool of that shape.

    With probability `rate`, all positions of an example but one span are. The span lies in its text
    (up to the last token that is not 0), its length is uniform in 1 to that of the text, and all
    places are equally likely for it. Nothing of the other examples is fixed.
    """
    which_rng, length_rng, place_rng = jax.random.split(rng, 3)
    batch, length = targets.shape
    index = jnp.arange(length)
    text = jnp.max(jnp.where(targets != 0, index + 1, 1), axis=1)  # [batch]
    span = jax.random.randint(length_rng, (batch,), 1, text + 1)
    start = jax.random.randint(place_rng, (batch,), 0, text - span + 1)[:, None]
    hole = (index >= start) & (index < start + span[:, None])
    chosen = jax.random.uniform(which_rng, (batch, 1)) < rate
    return chosen & ~hole


def keep_fixed(canvas: Array, targets: Array, fixed: Array | None) -> Array:
    """Returns `canvas` with the targets at fixed positions; all are `[batch, length]`."""
    return canvas if fixed is None else jnp.where(fixed, targets, canvas)
