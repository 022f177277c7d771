"""Reads parameters and train states from checkpoints that fit the model.

They are ours, T5X's, or models of Hugging Face's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from diffusion_t5x import paths
from diffusion_t5x.checkpointing import integrity, layer_layouts
from diffusion_t5x.interop import hf_models, t5x_checkpoints, t5x_networks
from diffusion_t5x.interop.low_rank import is_low_rank
from diffusion_t5x.interop.stored_arrays import StoredArray, place, read_together
from diffusion_t5x.runtime.train_state import TrainState, named_leaves, replace, select

# Which parameters of a checkpoint: their moving average where it has one, or as they are.
PARAMETERS = ("averaged", "raw")


class CheckpointMismatchError(ValueError):
    """A checkpoint does not fit the model; the message lists names and shapes that differ."""


def compare(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Returns a line for each difference in names and shapes of anything with shapes and dtypes."""

    def describe(leaf: Any) -> str:
        return f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"

    missing = sorted(expected.keys() - stored.keys())
    unknown = sorted(stored.keys() - expected.keys())
    lines = [f"  the checkpoint lacks {name}: {describe(expected[name])}" for name in missing]
    lines += [f"  the model has no {name}: {describe(stored[name])}" for name in unknown]
    for name in sorted(expected.keys() & stored.keys()):
        have, need = list(stored[name].shape), list(expected[name].shape)
        if have != need:
            lines.append(f"  {name}: the checkpoint has {have}, the model {need}")
    return lines


def optimizer_item(state: TrainState) -> dict[str, Any]:
    """Returns the contents of the item `optimizer` for a state, its step included."""
    return {"step": state.step, "opt_state": flax.serialization.to_state_dict(state.opt_state)}


def has_optimizer_state(path: str) -> bool:
    """Returns whether a checkpoint holds an optimiser state that can be restored: ours may."""
    return (epath.Path(path) / "optimizer").exists()


def items_of(parameters: str) -> tuple[str, ...]:
    """Returns the items of a checkpoint that hold parameters, of `PARAMETERS`, if it has them."""
    return ("params", "average") if parameters == "averaged" else ("params",)


def has_average(path: str) -> bool:
    """Returns whether a checkpoint holds a moving average of parameters."""
    return (epath.Path(path) / "average").exists()


# What settings add to a network -> whether a parameter belongs to it. A run that starts from a
# checkpoint that lacks all of it begins with fresh ones; no other parameter begins so.
ADDITIONS: Mapping[str, Callable[[str], object]] = {
    "low-rank factors": is_low_rank,
    "embeddings of extra tokens": re.compile(r"(^|/)extra_embedding$").search,
    "self-conditioning": re.compile(r"(^|/)self_conditioning").search,
}


def lacking_additions(path: str, names: Iterable[str]) -> tuple[str, ...]:
    """Returns those of `ADDITIONS` that parameters have and a checkpoint lacks; reads no array."""
    stored: Iterable[str] = ()
    item = epath.Path(path).absolute() / "params"
    if t5x_checkpoints.is_t5x_checkpoint(path):
        stored = t5x_checkpoints.open_checkpoint(path).params
    elif item.exists():
        stored = named_leaves(_stored_tree(item))
    added = {kind: belongs for kind, belongs in ADDITIONS.items() if any(map(belongs, names))}
    return tuple(kind for kind, belongs in added.items() if not any(map(belongs, stored)))


def read_step(path: str) -> int:
    """Reads the step of a checkpoint; 0 if it has none, as with parameters alone."""
    if t5x_checkpoints.is_t5x_checkpoint(path):
        return t5x_checkpoints.open_checkpoint(path).step
    item = epath.Path(path).absolute() / "optimizer"
    if not item.exists():
        return 0
    tree = {"step": ocp.RestoreArgs(restore_type=np.ndarray)}
    args = ocp.args.PyTreeRestore(item={"step": 0}, restore_args=tree, partial_restore=True)
    return int(ocp.PyTreeCheckpointer().restore(item, args)["step"])


