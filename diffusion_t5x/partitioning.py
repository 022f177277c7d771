"""Meshes, logical axis rules, and jit over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.core
import jax
import numpy as np
from flax.linen import partitioning as nn_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LogicalAxisRules = Sequence[tuple[str, str | None]]
Batch = Mapping[str, np.ndarray]


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


@dataclasses.dataclass(frozen=True)
class DataLayout:
    """How a global batch is dealt to processes.

    Attributes:
      batch_size: examples per process.
      shard_index: this process's share.
      num_shards: number of shares.
    """

    batch_size: int
    shard_index: int
    num_shards: int


class PjitPartitioner:
    """Runs functions over a ('data', 'model') mesh.

    Attributes:
      mesh: of all devices; 'model' is the fast axis, so that its devices are neighbours.
      logical_axis_rules: logical axis -> mesh axis.
      batch_sharding: of batches, split over 'data'.
      replicated: of what every device holds whole.
    """

    def __init__(
        self,
        num_partitions: int = 1,
        logical_axis_rules: LogicalAxisRules | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Lays out the mesh.

        Args:
          num_partitions: devices that share one copy of the model.
          logical_axis_rules: by default the standard rules.
          devices: by default all.

        Raises:
          ValueError: if the devices cannot be divided so.
        """
        devices = jax.devices() if devices is None else devices
        if num_partitions < 1 or len(devices) % num_partitions:
            raise ValueError(
                f"PjitPartitioner.num_partitions = {num_partitions} does not divide the "
                f"{len(devices)} devices; expected one of "
                f"{[n for n in range(1, len(devices) + 1) if len(devices) % n == 0]}."
            )
        grid = np.asarray(devices).reshape(-1, num_partitions)
        self.mesh = Mesh(grid, ("data", "model"))
        self.logical_axis_rules = (
            standard_logical_axis_rules() if logical_axis_rules is None else logical_axis_rules
        )
        self.batch_sharding = NamedSharding(self.mesh, PartitionSpec("data"))
        self.replicated = NamedSharding(self.mesh, PartitionSpec())

    def data_layout(self, batch_size: int) -> DataLayout:
        """This process's share of global batches of `batch_size` examples.

        Raises:
          ValueError: if they do not divide among the 'data' axis and the processes.
        """
        parts = self.mesh.shape["data"]
        if batch_size % parts or batch_size % jax.process_count():
            raise ValueError(
                f"BATCH_SIZE = {batch_size} does not divide among {parts} data-parallel parts in "
                f"{jax.process_count()} processes; the next that does: "
                f"{-(-batch_size // parts) * parts}."
            )
        count = jax.process_count()
        return DataLayout(batch_size // count, jax.process_index(), count)

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
        """Global arrays from this process's rows."""
        return {
            name: jax.make_array_from_process_local_data(self.batch_sharding, value)
            for name, value in batch.items()
        }

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
