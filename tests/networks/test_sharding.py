"""Rows and the shard of a weight that each of them uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_t5x.networks import attention, sharding


def test_one_device_is_one_shard():
    weights = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(
        sharding.per_data_shard(weights, ("vocab", "embed"), 4)[0], weights
    )


@pytest.mark.parametrize(("rows", "n"), [(4, 1), (4, 3)])
@pytest.mark.parametrize("groups", [1, 2, 4, "all"])
def test_a_row_has_the_bias_of_its_group(rows, n, groups):
    groups = rows * n if groups == "all" else groups
    keys = jax.random.split(jax.random.PRNGKey(0))
    logits = jax.random.normal(keys[0], (rows, 2, n, 3, 5))
    bias = jax.random.normal(keys[1], (groups, 2, 3, 5))
    found = attention._add_bias(logits, bias)
    for row in range(rows):
        for copy in range(n):
            group = (row * n + copy) * groups // (rows * n)
            expected = np.asarray(logits[row, :, copy]) + np.asarray(bias[group])
            np.testing.assert_allclose(found[row, :, copy], expected, rtol=1e-6)
