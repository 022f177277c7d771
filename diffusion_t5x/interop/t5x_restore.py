"""A `state_transformation_fn` for T5X that rejects checkpoints with missing parameters."""

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
    """Checks that T5X finds every parameter of our model in a checkpoint; returns `state_dict`.

    T5X's `fallback_to_scratch`, which an optimiser needs to start fresh, would also silently
    initialise parameters whose names differ. T5X passes `is_resuming`.

    Raises:
      ValueError: If the checkpoint lacks parameters; the message lists them.
    """
    del is_resuming
    have, need = flatten(state_dict["target"]), flatten(target_state_dict["target"])
    if missing := sorted(need.keys() - have.keys()):
        raise ValueError(
            "the checkpoint lacks parameters of the model; python -m diffusion_t5x.convert "
            "--format=t5x converts checkpoints of T5X's networks for our models:\n"
            + "\n".join(f"  {name}" for name in missing)
        )
    return state_dict