def check_params(path: str, abstract_params: Any) -> None:
    """Checks that the parameters of a checkpoint fit; reads no array.

    Raises:
      FileNotFoundError: If `path` is not a checkpoint.
      CheckpointMismatchError: If they do not fit.
      ValueError: If it is a model of Hugging Face's whose files contradict each other.
    """
    if integrity.is_foreign(path):
        _open_fitting(path, abstract_params)
    else:
        check_item(path, "params", abstract_params)


def check_item(path: str, item: str, abstract: Any) -> Any:
    """Checks that the arrays of an item ('params', 'average', 'optimizer') fit, and returns them.

    That is, a tree of their shapes and dtypes. Layers may be stacked where the model's are apart.

    Raises:
      FileNotFoundError: If there is no such item.
      CheckpointMismatchError: If it does not fit.
    """
    tree = _stored_tree(_item(path, item))
    _check_fit(path, item, named_leaves(tree), abstract)
    return tree


def restore_train_state(
    path: str, abstract_state: TrainState, parameters: str = "raw"
) -> TrainState:
    """Restores the whole state from a checkpoint of ours that has been verified.

    The state has an average if both the checkpoint and `abstract_state` have one, and `parameters`
    are 'raw'.

    Args:
      path: The checkpoint, as `checkpoints.newest_undamaged` returns it.
      abstract_state: `jax.ShapeDtypeStruct`s of the state, with the shardings to restore it onto.
      parameters: Which parameters, of `PARAMETERS`.

    Raises:
      FileNotFoundError: If `path` is not a checkpoint.
      CheckpointMismatchError: If it does not fit.
    """
    params = restore_params(path, abstract_state.params, verify=False, parameters=parameters)
    average = None
    if parameters == "raw" and abstract_state.average is not None and has_average(path):
        average = _restore_item(path, "average", abstract_state.average)
    rest = _restore_item(path, "optimizer", optimizer_item(abstract_state))
    opt_state = flax.serialization.from_state_dict(abstract_state.opt_state, rest["opt_state"])
    return TrainState(rest["step"], params, opt_state, average)


def restore_params(
    path: str, abstract_params: Any, *, verify: bool = True, parameters: str = "averaged"
) -> Any:
    """Restores the parameters of a checkpoint of any run, ours or T5X's, or of a model.

    Says so if they are averaged.

    Args:
      path: The checkpoint.
      abstract_params: `jax.ShapeDtypeStruct`s, with the shardings to restore parameters onto.
      verify: Whether to compare the files with their checksums; False if that was done when the
        checkpoint was selected.
      parameters: Which parameters, of `PARAMETERS`.

    Raises:
      FileNotFoundError: If `path` is not a checkpoint.
      DamagedCheckpointError: If a file is missing, truncated or changed.
      CheckpointMismatchError: If the parameters do not fit.
    """
    if integrity.is_foreign(path):
        stored = _open_fitting(path, abstract_params)
        return place(stored, named_leaves(abstract_params), f"reading {path}")
    if verify:
        integrity.verify(path, items_of(parameters))
    if parameters == "raw" or not has_average(path):
        return _restore_item(path, "params", abstract_params)
    if jax.process_index() == 0:
        print(note_averaged(path), flush=True)
    stored, expected = (
        named_leaves(_stored_tree(_item(path, "average"))),
        named_leaves(abstract_params),
    )
    if layer_layouts.differ(stored, expected):
        stored = layer_layouts.shapes_as(stored, expected)
    if stored.keys() >= expected.keys():
        return _restore_item(path, "average", abstract_params)
    wanted = select(abstract_params, stored.__contains__)
    params = _restore_item(path, "params", abstract_params)  # of which some were frozen
    return replace(params, _restore_item(path, "average", wanted))


def note_averaged(path: str) -> str:
    """Returns the line that says that averaged parameters are taken."""
    return f"{path}: the moving average of the parameters is taken ('raw' takes them as they are)."


