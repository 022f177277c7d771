"""Sizes of networks that benchmarks run, without anything that needs SeqIO."""

from __future__ import annotations

import dataclasses

import numpy as np

KEY = np.zeros(2, np.uint32)  # jax.random.PRNGKey(0), without starting a backend


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of a decoder-only network."""

    vocab_size: int = 384
    embed_dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    head_dim: int = 64
    mlp_dim: int = 1024


# Those of gin/models/, and one to see that a benchmark runs.
_DIMENSIONS = {
    "tiny": (64, 2, 2, 32, 128),
    "base": (768, 12, 12, 64, 2048),
    "large": (1024, 24, 16, 64, 2816),
    "xl": (2048, 24, 32, 64, 5120),
}


def of_size(name: str, vocab_size: int) -> Shape:
    """Returns the shape of a named size at a vocabulary."""
    return Shape(vocab_size, *_DIMENSIONS[name])
