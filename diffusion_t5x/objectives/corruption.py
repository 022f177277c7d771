"""Corruption: how a clean target becomes the canvas that a model learns to denoise.

At time `t` a token is still itself with probability `clean(t)`, the mask token with probability
`mask(t)`, and else drawn uniformly from all other tokens (`interfaces.Masses`). The three classes
differ in these functions alone; a schedule says how fast noise grows with time.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from diffusion_t5x.interfaces import Masses
from diffusion_t5x.names import check_known

Array = jax.Array
SCHEDULES = ("linear", "cosine", "polynomial")


@dataclasses.dataclass(frozen=True)
class ScheduledCorruption(abc.ABC):
    """What all kinds of noise share.

    Attributes:
      vocab_size: tokens of text and noise are in [0, vocab_size).
      schedule: the rate at time `t`: 'linear' is `t`; 'cosine' `1 - cos(pi t / 2)`, as in MDLM
        (arXiv 2406.07524); 'polynomial' `t ** power`, as in MD4 (arXiv 2406.04329).
      power: of the polynomial.
      min_rate, max_rate: the rates at times 0 and 1; the schedule is stretched between them.
      per_token: draw a time for each token, not for each example.
      antithetic: spread the times of a batch evenly, one in each of as many equal parts of [0, 1]
        as there are times, all at the same place of their part (arXiv 2107.00630, appendix I).
    """

    vocab_size: int
    _: dataclasses.KW_ONLY
    schedule: str = "linear"
    power: float = 2.0
    min_rate: float = 0.0
    max_rate: float = 1.0
    per_token: bool = False
    antithetic: bool = False

    def __post_init__(self):
        check_known(self.schedule, SCHEDULES, f"{type(self).__name__}.schedule")
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size = {self.vocab_size}; expected at least 2.")
        if self.power <= 0:
            raise ValueError(f"power = {self.power}; expected a positive number.")
        if not 0.0 <= self.min_rate <= self.max_rate <= 1.0:
            raise ValueError(
                f"min_rate = {self.min_rate}, max_rate = {self.max_rate}; "
                "expected 0 <= min_rate <= max_rate <= 1."
            )

    def sample_times(self, rng: Array, batch_size: int, length: int) -> Array:
        """Draws from U(0, 1): `[batch_size, length]` with `per_token`, else `[batch_size, 1]`."""
        shape = (batch_size, length if self.per_token else 1)
        if not self.antithetic:
            return jax.random.uniform(rng, shape)
        place_rng, order_rng = jax.random.split(rng)
        count = batch_size * shape[1]
        times = (jnp.arange(count) + jax.random.uniform(place_rng)) / count
        # Permuted, since the rows of a batch go to devices and microbatches by their order.
        return jax.random.permutation(order_rng, times).reshape(shape)

    def _progress(self, times: Array) -> Array:
        """Returns the schedule's value, from 0 to 1, stretched to the range of rates."""
        if self.schedule == "cosine":
            times = 2.0 * jnp.sin(times * (jnp.pi / 4)) ** 2  # exact where it is small
        elif self.schedule == "polynomial":
            times = times**self.power
        return times * (self.max_rate - self.min_rate) + self.min_rate

    def full_range(self) -> Self:
        """Returns the same noise from a clean text to pure noise, at one time for each text."""
        return dataclasses.replace(self, min_rate=0.0, max_rate=1.0, per_token=False)

    @property
    def forbidden(self) -> tuple[int, ...]:
        """Returns the tokens that only noise has."""
        return ()

    @property
    def only_masks(self) -> bool:
        """Returns whether the mask token is all the noise that there is."""
        return False

    @property
    @abc.abstractmethod
    def num_uniform(self) -> int:
        """Returns how many tokens uniform noise has."""

    @abc.abstractmethod
    def masses(self, times: Array) -> Masses:
        """Returns what tokens have become at `times`, differentiable in them."""

    @abc.abstractmethod
    def is_noise(self, tokens: Array) -> Array:
        """Marks the tokens that can only be noise."""

    def rate(self, times: Array) -> Array:
        """Returns the probability that a token was replaced, of the shape of `times`."""
        masses = self.masses(times)
        return masses.mask + masses.uniform

    def corrupt(self, rng: Array, tokens: Array, times: Array) -> tuple[Array, Array]:
        """Replaces each token, independently, with probability `rate(times)`."""
        where_rng, what_rng = jax.random.split(rng)
        masses = self.masses(times)
        changed = jax.random.uniform(where_rng, tokens.shape) < masses.mask + masses.uniform
        return jnp.where(changed, self._noise(what_rng, tokens.shape, masses), tokens), changed

    @abc.abstractmethod
    def _noise(self, rng: Array, shape: tuple[int, ...], masses: Masses) -> Array:
        """Draws noise in the shares that `masses` has of it."""

    def prior(self, rng: Array, shape: tuple[int, ...]) -> Array:
        """Draws the canvas at time 1."""
        return self._noise(rng, shape, self.masses(jnp.ones([1] * len(shape))))

    def posterior(
        self, rng: Array, canvas: Array, clean: Array, times: Array, earlier: Array
    ) -> Array:
        """Draws from q(earlier canvas | canvas, clean text) (arXiv 2107.03006, equation 3).

        What has become noise since `earlier` is drawn anew from q(earlier canvas | clean text); the
        rest stays. With `a = clean(times) / clean(earlier)`, a token `z` stays with odds of `a`
        times its probability at `earlier`, against the mass of noise at `z` that has come since.
        """
        keep_rng, draw_rng = jax.random.split(rng)
        now, before = self.masses(times), self.masses(earlier)
        kept = now.clean / jnp.maximum(before.clean, 1e-30)

        def noise(masses: Masses) -> Array:
            each = masses.uniform / self.num_uniform
            return jnp.where(self.is_noise(canvas), masses.mask, each)

        stays = kept * (noise(before) + jnp.where(canvas == clean, before.clean, 0.0))
        comes = jnp.maximum(noise(now) - kept * noise(before), 0.0)
        drawn, _ = self.corrupt(draw_rng, clean, earlier)
        # A canvas that the noise could not have made stays as it is.
        anew = jax.random.uniform(keep_rng, canvas.shape) * (stays + comes) < comes
        return jnp.where(anew, drawn, canvas)


