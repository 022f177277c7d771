"""Whether the names and shapes in a checkpoint are those of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from diffusion_t5x.interop import t5x_networks
from diffusion_t5x.runtime.train_state import named_leaves


class CheckpointMismatchError(ValueError):
    """A checkpoint does not fit the model; the message lists names and shapes that differ."""


def _describe(leaf: Any) -> str:
    return f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"


def compare(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Lines that say in which names and shapes `stored` differs from `expected`."""
    lines = [f"  the checkpoint lacks {name}: {_describe(expected[name])}"
             for name in sorted(expected.keys() - stored.keys())]  # fmt: skip
    lines += [f"  the model has no {name}: {_describe(stored[name])}"
              for name in sorted(stored.keys() - expected.keys())]  # fmt: skip
    lines += [
        f"  {name}: the checkpoint has {list(stored[name].shape)}, the model "
        f"{list(expected[name].shape)}"
        for name in sorted(expected.keys() & stored.keys())
        if tuple(stored[name].shape) != tuple(expected[name].shape)
    ]
    return lines


def check_fit(path: str, item: str, stored: Mapping[str, Any], abstract: Any) -> None:
    """Compares names and shapes of a stored item with those expected.

    Raises:
      CheckpointMismatchError: if they differ.
    """
    if lines := compare(stored, named_leaves(abstract)):
        what = "optimiser" if item == "optimizer" else "model"
        hint = t5x_networks.hint(lines)
        if item == "optimizer":
            hint = "\nWith RestoreCheckpointConfig.params_only = True the optimiser starts afresh."
        raise CheckpointMismatchError(
            f"{path} does not fit this {what}:\n" + "\n".join(lines) + hint
        )
