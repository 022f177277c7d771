"""What training carries from step to step, and how it lies on the devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.core
import flax.struct
import jax
import jax.numpy as jnp

from diffusion_t5x.runtime.partitioning import PjitPartitioner

Shapes = Mapping[str, tuple[int, ...]]


@flax.struct.dataclass
class TrainState:
    """Parameters and optimiser state after `step` updates.

    Attributes:
      step: scalar int32.
      params: the network's parameters.
      opt_state: the optimiser's state.
    """

    step: jax.Array
    params: Any
    opt_state: Any


def input_shapes_and_types(
    element_spec: Mapping[str, tuple[tuple[int, ...], Any]],
) -> tuple[Shapes, Mapping[str, Any]]:
    """Shapes and dtypes with which to initialise: one row suffices."""
    shapes = {name: (1, *shape[1:]) for name, (shape, _) in element_spec.items()}
    return shapes, {name: dtype for name, (_, dtype) in element_spec.items()}


def _abstract_variables(model: Any, shapes: Shapes, types: Mapping[str, Any]) -> Mapping[str, Any]:
    return jax.eval_shape(
        lambda rng: flax.core.unfreeze(model.get_initial_variables(rng, shapes, types)),
        jax.random.PRNGKey(0),
    )


def _with_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def abstract_params(
    model: Any, partitioner: PjitPartitioner, shapes: Shapes, types: Mapping[str, Any]
) -> Any:
    """Shapes, dtypes and shardings of the parameters, as `jax.ShapeDtypeStruct`s."""
    variables = _abstract_variables(model, shapes, types)
    shardings = partitioner.param_shardings(variables["params_axes"])
    return _with_shardings(variables["params"], shardings)


def abstract_train_state(
    model: Any, partitioner: PjitPartitioner, shapes: Shapes, types: Mapping[str, Any]
) -> TrainState:
    """Shapes, dtypes and shardings of the whole state.

    Optimiser state that is shaped like a parameter lies as that parameter does; what is smaller
    than one (Adafactor's factors, counters) is on every device.
    """
    params = abstract_params(model, partitioner, shapes, types)
    opt_state = jax.eval_shape(model.optimizer_def.init, params)
    by_path = {jax.tree_util.keystr(path): leaf for path, leaf in _leaves(params)}

    def place(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = partitioner.replicated
        for start in range(len(path)):
            param = by_path.get(jax.tree_util.keystr(path[start:]))
            if param is not None and param.shape == leaf.shape:
                sharding = param.sharding
                break
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=partitioner.replicated)
    return TrainState(
        step=step,
        params=params,
        opt_state=jax.tree_util.tree_map_with_path(place, opt_state),
    )


def create_params(
    model: Any,
    partitioner: PjitPartitioner,
    shapes: Shapes,
    types: Mapping[str, Any],
    rng: jax.Array,
) -> Any:
    """Fresh parameters, made where they lie."""

    def init(rng: jax.Array) -> Any:
        return flax.core.unfreeze(model.get_initial_variables(rng, shapes, types)["params"])

    abstract = abstract_params(model, partitioner, shapes, types)
    return partitioner.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))(rng)


def create_train_state(
    model: Any,
    partitioner: PjitPartitioner,
    shapes: Shapes,
    types: Mapping[str, Any],
    rng: jax.Array,
) -> TrainState:
    """A fresh state, made where it lies: no device ever holds the whole of a split array."""
    abstract = abstract_train_state(model, partitioner, shapes, types)

    def init(rng: jax.Array) -> TrainState:
        params = flax.core.unfreeze(model.get_initial_variables(rng, shapes, types)["params"])
        return TrainState(jnp.int32(0), params, model.optimizer_def.init(params))

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return partitioner.jit(init, out_shardings=shardings)(rng)


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by names such as 'decoder/layers_0/mlp/wo/kernel'."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in _leaves(tree)}
