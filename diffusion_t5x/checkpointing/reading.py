"""Reading checkpoints: their parameters and train states, found whole and fitting."""

from __future__ import annotations

from typing import Any

import flax.serialization
import jax
import orbax.checkpoint as ocp
from etils import epath

from diffusion_t5x.checkpointing import integrity
from diffusion_t5x.checkpointing.fit import check_fit
from diffusion_t5x.interop import t5x_checkpoints, t5x_networks
from diffusion_t5x.interop.stored_arrays import StoredArray, place, read_together
from diffusion_t5x.runtime.train_state import TrainState, named_leaves


def optimizer_item(state: TrainState) -> dict[str, Any]:
    """What the item `optimizer` holds of a state."""
    return {
        "step": state.step,
        "opt_state": flax.serialization.to_state_dict(state.opt_state),
    }


def _stored_leaves(item: epath.Path) -> dict[str, Any]:
    """Names, shapes and dtypes in an Orbax item."""
    metadata = ocp.StandardCheckpointer().metadata(item).item_metadata
    return named_leaves(getattr(metadata, "tree", metadata))


def _check_item(path: str, item: str, abstract: Any) -> epath.Path:
    """The directory of an item that fits."""
    directory = epath.Path(path).absolute() / item
    if not directory.exists():
        raise FileNotFoundError(f"{path} is not a checkpoint of this kind: it has no {item!r}.")
    check_fit(path, item, _stored_leaves(directory), abstract)
    return directory


def _restore_item(path: str, item: str, abstract: Any) -> Any:
    return ocp.StandardCheckpointer().restore(_check_item(path, item, abstract), abstract)


def open_params(path: str) -> dict[str, StoredArray]:
    """The parameters of a checkpoint, ours or T5X's, under our names, one per layer.

    Raises:
      FileNotFoundError: if `path` is no checkpoint.
      DamagedCheckpointError: if a file is not as it was written.
      ValueError: if it is one of T5X's with a network that is not known here.
    """
    if t5x_checkpoints.is_t5x_checkpoint(path):
        params = t5x_checkpoints.open_checkpoint(path).params
        if t5x_networks.begins_with_zero(params) and jax.process_index() == 0:
            print(
                f"{path}: T5X begins each of its texts with a 0; so does "
                "TransformerConfig.start_token = True."
            )
        return t5x_networks.to_ours(params)
    directory = epath.Path(path).absolute() / "params"
    if not directory.exists():
        raise FileNotFoundError(f"{path} is not a checkpoint: it has no 'params'.")
    integrity.verify(path, ("params",))

    def read() -> dict[str, Any]:
        return named_leaves(jax.device_get(ocp.StandardCheckpointer().restore(directory)))

    stored = read_together(_stored_leaves(directory), "params", read)
    return t5x_networks.to_ours(stored)


def has_optimizer_state(path: str) -> bool:
    """Whether training can go on from a checkpoint with its optimiser's state; not T5X's."""
    return (epath.Path(path) / "optimizer").exists()


def restore_params(path: str, abstract_params: Any) -> Any:
    """Parameters of a checkpoint of any run, ours or T5X's, laid out as `abstract_params` says.

    Raises:
      FileNotFoundError: if `path` is no checkpoint.
      DamagedCheckpointError: if a file is not as it was written.
      CheckpointMismatchError: if they do not fit.
    """
    integrity.verify(path, ("params",))
    return read_params(path, abstract_params)


def read_params(path: str, abstract_params: Any) -> Any:
    """As `restore_params`, of a checkpoint that was found whole."""
    if not t5x_checkpoints.is_t5x_checkpoint(path):
        return _restore_item(path, "params", abstract_params)
    stored = _open_t5x_params(path, abstract_params)
    return place(stored, named_leaves(abstract_params), f"reading {path}")


def _open_t5x_params(path: str, abstract_params: Any) -> dict[str, StoredArray]:
    """The parameters of a T5X checkpoint, which fit."""
    stored = open_params(path)
    if t5x_networks.is_scanned(named_leaves(abstract_params)):
        stored = t5x_networks.scan(stored)
    check_fit(path, "params", stored, abstract_params)
    return stored


def check_params(path: str, abstract_params: Any) -> None:
    """Checks that `restore_params` could read a checkpoint; no array is read.

    Raises:
      FileNotFoundError: if `path` is no checkpoint.
      CheckpointMismatchError: if they do not fit.
    """
    if t5x_checkpoints.is_t5x_checkpoint(path):
        _open_t5x_params(path, abstract_params)
    else:
        _check_item(path, "params", abstract_params)


def check_train_state(path: str, abstract_state: TrainState) -> None:
    """Checks that `restore_train_state` could read a checkpoint; no array is read.

    Raises:
      FileNotFoundError: if `path` is no checkpoint.
      CheckpointMismatchError: if it does not fit.
    """
    check_params(path, abstract_state.params)
    _check_item(path, "optimizer", optimizer_item(abstract_state))


def restore_train_state(path: str, abstract_state: TrainState) -> TrainState:
    """The whole state of a checkpoint of any run, laid out as `abstract_state` says.

    Raises:
      FileNotFoundError: if `path` is no checkpoint.
      DamagedCheckpointError: if a file is not as it was written.
      CheckpointMismatchError: if it does not fit.
    """
    integrity.verify(path, ("params", "optimizer"))
    return read_train_state(path, abstract_state)


def read_train_state(path: str, abstract_state: TrainState) -> TrainState:
    """As `restore_train_state`, of a checkpoint that was found whole."""
    params = read_params(path, abstract_state.params)
    rest = _restore_item(path, "optimizer", optimizer_item(abstract_state))
    opt_state = flax.serialization.from_state_dict(abstract_state.opt_state, rest["opt_state"])
    return TrainState(rest["step"], params, opt_state)
