"""What decoders return, and the ordering of samples by their score."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Decoded(NamedTuple):
    """What a decoder returns.

    Attributes:
      tokens: `[batch, num_samples, length]` int32, best sample last.
      scores: `[batch, num_samples]` float32, ascending.
      trajectory: `[batch, num_samples, num_steps + 1, length]` int32, the canvas before the first
        step and after each one; None unless asked for.
      position_forwards: `[batch]` int32, positions sent through the network for each example,
        those of the prefix included; canvases that are computed beside others of a batch count as
        long as they are computed. None where it is not counted.
    """

    tokens: Array
    scores: Array
    trajectory: Array | None = None
    position_forwards: Array | None = None


def best_last(scores: Array, *arrays: Array | None) -> tuple[Array, ...]:
    """Sorts samples so that the best score comes last, as T5X's decoders return them.

    Args:
      scores: `[batch, num_samples]`, higher is better.
      *arrays: each `[batch, num_samples, ...]`, sorted alike; None passes through.

    Returns:
      The sorted scores, then the sorted arrays.
    """
    order = jnp.argsort(scores, axis=1)

    def take(x: Array) -> Array:
        return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)

    return tuple(None if x is None else take(x) for x in (scores, *arrays))
