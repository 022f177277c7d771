"""Layers apart or stacked (`TransformerConfig.scan_layers`): the same arrays by other names.

A network, and an optimiser state that has arrays of its parameters' names, holds either an array
for each layer, such as 'decoder/layers_0/mlp/wo/kernel', or one with a leading axis of layers,
'decoder/layers/mlp/wo/kernel'. What Adafactor has in place of an array that it does not need, a
zero, is the same in both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

_LAYER = re.compile(r"^(.*\b(?:encoder|decoder)/layers)_(\d+)(/.*)$")
_STACKED = re.compile(r"\b(?:encoder|decoder)/layers/")


def is_stacked(names: Iterable[str]) -> bool:
    """Returns whether these are names of stacked layers."""
    return any(map(_STACKED.search, names))


def differ(stored: Iterable[str], expected: Iterable[str]) -> bool:
    """Returns whether one has its layers stacked and the other apart."""
    stored, expected = list(stored), list(expected)
    return (is_stacked(stored) and bool(_groups(expected))) or (
        is_stacked(expected) and bool(_groups(stored))
    )


def _groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns the names of single layers, in order, by the name that they have when stacked."""
    groups: dict[str, dict[int, str]] = {}
    for name in names:
        if match := _LAYER.match(name):
            before, number, after = match.groups()
            groups.setdefault(before + after, {})[int(number)] = name
    return {stacked: [of[n] for n in sorted(of)] for stacked, of in groups.items()}


def shapes_as(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the stored arrays' shapes and dtypes by the names of the other layout, `expected`'s.

    Layers that differ in shape stay apart.
    """
    result = dict(stored)
    if is_stacked(expected):
        for stacked, names in _groups(stored).items():
            leaf, shapes = stored[names[0]], {tuple(stored[name].shape) for name in names}
            if len(shapes) > 1:
                continue
            shape = (len(names), *leaf.shape)
            if stacked in expected and tuple(expected[stacked].shape) in shapes:
                shape = tuple(leaf.shape)
            result = {name: x for name, x in result.items() if name not in names}
            result[stacked] = jax.ShapeDtypeStruct(shape, leaf.dtype)
        return result
    for stacked, names in _groups(expected).items():
        if (leaf := result.pop(stacked, None)) is None:
            continue
        if tuple(expected[names[0]].shape) == tuple(leaf.shape):
            result |= dict.fromkeys(names, leaf)
            continue
        before, _, after = _LAYER.match(names[0]).groups()  # type: ignore[union-attr]
        one = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        result |= {f"{before}_{number}{after}": one for number in range(leaf.shape[0])}
    return result


def abstract_as_stored(
    stored: Mapping[str, Any], expected: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns how to restore arrays of the other layout than `expected`, which they fit.

    They have the dtypes of `expected`, and lie on the devices where their parts will.
    """
    if is_stacked(expected):
        pairs = {name: stacked for stacked, names in _groups(stored).items() for name in names}
    else:
        pairs = {stacked: names[0] for stacked, names in _groups(expected).items()}

    def describe(name: str) -> jax.ShapeDtypeStruct:
        wanted, shape = expected[pairs.get(name, name)], tuple(stored[name].shape)
        sharding = wanted.sharding
        if len(shape) != len(wanted.shape) and isinstance(sharding, NamedSharding):
            spec = (None, *sharding.spec) if len(shape) > len(wanted.shape) else sharding.spec[1:]
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, wanted.dtype, sharding=sharding)

    return {name: describe(name) for name in stored}


def convert(
    arrays: dict[str, jax.Array], expected: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Stacks layers, or takes them apart, as `expected` has them; empties `arrays`.

    Devices hold one parameter twice at a time, of all layers.

    Args:
      arrays: As `abstract_as_stored` describes them.
    """
    result = {}
    if is_stacked(expected):
        for stacked, names in _groups(arrays).items():
            layers = [arrays.pop(name) for name in names]
            wanted = expected[stacked]
            if layers[0].shape == wanted.shape:
                result[stacked] = layers[0]
            else:
                result[stacked] = _jit(jnp.stack, wanted.sharding)(layers)
    else:
        for stacked, names in _groups(expected).items():
            whole, wanted = arrays.pop(stacked), expected[names[0]]
            if whole.shape == wanted.shape:  # arrays of their own, which steps may donate
                result |= {name: jnp.array(whole, copy=True) for name in names}
            else:
                parts = _jit(jnp.unstack, (wanted.sharding,) * len(names))(whole)
                result |= dict(zip(names, parts, strict=True))
    result |= arrays
    arrays.clear()
    return result


def _jit(function: Any, sharding: Sharding | tuple[Sharding, ...]) -> Any:
    return jax.jit(function, out_shardings=sharding)
