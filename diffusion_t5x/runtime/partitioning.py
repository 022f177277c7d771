"""Meshes of devices, logical axis rules, and jit over them."""

from __future__ import annotations

import collections
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.core
import flax.linen as nn
import jax
import numpy as np
from flax.linen import partitioning as nn_partitioning
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_t5x.data.data_shards import DataLayout

LogicalAxisRules = Sequence[tuple[str, str | tuple[str, ...] | None]]
Batch = Mapping[str, np.ndarray]
MESH_AXES = ("replica", "data", "model")
# A person who waits for less wonders about nothing, and small runs stay quiet.
WORTH_TELLING_SECONDS = 1.0


def standard_logical_axis_rules(
    activation_partitioning_dims: int = 1,
    parameter_partitioning_dims: int = 1,
    additional_rules: LogicalAxisRules = (),
) -> LogicalAxisRules:
    """Returns T5X's standard rules, which map each logical axis to a mesh axis.

    In all variants 'batch' is split over 'data', and heads, feed-forward and vocabulary over
    'model'; 2-D activations also split 'embed' over 'model', 2-D parameters over 'data'. If both
    are 2-D, an array uses the first rule whose mesh axis it does not use yet.

    Args:
      activation_partitioning_dims: Number of dimensions of activations that are split, 1 or 2.
      parameter_partitioning_dims: Number of dimensions of parameters that are split, 1 or 2.
      additional_rules: Rules to append to the standard ones.

    Raises:
      ValueError: If a number of dimensions is neither 1 nor 2.
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
    replicated = ("relpos_buckets", "abspos_buckets", "length", "layers", "low_rank")
    return [*rules, *((name, None) for name in replicated), *additional_rules]


def single_slice_mesh(devices: Sequence[jax.Device], num_partitions: int) -> Mesh:
    """Returns a ('data', 'model') mesh; 'model' is the fast axis: its devices are neighbours.

    Raises:
      ValueError: If `num_partitions` does not divide the devices.
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
    """Returns a ('replica', 'data', 'model') mesh over slices joined by a slower network (DCN).

    An axis is as long as the product of its lengths within a slice and over slices, the outer one:
    devices whose positions differ by less than `ici_mesh_shape` share a slice. Devices without
    slices, such as GPUs and CPUs, count as one slice per process.

    Raises:
      ValueError: If a shape is not three positive numbers, or does not fit the devices.
    """
    for name, shape in (("ici_mesh_shape", ici_mesh_shape), ("dcn_mesh_shape", dcn_mesh_shape)):
        if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
            raise ValueError(
                f"PjitPartitioner.{name} = {shape!r}; expected three positive numbers, the lengths "
                f"of {MESH_AXES}."
            )
    slices = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    by_process = len(slices) == 1 and devices[0].platform != "tpu"
    if by_process:
        slices = collections.Counter(device.process_index for device in devices)
    kind = "processes" if by_process else "slices"
    if math.prod(dcn_mesh_shape) != len(slices):
        raise ValueError(
            f"PjitPartitioner.dcn_mesh_shape = {tuple(dcn_mesh_shape)} is for "
            f"{math.prod(dcn_mesh_shape)} slices, but the devices are of {len(slices)} {kind}; "
            f"expected numbers whose product is {len(slices)}, such as ({len(slices)}, 1, 1)."
        )
    sizes = set(slices.values())
    if sizes != {math.prod(ici_mesh_shape)}:
        raise ValueError(
            f"PjitPartitioner.ici_mesh_shape = {tuple(ici_mesh_shape)} is for "
            f"{math.prod(ici_mesh_shape)} devices per slice, but the {kind} have {sorted(sizes)}; "
            f"expected numbers whose product is {min(sizes)}, such as (1, {min(sizes)}, 1)."
        )
    grid = mesh_utils.create_hybrid_device_mesh(
        ici_mesh_shape, dcn_mesh_shape, devices, process_is_granule=by_process
    )
    return Mesh(grid, MESH_AXES)


