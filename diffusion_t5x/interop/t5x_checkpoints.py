"""Reads and writes T5X's checkpoints without T5X.

T5X has two layouts of `checkpoint_{step}/`. The older, which every T5X reads, is a msgpack file
`checkpoint` whose leaves are arrays, or TensorStore specs of zarr arrays beside it. The newer is an
Orbax item `state/`. Both hold a tree with the parameters under `target`, the step under
`state/step` and the optimiser state under `state/param_states`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from diffusion_t5x import paths
from diffusion_t5x.interop.stored_arrays import StoredArray, read_each, read_together
from diffusion_t5x.runtime import orbax_buckets  # noqa: F401 (for Orbax)

INDEX = "checkpoint"
STATE = "state"
VERSION = 3  # since 2021: bfloat16 is stored as such
CHUNK_BYTES = 64 * 2**20
_PLACEHOLDER = "PLACEHOLDER://"


@dataclasses.dataclass(frozen=True)
class T5XCheckpoint:
    """A T5X checkpoint, as far as we use it.

    Attributes:
      params: Its parameters, by names such as 'decoder/decoder_norm/scale'.
      has_optimizer_state: Whether it has an optimiser state, which is not read.
    """

    step: int
    params: dict[str, StoredArray]
    has_optimizer_state: bool


def is_t5x_checkpoint(path: str) -> bool:
    """Returns whether a directory is a T5X checkpoint, in either layout."""
    directory = epath.Path(path)
    return (directory / STATE).is_dir() or (directory / INDEX).is_file()


def open_checkpoint(path: str) -> T5XCheckpoint:
    """Reads the index of a T5X checkpoint; parameters are read on demand.

    Raises:
      ValueError: If it is not a T5X checkpoint, or has no parameters.
    """
    directory = epath.Path(path)
    if (directory / STATE).is_dir():
        return _open_orbax(directory)
    return _open_indexed(directory)


def _step(state: Mapping[str, Any], directory: epath.Path) -> int:
    """Returns the step in a checkpoint's state, else the one in its name."""
    step = state.get("step")
    if step is not None and np.ndim(step) == 0:
        return int(step)
    match = re.search(r"(\d+)$", directory.name)
    return int(match.group(1)) if match else 0


def _check(directory: epath.Path, params: Mapping[str, StoredArray]) -> None:
    if not params:
        raise ValueError(f"{directory} has no parameters: its index lacks 'target'.")
    for name, array in params.items():
        if not np.issubdtype(array.dtype, np.floating) and array.dtype != ml_dtypes.bfloat16:
            raise ValueError(
                f"{directory}: {name} is {array.dtype}; expected a floating type. Checkpoints that "
                "T5X wrote before June 2021 store bfloat16 as uint16, which T5X no longer reads."
            )


# ------------------- The older layout ----------------------------------------


def _is_spec(value: Any) -> bool:
    return isinstance(value, dict) and "driver" in value and "kvstore" in value


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves of a tree in an index, by names such as 'decoder/decoder_norm/scale'."""
    return flax.traverse_util.flatten_dict(tree, is_leaf=lambda _, x: _is_spec(x), sep="/")


def kvstore(path: str) -> dict[str, Any]:
    """Returns TensorStore's spec of a directory, local or in a bucket."""
    spec = paths.kvstore(path.rstrip("/"))
    return {**spec, "path": f"{spec['path']}/"}


def _location(leaf: Any) -> str:
    """Returns the directory of the array that a leaf of the index points to, or ''."""
    if isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
        return leaf.removeprefix(_PLACEHOLDER)
    if _is_spec(leaf):
        # Old versions of TensorStore have the path in the spec itself.
        return (leaf.get("path") or leaf["kvstore"]["path"]).strip("/")
    return ""


