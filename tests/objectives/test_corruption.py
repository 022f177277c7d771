"""Properties of uniform corruption, and its rates against their expectations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_t5x.objectives.corruption import UniformCorruption

VOCAB = 11
KEY = jax.random.PRNGKey(0)


def test_rate_zero_changes_nothing_and_rate_one_keeps_tokens_only_by_chance():
    corruption = UniformCorruption(VOCAB)
    tokens = jnp.full((2, 20_000), 3)
    canvas, changed = corruption.corrupt(KEY, tokens, jnp.array([[0.0], [1.0]]))
    assert (canvas[0] == 3).all()
    np.testing.assert_array_equal(changed.mean(axis=1), [0, 1])
    counts = np.bincount(np.asarray(canvas[1]), minlength=VOCAB) / 20_000
    np.testing.assert_allclose(counts, 1 / VOCAB, atol=0.01)


def test_a_token_differs_with_probability_rate_times_one_minus_one_over_vocabulary():
    corruption = UniformCorruption(VOCAB)
    tokens = jnp.full((1, 40_000), 5)
    canvas, replaced = corruption.corrupt(KEY, tokens, jnp.array([[0.3]]))
    assert (replaced | (canvas == tokens)).all()
    changed = float(jnp.mean(canvas != tokens))
    assert changed == pytest.approx(0.3 * (1 - 1 / VOCAB), abs=0.01)


def test_positions_are_corrupted_independently():
    corruption = UniformCorruption(1000)
    tokens, times = jnp.zeros((20_000, 2), jnp.int32), jnp.full((20_000, 1), 0.5)
    _, changed = corruption.corrupt(KEY, tokens, times)
    both = float(jnp.mean(changed[:, 0] & changed[:, 1]))
    assert both == pytest.approx(0.25, abs=0.015)


def test_rates_are_uniform_in_the_interval_and_one_per_example():
    corruption = UniformCorruption(VOCAB, min_rate=0.2, max_rate=0.6)
    rates = np.asarray(corruption.rate(corruption.sample_times(KEY, 20_000, 3)))
    assert rates.shape == (20_000, 1)
    assert rates.min() >= 0.2
    assert rates.max() <= 0.6
    np.testing.assert_allclose(np.quantile(rates, [0.25, 0.5, 0.75]), [0.3, 0.4, 0.5], atol=0.01)


def test_same_key_same_canvas_and_tokens_stay_in_the_vocabulary():
    corruption = UniformCorruption(VOCAB)
    first = corruption.prior(KEY, (4, 100))
    assert (first == corruption.prior(KEY, (4, 100))).all()
    assert set(np.unique(first)) == set(range(VOCAB))


@pytest.mark.parametrize("rates", [(-0.1, 1.0), (0.5, 0.4), (0.0, 1.1)])
def test_impossible_rates_are_refused(rates):
    with pytest.raises(ValueError, match="min_rate"):
        UniformCorruption(VOCAB, min_rate=rates[0], max_rate=rates[1])