class PjitPartitioner:
    """A mesh, the rules by which arrays are split over it, and jit over both.

    Attributes:
      mesh: A ('data', 'model') mesh, or ('replica', 'data', 'model') over several slices.
      logical_axis_rules: Pairs of a logical axis and the mesh axis or axes it is split over.
      batch_sharding: Sharding of batches, over 'data', and over 'replica' if there is one.
      replicated: Sharding of arrays that every device holds whole.
      num_data_shards: Number of data-parallel shards, each of which reads its own examples.
      compile_seconds: Wall seconds that `compile` took, by name of the program.
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
          num_partitions: Number of devices that share one copy of the model.
          logical_axis_rules: Rules; None for the standard ones. Over several slices, 'batch' is
            split over 'replica' and 'data', as in T5X.
          devices: Devices; None for all.
          ici_mesh_shape: For several slices, lengths of ('replica', 'data', 'model') within a
            slice; `num_partitions` is then left at 1.
          dcn_mesh_shape: For several slices, lengths of the axes over slices; required together
            with `ici_mesh_shape`.

        Raises:
          ValueError: If the devices cannot be divided that way.
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
        self.compile_seconds: dict[str, float] = {}
        here = jax.process_index()
        # The processes of each data shard's devices: [num_data_shards][devices of a shard].
        owners = [
            [device.process_index for device in row]
            for row in self.mesh.devices.reshape(self.num_data_shards, -1)
        ]
        self._shards = tuple(shard for shard, row in enumerate(owners) if here in row)
        self._saved = tuple(shard for shard, row in enumerate(owners) if here == row[0])

    def data_layout(self, batch_size: int) -> DataLayout:
        """Returns the rows that this process reads of global batches of `batch_size` examples.

        Raises:
          ValueError: If the data-parallel shards do not divide them.
        """
        return DataLayout(batch_size, self.num_data_shards, self._shards, self._saved)

    def param_shardings(self, params_axes: Any) -> Any:
        """Returns the shardings of parameters, a tree like them.

        Args:
          params_axes: Flax's collection of the same name, which names the axes of each parameter.
        """
        names = flax.core.unfreeze(nn_partitioning.get_axis_names(params_axes))
        return nn.logical_to_mesh_sharding(names, self.mesh, self.logical_axis_rules)

    def shard_batch(self, batch: Batch) -> dict[str, jax.Array]:
        """Returns global arrays `[batch, ...]`.

        Args:
          batch: This process's rows, `[rows, ...]` each, in the order of its data shards.
        """

        def place(value: np.ndarray) -> jax.Array:
            size = len(value) // len(self._shards)  # rows of a shard

            def rows_of(index: tuple[slice, ...] | None) -> np.ndarray:
                first_row = (index[0].start or 0) if index else 0  # of the global array
                start = self._shards.index(first_row // size) * size
                return value[start : start + size]

            shape = (size * self.num_data_shards, *value.shape[1:])
            return jax.make_array_from_callback(shape, self.batch_sharding, rows_of)

        return {name: place(value) for name, value in batch.items()}

    def gather(self, tree: Any) -> Any:
        """Returns whole numpy arrays on every process, from arrays that are split over devices."""
        if jax.process_count() == 1:
            return jax.device_get(tree)
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(tree, tiled=True)

    def jit(self, fn: Callable[..., Any], **kwargs: Any) -> JittedFunction:
        """Applies `jax.jit`; this mesh and its rules resolve the sharding constraints of flax."""

        def in_context(*args: Any) -> Any:
            with nn_partitioning.axis_rules(self.logical_axis_rules):
                return fn(*args)

        return JittedFunction(jax.jit(in_context, **kwargs), self.mesh)

    def compile(
        self,
        name: str,
        function: JittedFunction,
        *args: Any,
        options: Mapping[str, Any] | None = None,
    ) -> jax.stages.Compiled:
        """Traces and compiles a function, and counts the seconds in `compile_seconds`.

        They are printed if somebody has waited for them, from `WORTH_TELLING_SECONDS` on, and to
        standard error, like progress: results are on standard output.

        Args:
          name: What the program is, for people, such as 'training step'.
          *args: Arguments to compile for, or their `jax.ShapeDtypeStruct`s.
          options: Options of the compiler.
        """
        started = time.monotonic()
        compiled = function.lower(*args).compile(dict(options) if options else None)
        seconds = time.monotonic() - started
        self.compile_seconds[name] = self.compile_seconds.get(name, 0.0) + seconds
        if seconds >= WORTH_TELLING_SECONDS and jax.process_index() == 0:
            print(f"compiled {name} in {seconds:.1f} s", file=sys.stderr, flush=True)
        return compiled


class JittedFunction:
    """A jitted function that is called, lowered and compiled inside its mesh."""

    def __init__(self, jitted: Any, mesh: Mesh):  # of `jax.jit`, whose type is private
        self._jitted = jitted
        self._mesh = mesh

    def __call__(self, *args: Any) -> Any:
        with jax.set_mesh(self._mesh):
            return self._jitted(*args)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """Lowers the function for ahead-of-time compilation; returns a `jax.stages.Lowered`."""
        with jax.set_mesh(self._mesh):
            return self._jitted.lower(*args)

    def eval_shape(self, *args: Any) -> Any:
        """Returns shapes and dtypes of the result."""
        with jax.set_mesh(self._mesh):
            return self._jitted.eval_shape(*args)
