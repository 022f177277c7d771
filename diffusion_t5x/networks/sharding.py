"""The devices that a network runs on, and the shards that its arrays are split into."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax.linen import partitioning as nn_partitioning

Array = jax.Array


def mesh_axes(logical_axis: str) -> str | tuple[str, ...] | None:
    """Returns the mesh axis or axes along which a logical axis is split, or None."""
    spec = nn_partitioning.logical_to_mesh_axes((logical_axis,))
    return spec[0] if spec else None


def shard_count(logical_axis: str) -> int | None:
    """Returns the number of shards along a logical axis; None if it is unknown.

    It is unknown outside of a mesh when there are several devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty and jax.device_count() > 1:
        return None
    axes = mesh_axes(logical_axis)
    names = axes if isinstance(axes, tuple) else (axes,)
    return math.prod(mesh.shape.get(name, 1) for name in names)


def per_data_shard(weights: Array, axes: tuple[str, ...], rows: int) -> Array:
    """Copies weights for each data-parallel shard, so that their gradient is summed only once.

    When weights are used inside a loop, compilers may sum their gradient over the data axis in each
    iteration, and gather the weights as often if they are split over that axis. With a leading axis
    of shards, each shard accumulates a gradient of its own, and the shards are added where that
    axis ends. The memory of a device stays the same.

    The result is `[shards, ...]`, and `[1, ...]` if the number of shards is unknown or does not
    divide `rows`, those of the batch; row `i` belongs to shard `i * shards // rows`. `axes` are the
    logical axes of `weights`.
    """
    shards = shard_count("batch")
    if shards is None or shards == 1 or rows % shards:
        return weights[None]
    weights = jnp.broadcast_to(weights, (shards, *weights.shape))
    return nn_partitioning.with_sharding_constraint(weights, ("batch", *axes))


def device_kind() -> str:
    """Returns JAX's name of the devices, such as 'TPU v5 lite', 'NVIDIA H100' or 'cpu'."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.devices()[0] if device is None else device).device_kind
