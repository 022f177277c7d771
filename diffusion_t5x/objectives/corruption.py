"""Corruption: how a clean target becomes the canvas that a model learns to denoise."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class UniformCorruption:
    """Replaces tokens, independently, by tokens drawn uniformly from the vocabulary.

    At corruption rate `r` each token is replaced with probability `r`; noise may equal what it
    replaced, so a token differs with probability `r * (1 - 1 / vocab_size)`. The rate of an example
    is drawn from U(min_rate, max_rate), in the paper from U(0, 1) (arXiv 2112.06749, section 2.2;
    arXiv 2401.17181, section 4.1). Prefixes are never corrupted.

    Attributes:
      vocab_size: noise is drawn from [0, vocab_size).
      min_rate, max_rate: the range of the corruption rate.
    """

    vocab_size: int
    min_rate: float = 0.0
    max_rate: float = 1.0

    def __post_init__(self):
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size = {self.vocab_size}; expected at least 2.")
        if not 0.0 <= self.min_rate <= self.max_rate <= 1.0:
            raise ValueError(
                f"min_rate = {self.min_rate}, max_rate = {self.max_rate}; "
                "expected 0 <= min_rate <= max_rate <= 1."
            )

    @property
    def forbidden(self) -> tuple[int, ...]:
        """Forbids no token: every token of the vocabulary may be text."""
        return ()

    def sample_rate(self, rng: Array, batch_size: int) -> Array:
        """Draws from U(min_rate, max_rate)."""
        return jax.random.uniform(rng, (batch_size,), minval=self.min_rate, maxval=self.max_rate)

    def corrupt(self, rng: Array, tokens: Array, rate: Array) -> tuple[Array, Array]:
        """Replaces each token with probability `rate`."""
        where_rng, what_rng = jax.random.split(rng)
        changed = jax.random.uniform(where_rng, tokens.shape) < rate[:, None]
        return jnp.where(changed, self.prior(what_rng, tokens.shape), tokens), changed

    def prior(self, rng: Array, shape: tuple[int, ...]) -> Array:
        """Draws every token from the vocabulary."""
        return jax.random.randint(rng, shape, 0, self.vocab_size, dtype=jnp.int32)
