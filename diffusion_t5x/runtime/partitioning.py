"""Meshes, logical axis rules, and jit over them."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.core
import jax
import numpy as np
from flax.linen import partitioning as nn_partitioning
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_t5x.data.data_shards import DataLayout

LogicalAxisRules = Sequence[tuple[str, str | tuple[str, ...] | None]]
Batch = Mapping[str, np.ndarray]
MESH_AXES = ("replica", "data", "model")


def standard_logical_axis_rules(
    activation_partitioning_dims: int = 1,
    parameter_partitioning_dims: int = 1,
    additional_rules: LogicalAxisRules = (),
) -> LogicalAxisRules:
    """T5X's standard rules: which mesh axis each logical axis is split over.

    'batch' goes to 'data' and heads, feed-forward and vocabulary go to 'model' in all variants;
    2-D activations also split 'embed' over 'model', 2-D parameters over 'data'. Where both are
    asked for, the first rule that is still free in an array applies.

    Args:
      activation_partitioning_dims: 1 or 2.
      parameter_partitioning_dims: 1 or 2.
      additional_rules: appended to the standard ones.

    Raises:
      ValueError: if a number of dimensions is neither 1 nor 2.
    """
    for name, dims in (
        ("activation_partitioning_dims", activation_partitioning_dims),
        ("parameter_partitioning_dims", parameter_partitioning_dims),
    ):
        if dims not in (1, 2):
            raise ValueError(f"{name} = {dims}; expected 1 or 2.")
    rules: list[tuple[str, str | None]] = [
        ("batch", "data"),
        ("vocab", "model"),
        ("mlp", "model"),
        ("heads", "model"),
        ("kv", None),
        ("joined_kv", "model"),
    ]
    if activation_partitioning_dims == 2:
        rules.append(("embed", "model"))
    if parameter_partitioning_dims == 2:
        rules.append(("embed", "data"))
    if activation_partitioning_dims == parameter_partitioning_dims == 1:
        rules.append(("embed", None))
    replicated = ("relpos_buckets", "length", "layers")
    return [*rules, *((name, None) for name in replicated), *additional_rules]


def single_slice_mesh(devices: Sequence[jax.Device], num_partitions: int) -> Mesh:
    """A ('data', 'model') mesh; 'model' is the fast axis, so that its devices are neighbours.

    Raises:
      ValueError: if `num_partitions` does not divide the devices.
    """
    if num_partitions < 1 or len(devices) % num_partitions:
        raise ValueError(
            f"PjitPartitioner.num_partitions = {num_partitions} does not divide the "
            f"{len(devices)} devices; expected one of "
            f"{[n for n in range(1, len(devices) + 1) if len(devices) % n == 0]}."
        )
    return Mesh(np.asarray(devices).reshape(-1, num_partitions), ("data", "model"))


def multi_slice_mesh(
    devices: Sequence[jax.Device], ici_mesh_shape: Sequence[int], dcn_mesh_shape: Sequence[int]
) -> Mesh:
    """A ('replica', 'data', 'model') mesh over slices that a slower network (DCN) joins.

    Each axis is as long as the product of its two numbers, and its part over slices is the outer
    one: devices whose positions on an axis differ within `ici_mesh_shape` are of one slice. Where
    devices are of no slices, as GPUs and CPUs, each process's devices are one.

    Args:
      devices: of all slices.
      ici_mesh_shape: lengths of the three axes within a slice.
      dcn_mesh_shape: lengths of the three axes over slices.

    Raises:
      ValueError: if the shapes are not of three positive numbers, or do not fit the devices.
    """
    for name, shape in (("ici_mesh_shape", ici_mesh_shape), ("dcn_mesh_shape", dcn_mesh_shape)):
        if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
            raise ValueError(
                f"PjitPartitioner.{name} = {shape!r}; expected three positive numbers, the lengths "
                f"of {MESH_AXES}."
            )
    slices = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    of_processes = len(slices) == 1 and devices[0].platform != "tpu"
    if of_processes:
        slices = collections.Counter(device.process_index for device in devices)
    what = "processes" if of_processes else "slices"
    if math.prod(dcn_mesh_shape) != len(slices):
        raise ValueError(
            f"PjitPartitioner.dcn_mesh_shape = {tuple(dcn_mesh_shape)} is for "
            f"{math.prod(dcn_mesh_shape)} slices, but the devices are of {len(slices)} {what}; "
            f"expected numbers whose product is {len(slices)}, such as ({len(slices)}, 1, 1)."
        )
    sizes = set(slices.values())
    if sizes != {math.prod(ici_mesh_shape)}:
        raise ValueError(
            f"PjitPartitioner.ici_mesh_shape = {tuple(ici_mesh_shape)} is for "
            f"{math.prod(ici_mesh_shape)} devices per slice, but the {what} have {sorted(sizes)}; "
            f"expected numbers whose product is {min(sizes)}, such as (1, {min(sizes)}, 1)."
        )
    grid = mesh_utils.create_hybrid_device_mesh(
        ici_mesh_shape, dcn_mesh_shape, devices, process_is_granule=of_processes
    )
    return Mesh(grid, MESH_AXES)


class PjitPartitioner:
    """Runs functions over a mesh.

    Attributes:
      mesh: ('data', 'model'), or ('replica', 'data', 'model') over several slices.
      logical_axis_rules: logical axis -> mesh axis, or axes.
      batch_sharding: of batches, split over 'data', and over 'replica' where there is one.
      replicated: of what every device holds whole.
      num_data_shards: data-parallel parts, each of which reads its own share of the data.
    """

    def __init__(
        self,
        num_partitions: int = 1,
        logical_axis_rules: LogicalAxisRules | None = None,
        devices: Sequence[jax.Device] | None = None,
        ici_mesh_shape: Sequence[int] | None = None,
        dcn_mesh_shape: Sequence[int] | None = None,
    ):
        """Lays out the mesh.

        Args:
          num_partitions: devices that share one copy of the model.
          logical_axis_rules: by default the standard rules. Over several slices 'batch' is split
            over 'replica' and 'data', as in T5X.
          devices: by default all.
          ici_mesh_shape: for several slices, lengths of ('replica', 'data', 'model') within a
            slice; `num_partitions` is then left at 1.
          dcn_mesh_shape: the same over slices; given together with `ici_mesh_shape`.

        Raises:
          ValueError: if the devices cannot be divided so.
        """
        devices = jax.devices() if devices is None else devices
        rules = standard_logical_axis_rules() if logical_axis_rules is None else logical_axis_rules
        data_axes: tuple[str, ...] = ("data",)
        if ici_mesh_shape is None and dcn_mesh_shape is None:
            self.mesh = single_slice_mesh(devices, num_partitions)
        elif ici_mesh_shape is None or dcn_mesh_shape is None or num_partitions != 1:
            raise ValueError(
                f"PjitPartitioner: ici_mesh_shape = {ici_mesh_shape}, dcn_mesh_shape = "
                f"{dcn_mesh_shape}, num_partitions = {num_partitions}; expected both shapes and "
                "num_partitions = 1 for several slices, or num_partitions alone for one."
            )
        else:
            self.mesh = multi_slice_mesh(devices, ici_mesh_shape, dcn_mesh_shape)
            data_axes = MESH_AXES[:2]
            rules = [(name, data_axes if name == "batch" else axis) for name, axis in rules]
        self.logical_axis_rules = rules
        self.num_data_shards = math.prod(self.mesh.shape[axis] for axis in data_axes)
        self.batch_sharding = NamedSharding(self.mesh, PartitionSpec(data_axes))
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        here = jax.process_index()
        parts = [
            [device.process_index for device in part]
            for part in self.mesh.devices.reshape(self.num_data_shards, -1)
        ]
        self._shards = tuple(shard for shard, part in enumerate(parts) if here in part)
        self._saved = tuple(shard for shard, part in enumerate(parts) if here == part[0])

    def data_layout(self, batch_size: int) -> DataLayout:
        """What this process reads of global batches of `batch_size` examples.

        Raises:
          ValueError: if they do not divide among the data-parallel parts.
        """
        return DataLayout(batch_size, self.num_data_shards, self._shards, self._saved)

    def param_shardings(self, params_axes: Any) -> Any:
        """Shardings of parameters from their 'params_axes' collection, a tree like the params."""
        logical = flax.core.unfreeze(nn_partitioning.get_axis_names(params_axes))
        with nn_partitioning.axis_rules(self.logical_axis_rules):
            specs = jax.tree.map(
                nn_partitioning.logical_to_mesh_axes,
                logical,
                is_leaf=lambda x: isinstance(x, PartitionSpec),
            )
        return jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec),
            specs,
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )

    def shard_batch(self, batch: Batch) -> dict[str, jax.Array]:
        """Global arrays from this process's rows.

        Args:
          batch: `[rows, ...]` each, shard by shard as `data_layout` says.
        """

        def place(value: np.ndarray) -> jax.Array:
            size = len(value) // len(self._shards)

            def rows_of(index: tuple[slice, ...]) -> np.ndarray:
                start = self._shards.index((index[0].start or 0) // size) * size
                return value[start : start + size]

            shape = (size * self.num_data_shards, *value.shape[1:])
            return jax.make_array_from_callback(shape, self.batch_sharding, rows_of)

        return {name: place(value) for name, value in batch.items()}

    def gather(self, tree: Any) -> Any:
        """Whole numpy arrays, on every process, of arrays that are split over devices."""
        if jax.process_count() == 1:
            return jax.device_get(tree)
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(tree, tiled=True)

    def jit(self, fn: Callable[..., Any], **kwargs: Any) -> JittedFunction:
        """`jax.jit` in which flax's sharding constraints mean this mesh and these rules.

        Args:
          fn: the function.
          **kwargs: for `jax.jit`.
        """

        def in_context(*args: Any) -> Any:
            with nn_partitioning.axis_rules(self.logical_axis_rules):
                return fn(*args)

        return JittedFunction(jax.jit(in_context, **kwargs), self.mesh)


class JittedFunction:
    """A jitted function that is called, lowered and compiled inside its mesh."""

    def __init__(self, jitted: Any, mesh: Mesh):
        self._jitted = jitted
        self._mesh = mesh

    def __call__(self, *args: Any) -> Any:
        with jax.set_mesh(self._mesh):
            return self._jitted(*args)

    def lower(self, *args: Any) -> Any:
        """The lowered program, for looking at and for compiling ahead of time."""
        with jax.set_mesh(self._mesh):
            return self._jitted.lower(*args)

    def eval_shape(self, *args: Any) -> Any:
        """Shapes and dtypes of the result."""
        with jax.set_mesh(self._mesh):
            return self._jitted.eval_shape(*args)
