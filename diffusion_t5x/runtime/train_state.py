"""The state that training carries from step to step, and its layout over the devices.

Arguments of the functions below: `shapes` and `types`, input shapes `[rows, length]` and dtypes to
initialise with, by feature; `rng`, the key of the initial values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp

from diffusion_t5x.interfaces import Model
from diffusion_t5x.runtime.partitioning import JittedFunction, PjitPartitioner

Shapes = Mapping[str, tuple[int, ...]]
# Input shapes for initialising a network whose parameters alone are wanted: they do not depend on
# batch size and lengths.
INIT_SHAPES: Shapes = {"encoder_input_tokens": (1, 8), "decoder_input_tokens": (1, 8)}


class TrainState(flax.struct.PyTreeNode):
    """Parameters, and optimiser state of those that are trained, after `step` updates (int32).

    `average` is the moving average of the trained parameters, float32; None if a run keeps none.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    average: Any = None

    @property
    def evaluated_params(self) -> Any:
        """Returns the parameters to evaluate: the average, and as they are those without one."""
        if self.average is None:
            return self.params
        params = named_leaves(self.params)
        average = {n: x.astype(params[n].dtype) for n, x in named_leaves(self.average).items()}
        return replace(self.params, flax.traverse_util.unflatten_dict(average, sep="/"))


def input_shapes_and_types(
    element_spec: Mapping[str, tuple[tuple[int, ...], Any]],
) -> tuple[Shapes, Mapping[str, Any]]:
    """Returns shapes and dtypes to initialise a network with, of one row, which suffices.

    Args:
      element_spec: Feature -> (shape `[rows, length]`, dtype).
    """
    shapes = {name: (1, *shape[1:]) for name, (shape, _) in element_spec.items()}
    return shapes, {name: dtype for name, (_, dtype) in element_spec.items()}


def abstract_params(
    model: Model, partitioner: PjitPartitioner, shapes: Shapes, types: Mapping[str, Any]
) -> Any:
    """Returns the parameters as `jax.ShapeDtypeStruct`s with shardings."""
    variables = jax.eval_shape(
        lambda rng: model.get_initial_variables(rng, shapes, types), jax.random.PRNGKey(0)
    )
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        variables["params"],
        partitioner.param_shardings(variables["params_axes"]),
    )


def abstract_train_state(
    model: Model, partitioner: PjitPartitioner, shapes: Shapes, types: Mapping[str, Any]
) -> TrainState:
    """Returns the train state as `jax.ShapeDtypeStruct`s with shardings.

    Optimiser state of a parameter's shape is sharded like that parameter; smaller arrays
    (Adafactor's factors, counters) are replicated.
    """
    params = abstract_params(model, partitioner, shapes, types)
    by_path = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        # A moment's path ends with its parameter's, such as `[0].mu['decoder']['kernel']`.
        ends = (by_path.get(jax.tree_util.keystr(path[start:])) for start in range(len(path)))
        alike = (param for param in ends if param is not None and param.shape == leaf.shape)
        sharding = next((param.sharding for param in alike), partitioner.replicated)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    opt_state = jax.tree_util.tree_map_with_path(
        place, jax.eval_shape(model.optimizer_def.init, select(params, model.is_trained))
    )
    return TrainState(place((), jax.ShapeDtypeStruct((), jnp.int32)), params, opt_state)


def initialisation(
    model: Model, partitioner: PjitPartitioner, shapes: Shapes, types: Mapping[str, Any]
) -> JittedFunction:
    """Returns the function of a key that initialises a train state."""
    abstract = abstract_train_state(model, partitioner, shapes, types)

    def init(rng: jax.Array) -> TrainState:
        params = model.get_initial_variables(rng, shapes, types)["params"]
        opt_state = model.optimizer_def.init(select(params, model.is_trained))
        return TrainState(jnp.int32(0), params, opt_state)

    return partitioner.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))


def create_train_state(
    model: Model,
    partitioner: PjitPartitioner,
    shapes: Shapes,
    types: Mapping[str, Any],
    rng: jax.Array,
) -> TrainState:
    """Initialises a train state in its shards: no device ever holds a sharded array whole."""
    init = initialisation(model, partitioner, shapes, types)
    state: TrainState = partitioner.compile("initialisation", init, rng)(rng)
    return state


def select(params: Any, keep: Callable[[str], bool]) -> Any:
    """Returns those of nested parameters, such as the trained ones, whose names are kept."""
    named = flax.traverse_util.flatten_dict(params, sep="/")
    kept = {name: leaf for name, leaf in named.items() if keep(name)}
    return params if len(kept) == len(named) else flax.traverse_util.unflatten_dict(kept, sep="/")


def replace(params: Any, some: Any) -> Any:
    """Returns nested parameters with `some` of them, of the same names, replaced or added."""
    flat = flax.traverse_util.flatten_dict
    return flax.traverse_util.unflatten_dict({**flat(params), **flat(some)})


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves by names such as 'decoder/layers_0/mlp/wo/kernel'."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
