"""What devices a network runs on, and among how many its arrays are split."""

from __future__ import annotations

import math
from typing import Any

import jax
from flax.linen import partitioning as nn_partitioning


def mesh_axes(logical_axis: str) -> Any:
    """The mesh axis or axes along which a logical axis is split, or None."""
    [axes] = nn_partitioning.logical_to_mesh_axes((logical_axis,)) or (None,)
    return axes


def parts_of(logical_axis: str) -> int | None:
    """Into how many parts a logical axis is split; None where it cannot be told."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty and jax.device_count() > 1:
        return None
    axes = mesh_axes(logical_axis)
    axes = axes if isinstance(axes, tuple) else (axes,)
    return math.prod(mesh.shape.get(axis, 1) for axis in axes)


def device_kind() -> str:
    """What JAX calls the devices, such as 'TPU v5 lite', 'NVIDIA H100 80GB HBM3' or 'cpu'."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.devices()[0] if device is None else device).device_kind
