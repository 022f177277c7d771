"""A bound of the likelihood that a denoising network gives to texts, whatever its noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffusion_t5x.interfaces import Corruption, Network, Score
from diffusion_t5x.objectives.losses import CrossEntropy
from diffusion_t5x.objectives.self_conditioning import forward_conditioned

Array = jax.Array


def any_order_bound(
    network: Network,
    corruption: Corruption,
    targets: Array,
    weights: Array,
    rng: Array,
    num_draws: int,
) -> Score:
    """Estimates a lower bound of the log-likelihood of targets, with its Monte Carlo error.

    The text model is this: the positions of a canvas of pure noise are written one by one in a
    random order, each by a draw from the network's distribution there, and the noise of those not
    yet written is drawn anew each time. By Jensen's inequality over orders and noise, its
    log-likelihood is at least the expectation of `n / k * sum log p(target | canvas)` over the `k`
    positions of noise, `k` uniform in 1..n (Hoogeboom et al., arXiv 2110.02037).

    Args:
      network: reads canvases, with its prefixes bound.
      corruption: its noise at time 1, whatever it is before.
      targets: `[batch, length]` int32.
      weights: `[batch, length]`; positions of weight 0 are clean in every canvas, and not counted.
      rng: key for orders and noise.
      num_draws: passes for each text, spread evenly over `k`.

    Returns:
      The bound and its standard error. Even spreading makes the error smaller than this one, which
      is that of independent draws.

    Raises:
      ValueError: if there are fewer than two draws, from which no error follows.
    """
    if num_draws < 2:
        raise ValueError(f"num_draws = {num_draws}; expected at least 2, for the error.")
    counted = weights > 0
    n = jnp.sum(counted, axis=-1)
    shift_rng, draws_rng = jax.random.split(rng)
    shift = jax.random.uniform(shift_rng, n.shape)

    def draw(index: Array) -> Array:
        order_rng, noise_rng = jax.random.split(jax.random.fold_in(draws_rng, index))
        k = 1 + jnp.floor(n * ((shift + index) / num_draws % 1.0)).astype(jnp.int32)
        place = jnp.where(counted, jax.random.uniform(order_rng, targets.shape), 2.0)
        rank = jnp.argsort(jnp.argsort(place, axis=-1), axis=-1)
        noisy = counted & (rank < k[:, None])
        canvas = jnp.where(noisy, corruption.prior(noise_rng, targets.shape), targets)
        readout = CrossEntropy()(
            forward_conditioned(network, canvas), network.logits, targets, noisy
        )
        return -jnp.sum(readout.loss * noisy, axis=-1) * n / k

    estimates = jax.lax.map(draw, jnp.arange(num_draws))  # [num_draws, batch]
    error = jnp.std(estimates, axis=0, ddof=1) / jnp.sqrt(num_draws)
    return Score(jnp.mean(estimates, axis=0), error)
