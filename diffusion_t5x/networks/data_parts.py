"""Weights that each data-parallel part has to itself, so that their gradients are summed once.

Where a weight is used in a loop, compilers may sum its gradient over the data axis at every use,
and gather it there as often if the rules split it over that axis. A leading axis of parts says
instead that each part sums up its own; parts are added up where the axis ends. A device's memory
stays the same.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax.linen import partitioning as nn_partitioning

from diffusion_t5x.networks.sharding import parts_of

Array = jax.Array


def for_each_part(weights: Array, axes: tuple[str, ...], rows: int) -> Array:
    """`weights` of logical `axes`, once for each part: `[parts, ...]`.

    Rows are dealt out in order: row `i` of `rows`, or of a multiple, is of part
    `i * parts // rows`. Where parts cannot be told or do not divide the rows, there is one.
    """
    parts = parts_of("batch")
    if parts is None or parts == 1 or rows % parts:
        return weights[None]
    weights = jnp.broadcast_to(weights, (parts, *weights.shape))
    return nn_partitioning.with_sharding_constraint(weights, ("batch", *axes))
