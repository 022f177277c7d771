"""Classifier-free guidance: predictions are moved away from those of an empty prefix."""

from __future__ import annotations

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp

from diffusion_t5x.interfaces import CachedNetwork, KVCache, Network

Array = jax.Array


def guide(network: Network, scale: float) -> GuidedNetwork:
    """Returns the network whose logits are guided by `scale`: see `GuidedNetwork`."""
    dropped = jnp.ones(network.batch_size, bool)
    return GuidedNetwork(network, network.drop_prefix(dropped), scale)


@dataclasses.dataclass(frozen=True)
class GuidedNetwork:
    """Two networks read as one, whose logits are `without + scale * (given - without)`.

    This is the guidance of Ho and Salimans (arXiv 2207.12598, equation 6, with `scale = 1 + w`),
    of logits as in Nisonoff et al. (arXiv 2406.01572). Scale 1 is the network itself, 0 the one
    without prefixes. Each forward pass is one of either network; hidden states are the two beside
    each other, `[rows, length, 2 * embed]`.
    """

    given: Network  # bound to the prefixes
    without: Network  # bound to empty ones
    scale: float

    @property
    def batch_size(self) -> int:
        return self.given.batch_size

    @property
    def self_conditioning(self) -> bool:
        return self.given.self_conditioning

    def forward(self, canvas: Array, rng: Array | None, conditioning: Array | None = None) -> Array:
        """Reads the canvas with both networks, which get the same conditioning."""
        more = () if conditioning is None else (conditioning,)
        states = [network.forward(canvas, rng, *more) for network in (self.given, self.without)]
        return jnp.concatenate(states, axis=-1)

    def logits(self, hidden: Array) -> Array:
        """Guides the logits; those that are infinite, of tokens that are never drawn, stay."""
        given, without = map(self.given.logits, jnp.split(hidden, 2, axis=-1))
        finite = jnp.isfinite(given) & jnp.isfinite(without)
        difference = jnp.where(finite, given - without, 0.0)
        return jnp.where(finite, without + self.scale * difference, given)

    def expect_embedding(self, hidden: Array) -> Array:
        return self.given.expect_embedding(hidden, self.logits)

    def repeat(self, n: int) -> GuidedNetwork:
        return GuidedNetwork(self.given.repeat(n), self.without.repeat(n), self.scale)

    def cache_prefix(self, rng: Array | None = None) -> GuidedNetwork:
        given, without = self.given.cache_prefix(rng), self.without.cache_prefix(rng)
        return GuidedNetwork(given, without, self.scale)

    @property
    def _cached(self) -> tuple[CachedNetwork, CachedNetwork]:
        return cast(CachedNetwork, self.given), cast(CachedNetwork, self.without)

    @property
    def cache(self) -> tuple[KVCache, KVCache]:
        given, without = self._cached
        return given.cache, without.cache

    def with_cache(self, cache: tuple[KVCache, KVCache]) -> GuidedNetwork:
        given, without = self._cached
        return GuidedNetwork(given.with_cache(cache[0]), without.with_cache(cache[1]), self.scale)

    def add_room(self, cache: tuple[KVCache, KVCache], room: int) -> tuple[KVCache, KVCache]:
        return self.given.add_room(cache[0], room), self.without.add_room(cache[1], room)

    def append_tokens(
        self, cache: tuple[KVCache, KVCache], tokens: Array
    ) -> tuple[KVCache, KVCache]:
        given, without = self._cached
        return given.append_tokens(cache[0], tokens), without.append_tokens(cache[1], tokens)