@dataclasses.dataclass(frozen=True)
class UniformCorruption(ScheduledCorruption):
    """Replaces tokens, independently, by tokens drawn uniformly from the vocabulary.

    At corruption rate `r` each token is replaced with probability `r`; noise may equal what it
    replaced, so a token differs with probability `r * (1 - 1 / vocab_size)`. With the defaults the
    rate is drawn from U(0, 1), as in the paper (arXiv 2112.06749, section 2.2; arXiv 2401.17181,
    section 4.1). Prefixes are never corrupted.
    """

    @property
    def num_uniform(self) -> int:
        """Returns how many tokens uniform noise has."""
        return self.vocab_size

    def masses(self, times: Array) -> Masses:
        rate = self._progress(times)
        return Masses(1.0 - rate, jnp.zeros_like(rate), rate)

    def is_noise(self, tokens: Array) -> Array:
        return jnp.zeros(tokens.shape, bool)

    def _noise(self, rng: Array, shape: tuple[int, ...], masses: Masses) -> Array:
        del masses
        return jax.random.randint(rng, shape, 0, self.vocab_size, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class MaskCorruption(ScheduledCorruption):
    """Replaces tokens, independently, by the mask token: absorbing noise (arXiv 2107.03006).

    Attributes:
      mask_id: a token that no text contains: one of `vocab_size`, or the first after them, which
        `vocab_size` then counts as well and `TransformerConfig.extra_tokens` gives an embedding.
    """

    _: dataclasses.KW_ONLY
    mask_id: int

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.mask_id <= self.vocab_size:
            raise ValueError(
                f"mask_id = {self.mask_id}, vocab_size = {self.vocab_size}; expected a token of "
                "the vocabulary or the first after it, and not 0, which is padding."
            )
        object.__setattr__(self, "vocab_size", max(self.vocab_size, self.mask_id + 1))

    @property
    def forbidden(self) -> tuple[int, ...]:
        """Forbids the mask token, which no text contains."""
        return (self.mask_id,)

    @property
    def only_masks(self) -> bool:
        return True

    @property
    def num_uniform(self) -> int:
        """Returns how many tokens uniform noise has: all but the mask token."""
        return self.vocab_size - 1

    def masses(self, times: Array) -> Masses:
        rate = self._progress(times)
        return Masses(1.0 - rate, rate, jnp.zeros_like(rate))

    def is_noise(self, tokens: Array) -> Array:
        return tokens == self.mask_id

    def _noise(self, rng: Array, shape: tuple[int, ...], masses: Masses) -> Array:
        del rng, masses
        return jnp.full(shape, self.mask_id, jnp.int32)


@dataclasses.dataclass(frozen=True)
class MixedCorruption(MaskCorruption):
    """Mixes masks and uniform noise: GIDD's hybrid noise (arXiv 2503.04482, section 3.2).

    Noise ends as masks alone, and is most uniform half way: there a token is uniform noise with
    probability `uniform_share`. With `s` the schedule's value and `c = b sqrt(s (1 - s))`, the
    masses are `1 - s` clean, `s` mask and `c` uniform, divided by `1 + c`.

    Attributes:
      uniform_share: in [0, 1); 0 is mask noise alone.
    """

    _: dataclasses.KW_ONLY
    uniform_share: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.uniform_share < 1.0:
            raise ValueError(f"uniform_share = {self.uniform_share}; expected 0 <= share < 1.")

    @property
    def only_masks(self) -> bool:
        return self.uniform_share == 0

    def masses(self, times: Array) -> Masses:
        s = self._progress(times)
        bump = 2.0 * self.uniform_share / (1.0 - self.uniform_share)
        inside = s * (1.0 - s)
        # The root has no slope at the ends; so written, its gradient there is 0 and not infinite.
        uniform = bump * jnp.where(inside > 0, jnp.sqrt(jnp.where(inside > 0, inside, 1.0)), 0.0)
        total = 1.0 + uniform
        return Masses((1.0 - s) / total, s / total, uniform / total)

    def _noise(self, rng: Array, shape: tuple[int, ...], masses: Masses) -> Array:
        which_rng, what_rng = jax.random.split(rng)
        token = jax.random.randint(what_rng, shape, 0, self.num_uniform, dtype=jnp.int32)
        token += token >= self.mask_id
        share = masses.mask / jnp.maximum(masses.mask + masses.uniform, 1e-30)
        return jnp.where(jax.random.uniform(which_rng, shape) < share, self.mask_id, token)