def _open_indexed(directory: epath.Path) -> T5XCheckpoint:
    content = (directory / INDEX).read_bytes()
    if content.startswith(b"model_checkpoint_path"):
        raise ValueError(
            f"{directory} is a TensorFlow checkpoint of Mesh TensorFlow's T5; convert it with "
            "T5X's scripts/convert_tf_checkpoint.py first."
        )
    try:
        index = flax.serialization.msgpack_restore(content)
    except Exception as error:
        raise ValueError(f"{directory / INDEX} is not an index of T5X's: {error}") from error
    index = index.get("optimizer", index) if isinstance(index, dict) else {}
    leaves = {k: v for k, v in flatten(index.get("target", {})).items() if v is not None}
    # All are opened at once, since each takes a round trip in a bucket.
    opened = {
        name: ts.open({"driver": "zarr", "kvstore": kvstore(str(directory / _location(leaf)))})
        for name, leaf in leaves.items()
        if _location(leaf)
    }
    params = {}
    for name, leaf in leaves.items():
        source = f"target/{name}"
        if name in opened:
            store = opened[name].result()
            read = functools.partial(lambda store: store.read().result(), store)
            params[name] = StoredArray(source, store.shape, store.dtype.numpy_dtype, read)
        else:
            value = np.asarray(leaf)
            params[name] = StoredArray(
                source, value.shape, value.dtype, functools.partial(np.asarray, value)
            )
    _check(directory, params)
    state = index.get("state", {})
    return T5XCheckpoint(_step(state, directory), params, bool(state.get("param_states")))


# ------------------- The newer layout -----------------------------------------


def _open_orbax(directory: epath.Path) -> T5XCheckpoint:
    checkpointer = ocp.PyTreeCheckpointer()
    path = directory / STATE
    metadata = checkpointer.metadata(path).item_metadata
    tree = getattr(metadata, "tree", metadata)
    target = tree.get("target", {})

    def restore(item: Any) -> Any:
        """Restores NumPy arrays: they may not fit one device, and have no sharding yet."""
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        return checkpointer.restore(
            path, ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
        )

    params = read_together(
        flatten(target), "target", lambda: flatten(restore({"target": target})["target"])
    )
    _check(directory, params)
    state = tree.get("state", {})
    step = restore({"state": {"step": state["step"]}})["state"] if "step" in state else {}
    return T5XCheckpoint(_step(step, directory), params, bool(state.get("param_states")))


# ------------------- Writing ---------------------------------------------------


def write_checkpoint(directory: str, step: int, params: Mapping[str, StoredArray]) -> str:
    """Writes `{directory}/checkpoint_{step}`, atomically, in the layout that every T5X reads.

    Returns the checkpoint's path.

    Raises:
      FileExistsError: If it exists.
    """
    final = epath.Path(directory) / f"checkpoint_{step}"
    if is_t5x_checkpoint(str(final)) or (final.exists() and not paths.is_remote(final)):
        raise FileExistsError(f"{final} already exists; remove it, or write elsewhere.")
    # No directory of a bucket can be renamed: there the index, written last, makes a checkpoint.
    temporary = final if paths.is_remote(final) else final.with_name(f"{final.name}.tmp")
    if temporary.exists():
        temporary.rmtree()  # of a writer that was killed
    temporary.mkdir(parents=True)
    try:
        _write(temporary, step, params)
    except BaseException:
        temporary.rmtree()
        raise
    if temporary != final:
        temporary.rename(final)
    return str(final)


def _write(directory: epath.Path, step: int, params: Mapping[str, StoredArray]) -> None:
    specs = {
        name: _write_array(directory, f"target.{name.replace('/', '.')}", value)
        for name, value in read_each(params, f"writing {directory.with_suffix('')}")
    }
    target = flax.traverse_util.unflatten_dict(specs, sep="/")
    index = {
        "version": VERSION,
        "optimizer": {"target": target, "state": {"step": np.int32(step)}},
    }
    (directory / INDEX).write_bytes(flax.serialization.msgpack_serialize(index))


def _write_array(directory: epath.Path, name: str, array: np.ndarray) -> dict[str, Any]:
    """Writes one zarr array; returns its leaf in the index."""
    chunks = _chunks(array.shape, CHUNK_BYTES // array.dtype.itemsize)
    metadata = {"compressor": {"id": "gzip"}, "shape": list(array.shape), "chunks": chunks}
    spec = {"driver": "zarr", "dtype": array.dtype.name, "metadata": metadata}
    address = kvstore(str(directory / name))
    ts.open({**spec, "kvstore": address}, create=True).result().write(array).result()
    relative: dict[str, Any] = {"driver": address["driver"], "path": name}
    if "bucket" in address:
        relative["bucket"] = "t5x-dummy-bucket"  # as T5X writes it; the index names no real bucket
    return {**spec, "kvstore": relative}


def _chunks(shape: tuple[int, ...], elements: int) -> list[int]:
    """Returns chunk sizes that divide `shape` evenly and have at most `elements` elements."""
    chunks = list(shape)
    while np.prod(chunks) > elements:
        axis = int(np.argmax(chunks))
        divisor = next(d for d in range(2, chunks[axis] + 1) if chunks[axis] % d == 0)
        chunks[axis] //= divisor
    return chunks
