"""Arrays of a checkpoint that are read on demand."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from numpy.typing import DTypeLike

from diffusion_t5x.runtime.terminal import Progress


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in a checkpoint, whose values are read on demand.

    Attributes:
      source: Its name in the checkpoint; the first and last name if it is stacked from several.
    """

    source: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def derive(
        self, shape: Sequence[int], change: Callable[[np.ndarray], np.ndarray]
    ) -> StoredArray:
        """Returns a transformed copy of `shape`, to whose values `change` is applied on read."""
        return dataclasses.replace(self, shape=tuple(shape), read=lambda: change(self.read()))

    def reshape(self, *shape: int) -> StoredArray:
        """Returns a copy in another shape, given in full."""
        return self.derive(shape, lambda x: x.reshape(shape))

    def cast(self, dtype: DTypeLike) -> StoredArray:
        """Returns a copy of another type."""
        dtype = np.dtype(dtype)
        return dataclasses.replace(
            self, dtype=dtype, read=lambda: self.read().astype(dtype, copy=False)
        )


def read_together(
    leaves: Mapping[str, Any], item: str, read: Callable[[], Mapping[str, np.ndarray]]
) -> dict[str, StoredArray]:
    """Returns arrays of an item that are all read, by `read`, once the first is asked for.

    Args:
      leaves: Anything with the shape and dtype of each array, by name.
      item: Name of the item, for the arrays' `source`.
    """
    read = functools.cache(read)
    return {
        name: StoredArray(
            f"{item}/{name}",
            tuple(leaf.shape),
            np.dtype(leaf.dtype),
            functools.partial(lambda name: read()[name], name),
        )
        for name, leaf in leaves.items()
    }


def unstack(stored: StoredArray, axis: int) -> list[StoredArray]:
    """Returns one array for each index of `axis`; read in turn, they read `stored` once."""
    count = stored.shape[axis]
    shape = stored.shape[:axis] + stored.shape[axis + 1 :]
    held: list[np.ndarray] = []  # `stored`, from the first layer read until all have been
    num_read = 0

    def take(index: int) -> np.ndarray:
        nonlocal num_read
        if not held:
            held.append(stored.read())
        layer = np.ascontiguousarray(np.take(held[0], index, axis=axis))
        num_read += 1
        if num_read % count == 0:
            held.clear()
        return layer

    return [
        StoredArray(
            f"{stored.source}[layer {index}]", shape, stored.dtype, functools.partial(take, index)
        )
        for index in range(count)
    ]


def stack(layers: Sequence[StoredArray], axis: int) -> StoredArray:
    """Returns the arrays of several layers, of one shape, stacked along a new axis.

    They are read one at a time into their places.

    Raises:
      ValueError: If their shapes differ.
    """
    shapes = {layer.shape for layer in layers}
    if len(shapes) > 1:
        raise ValueError(f"{layers[0].source} differs in shape between layers: {shapes}.")
    shape = (*layers[0].shape[:axis], len(layers), *layers[0].shape[axis:])

    def read() -> np.ndarray:
        stacked = np.empty(shape, layers[0].dtype)
        for place, layer in zip(np.moveaxis(stacked, axis, 0), layers, strict=True):
            place[...] = layer.read()
        return stacked

    return StoredArray(
        source=f"{layers[0].source} … {layers[-1].source}" if len(layers) > 1 else layers[0].source,
        shape=shape,
        dtype=layers[0].dtype,
        read=read,
    )


def read_each(
    stored: Mapping[str, StoredArray], description: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Reads arrays one at a time under a progress bar; yields the name and values of each."""
    with Progress(len(stored), description, "arrays") as progress:
        for name, array in stored.items():
            yield name, array.read()
            progress.update()


def place(stored: Mapping[str, StoredArray], abstract: Mapping[str, Any], description: str) -> Any:
    """Reads arrays onto the devices, one at a time, as a nested dictionary.

    Args:
      stored: The arrays, by names such as 'decoder/final_layer_norm/scale'.
      abstract: `jax.ShapeDtypeStruct`s of their types and shardings, under the same names.
      description: Description for the progress bar.
    """
    cast = {name: array.cast(abstract[name].dtype) for name, array in stored.items()}
    placed = {}
    for name, values in read_each(cast, description):
        leaf = abstract[name]
        placed[name] = jax.make_array_from_callback(leaf.shape, leaf.sharding, values.__getitem__)
    return flax.traverse_util.unflatten_dict(placed, sep="/")
