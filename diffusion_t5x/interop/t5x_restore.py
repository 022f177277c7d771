"""What T5X is told to do as it restores a checkpoint of our models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusion_t5x.interop.t5x_checkpoints import flatten


def require_parameters(
    state_dict: Mapping[str, Any],
    target_state_dict: Mapping[str, Any],
    *,
    is_resuming: bool = False,
) -> Mapping[str, Any]:
    """A `state_transformation_fn` of T5X's that changes nothing, but lets no parameter be missing.

    T5X's `fallback_to_scratch`, which lets an optimiser start afresh, would also let a parameter
    whose name differs start afresh, without a word.

    Args:
      state_dict: of the checkpoint.
      target_state_dict: of the model and optimiser.
      is_resuming: whether the run goes on from a checkpoint of its own.

    Raises:
      ValueError: listing the parameters that the checkpoint lacks.
    """
    del is_resuming
    have, need = flatten(state_dict["target"]), flatten(target_state_dict["target"])
    if missing := sorted(need.keys() - have.keys()):
        raise ValueError(
            "the checkpoint lacks parameters of the model; python -m diffusion_t5x.convert "
            "--format=t5x turns checkpoints of T5X's networks into ones of ours:\n"
            + "\n".join(f"  {name}" for name in missing)
        )
    return state_dict
