"""Fixed positions in training: clean in every canvas, without loss, and one span is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_network import table_network

from diffusion_t5x.objectives import StepUnrolledDenoising
from diffusion_t5x.objectives.corruption import UniformCorruption
from diffusion_t5x.objectives.infilling import draw_fixed

VOCAB, BATCH, LENGTH = 11, 64, 12
KEY = jax.random.PRNGKey(0)
TABLE = jax.random.normal(jax.random.PRNGKey(1), (VOCAB, VOCAB))
TARGETS = jax.random.randint(jax.random.PRNGKey(2), (BATCH, LENGTH), 1, VOCAB).at[:, 9:].set(0)


def _loss(weights, fixed=None, **settings):
    canvases = []
    network = table_network(TABLE, BATCH, lambda canvas, rng: canvases.append(np.asarray(canvas)))
    objective = StepUnrolledDenoising(UniformCorruption(VOCAB), num_unrolls=2, **settings)
    given = {} if fixed is None else {"fixed": fixed}
    return objective.loss(network, TARGETS, weights, KEY, **given), canvases


def test_all_but_one_span_of_the_text_is_fixed_at_the_rate():
    fixed = np.asarray(draw_fixed(KEY, jnp.tile(TARGETS, (40, 1)), 0.25))
    chosen = fixed.any(-1)
    assert abs(chosen.mean() - 0.25) < 0.03
    spans = set()
    for row in fixed[chosen]:
        free = np.flatnonzero(~row)
        assert len(free) >= 1
        assert free[-1] < 9  # the text's
        assert free[-1] - free[0] + 1 == len(free)
        spans.add((free[0], len(free)))
    assert spans == {(start, size) for size in range(1, 10) for start in range(10 - size)}


def test_fixed_positions_of_a_batch_are_clean_in_all_canvases():
    fixed = jnp.arange(LENGTH) % 3 == jnp.arange(BATCH)[:, None] % 3
    weights = jnp.where(fixed, 0.0, 1.0)
    (total, count, metrics), canvases = _loss(weights, fixed, fixed_rate=1.0)
    assert len(canvases) == 3
    for canvas in canvases:
        np.testing.assert_array_equal(canvas[fixed], TARGETS[fixed])
        assert (canvas != TARGETS)[~np.asarray(fixed)].any()
    # The loss by hand: cross-entropy at the positions that are not fixed.
    log_probs = jax.nn.log_softmax(TABLE)
    expected = -sum(float(jnp.sum(log_probs[canvas, TARGETS] * weights)) for canvas in canvases)
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    assert count == jnp.sum(~fixed)
    assert metrics


def test_the_rate_leaves_a_span_with_loss_and_none_changes_nothing():
    ones = jnp.ones(TARGETS.shape)
    (_, count, _), canvases = _loss(ones, fixed_rate=1.0)
    changed = np.any([canvas != TARGETS for canvas in canvases], axis=0)
    assert 0 < changed.sum() <= count < ones.size / 2
    assert not changed[:, 9:].any()
    (total, count, _), _ = _loss(ones, fixed_rate=0.0)
    (plain, _, _), _ = _loss(ones)
    assert (total, count) == (plain, ones.size)


def test_a_rate_that_is_no_probability_is_refused():
    with pytest.raises(ValueError, match=r"fixed_rate = 1.5; expected"):
        StepUnrolledDenoising(UniformCorruption(VOCAB), fixed_rate=1.5)
