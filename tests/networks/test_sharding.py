"""Weights that each data-parallel shard has to itself."""

import jax.numpy as jnp
import numpy as np

from diffusion_t5x.networks import sharding


def test_one_device_is_one_shard():
    weights = jnp.arange(6.0).reshape(2, 3)
    copies = sharding.per_data_shard(weights, ("vocab", "embed"), 4)
    np.testing.assert_array_equal(copies, weights[None])
