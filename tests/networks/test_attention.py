"""Distance buckets, masks, biases and row chunks, by hand and by brute force."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_t5x.networks import attention
from diffusion_t5x.networks.attention import relative_position_bucket
from diffusion_t5x.networks.config import TransformerConfig
from diffusion_t5x.objectives.attention_patterns import make_mask


def _naive_bucket(distance, num_buckets, max_distance):
    """The bucket's definition, one number at a time."""
    num_buckets //= 2
    offset = num_buckets if distance > 0 else 0
    distance = abs(distance)
    exact = num_buckets // 2
    if distance < exact:
        return offset + distance
    share = math.log(distance / exact) / math.log(max_distance / exact)
    return offset + min(num_buckets - 1, exact + int(share * (num_buckets - exact) + 1e-5))


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (64, 128), (8, 20)])
def test_buckets_are_those_of_the_definition(num_buckets, max_distance):
    distances = np.arange(-200, 201)
    buckets = relative_position_bucket(
        jnp.asarray(distances), num_buckets=num_buckets, max_distance=max_distance
    )
    expected = [_naive_bucket(d, num_buckets, max_distance) for d in distances]
    np.testing.assert_array_equal(buckets, expected)


def test_masks_by_hand():
    segments = jnp.array([[0, 1, 1, 1]])
    is_prefix = jnp.array([[True, True, True, False]])
    causal = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    prefix = [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    full = [[1, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]
    for pattern, expected in (
        ("causal", causal),
        ("prefix_bidirectional", prefix),
        ("bidirectional", full),
    ):
        np.testing.assert_array_equal(make_mask(pattern, segments, is_prefix)[0], expected)
    segments, is_prefix = jnp.ones((1, 4), int), jnp.array([[True, True, False, False]])
    cached = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    np.testing.assert_array_equal(make_mask("cached_prefix", segments, is_prefix)[0], cached)


@pytest.mark.parametrize(("rows", "n"), [(4, 1), (4, 3)])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_row_has_the_bias_of_its_shard(rows, n, shards):
    keys = jax.random.split(jax.random.PRNGKey(0))
    logits = jax.random.normal(keys[0], (rows, 2, n, 3, 5))
    bias = jax.random.normal(keys[1], (shards, 2, 3, 5))
    found = attention._add_bias(logits, bias)
    for row in range(rows):
        for copy in range(n):
            shard = (row * n + copy) * shards // (rows * n)
            expected = np.asarray(logits[row, :, copy]) + np.asarray(bias[shard])
            np.testing.assert_allclose(found[row, :, copy], expected, rtol=1e-6)


def test_one_query_is_attended_at_once_so_that_no_cache_is_copied():
    config = TransformerConfig(50, 8, 2, 1, 4, 16, attention_block_logits=1)
    assert attention._num_chunks(8, config, 8, 1, 4096) == 1
    assert attention._num_chunks(8, config, 8, 2, 4096) == 8
