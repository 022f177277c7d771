"""Merges the factors of low-rank adaptation (`networks/low_rank.py`) into the kernels beside them.

Everything needed is in the parameters themselves: `kernel + low_rank_scale * low_rank_a @
low_rank_b` (arXiv 2106.09685, equation 3).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import numpy as np

from diffusion_t5x.interop.stored_arrays import StoredArray

_FACTOR = re.compile(r"^(.*/)low_rank_(?:a|b|scale)$")


def is_low_rank(name: str) -> bool:
    """Returns whether a parameter is one that low-rank adaptation adds to a network."""
    return _FACTOR.match(name) is not None


def merge_low_rank(stored: Mapping[str, StoredArray]) -> dict[str, StoredArray]:
    """Returns the parameters of an ordinary network, computed in float64, each kernel in its dtype.

    Parameters without low-rank factors are returned as they are.

    Args:
      stored: Parameters of each layer under our names, as `reading.open_params` opens them.

    Raises:
      ValueError: If a kernel, a factor or its scale is missing, or their shapes do not fit.
    """
    merged = {name: array for name, array in stored.items() if not is_low_rank(name)}
    for prefix in sorted({m.group(1) for name in stored if (m := _FACTOR.match(name))}):
        names = [prefix + part for part in ("kernel", "low_rank_a", "low_rank_b", "low_rank_scale")]
        for name in names:
            if name not in stored:
                raise ValueError(f"the checkpoint lacks {name}, without which nothing is merged.")
        kernel, a, b, scale = (stored[name] for name in names)
        fits = (a.shape[:1] + b.shape[1:], a.shape[1:]) == (kernel.shape, b.shape[:1])
        if not fits or np.prod(scale.shape) != 1:
            raise ValueError(
                f"{prefix}: a kernel {kernel.shape} and factors {a.shape}, {b.shape}, scale "
                f"{scale.shape}; expected [in, out], [in, rank], [rank, out] and a number."
            )
        change = functools.partial(_add_product, a, b, scale)
        merged[names[0]] = kernel.derive(kernel.shape, change)
    return {name: merged[name] for name in stored if name in merged}


def _add_product(
    a: StoredArray, b: StoredArray, scale: StoredArray, kernel: np.ndarray
) -> np.ndarray:
    one, other, factor = (x.read().astype(np.float64) for x in (a, b, scale))
    return (kernel + factor.reshape(()) * (one @ other)).astype(kernel.dtype)
