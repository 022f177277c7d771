"""Distance buckets and masks by hand and by brute force."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_t5x.networks.attention import relative_position_bucket
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
