"""Self-conditioning: a pass reads what the one before predicted (Chen et al., arXiv 2208.04202)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffusion_t5x.interfaces import Network

Array = jax.Array


def draw_conditioning(network: Network, hidden: Array, rng: Array) -> Array:
    """Returns what `hidden` predicts for a random half of the rows, and 0 for the others.

    A network so learns both a first pass and later ones (section 3 of the paper). No gradient flows
    through the result, `[batch, length, embed]`, of the shape of `hidden`.
    """
    expected = jax.lax.stop_gradient(network.expect_embedding(jax.lax.stop_gradient(hidden)))
    chosen = jax.random.bernoulli(rng, 0.5, expected.shape[:1])
    return jnp.where(chosen[:, None, None], expected, jnp.zeros_like(expected))


def self_condition(network: Network, canvas: Array, rng: Array) -> Array:
    """Returns the conditioning for a loss of one pass, from another pass without gradient.

    `rng` is for dropout and for the choice of rows.
    """
    dropout_rng, rng = jax.random.split(rng)
    return draw_conditioning(network, network.forward(canvas, dropout_rng), rng)


def forward_conditioned(network: Network, canvas: Array) -> Array:
    """Computes hidden states of a canvas; a network with self-conditioning reads it twice."""
    hidden = network.forward(canvas, None)
    if not network.self_conditioning:
        return hidden
    return network.forward(canvas, None, network.expect_embedding(hidden))