def open_params(path: str, rows: int = 0, parameters: str = "averaged") -> dict[str, StoredArray]:
    """Opens the parameters of a checkpoint, verified; arrays are read on demand.

    They are those of each layer under our names, such as 'decoder/layers_0/mlp/wo/kernel'.

    Args:
      path: The checkpoint.
      rows: Rows that the embedding of a model of Hugging Face's has at least; added ones are 0.
      parameters: Which parameters, of `PARAMETERS`.

    Raises:
      FileNotFoundError: If `path` is not a checkpoint.
      DamagedCheckpointError: If a file is missing, truncated or changed.
      ValueError: If it is T5X's, of an unknown network, or a model whose files contradict each
        other.
    """
    if hf_models.is_model(path):
        return hf_models.open_params(path, rows)
    if t5x_checkpoints.is_t5x_checkpoint(path):
        params = t5x_checkpoints.open_checkpoint(path).params
        if t5x_networks.begins_with_zero(params) and jax.process_index() == 0:
            print(
                f"{path}: this network expects a 0 before each text; set "
                "TransformerConfig.start_token = True."
            )
        return t5x_networks.to_ours(params)
    integrity.verify(path, items_of(parameters), alone=True)
    stored = _open_item(_item(path, "params"))
    if parameters == "averaged" and has_average(path):
        stored |= _open_item(_item(path, "average"))
    return t5x_networks.to_ours(stored)


def _open_item(item: epath.Path) -> dict[str, StoredArray]:
    def read() -> dict[str, Any]:
        return named_leaves(jax.device_get(ocp.StandardCheckpointer().restore(item)))

    return read_together(named_leaves(_stored_tree(item)), item.name, read)


def _open_fitting(path: str, abstract_params: Any) -> dict[str, StoredArray]:
    """Opens the parameters of others' checkpoint in the layout of the model, which they fit."""
    expected = named_leaves(abstract_params)
    embedding = expected.get(hf_models.EMBEDDING)
    stored = open_params(path, 0 if embedding is None else embedding.shape[0])
    if t5x_networks.is_scanned(expected):
        stored = t5x_networks.scan(stored)
    _check_fit(path, "params", stored, abstract_params)
    return stored


def _restore_item(path: str, item: str, abstract: Any) -> Any:
    """Restores an item of ours, in the model's layout of layers."""
    tree = check_item(path, item, abstract)
    directory, stored, expected = _item(path, item), named_leaves(tree), named_leaves(abstract)
    if not layer_layouts.differ(stored, expected):
        return ocp.StandardCheckpointer().restore(directory, abstract)
    described = layer_layouts.abstract_as_stored(stored, expected)
    described = jax.tree.unflatten(jax.tree.structure(tree), list(described.values()))
    arrays = named_leaves(ocp.StandardCheckpointer().restore(directory, described))
    converted = layer_layouts.convert(arrays, expected)
    return jax.tree.unflatten(jax.tree.structure(abstract), [converted[n] for n in expected])


def _item(path: str, item: str) -> epath.Path:
    directory = paths.as_path(path, "CHECKPOINT_PATH") / item
    if not directory.exists():
        raise FileNotFoundError(f"{path} is not a checkpoint of ours: it has no {item!r}.")
    return directory


def _stored_tree(item: epath.Path) -> Any:
    """Returns the shapes and dtypes of the arrays in an Orbax item, a tree."""
    metadata = ocp.StandardCheckpointer().metadata(item).item_metadata
    return getattr(metadata, "tree", metadata)


def _check_fit(path: str, item: str, stored: Mapping[str, Any], abstract: Any) -> None:
    expected = named_leaves(abstract)
    if differ := layer_layouts.differ(stored, expected):
        stored = layer_layouts.shapes_as(stored, expected)
    lines = compare(stored, expected)
    if not lines:
        return
    part, hint = "model", t5x_networks.hint(lines)
    if item == "optimizer":
        part = "optimiser"
        hint = "\nRestoreCheckpointConfig.params_only = True starts with a fresh optimiser state."
    if differ:
        keep = not layer_layouts.is_stacked(expected)
        hint += f"\nTransformerConfig.scan_layers = {keep} is the layout of the checkpoint."
    raise CheckpointMismatchError(f"{path} does not fit this {part}:\n" + "\n".join(lines) + hint)
