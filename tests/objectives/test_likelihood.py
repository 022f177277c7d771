"""The bound of the likelihood against texts that are enumerated in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_network import FakeNetwork

from diffusion_t5x.objectives.corruption import UniformCorruption
from diffusion_t5x.objectives.likelihood import any_order_bound

VOCAB, LENGTH = 2, 3
TEXTS = np.array(list(itertools.product(range(VOCAB), repeat=LENGTH)))
# Logits of each position for each of all canvases: [canvas and position, vocab].
TABLE = np.random.default_rng(0).normal(scale=2.0, size=(len(TEXTS) * LENGTH, VOCAB))


def _answer(canvas):
    code = canvas @ jnp.array([4, 2, 1])
    return jax.nn.one_hot(code[:, None] * LENGTH + jnp.arange(LENGTH), len(TABLE))


def _log_probs(canvas):
    logits = TABLE.reshape(len(TEXTS), LENGTH, VOCAB)[canvas @ [4, 2, 1]]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _enumerate(text, counted):
    """Returns log p(text) of the text model, and the expectation of log p over orders and noise."""
    places = np.flatnonzero(counted)
    orders = list(itertools.permutations(places))
    likelihood, bound = 0.0, 0.0
    for order in orders:
        product, total = 1.0, 0.0
        for written, place in enumerate(order):
            noisy = list(order[written:])
            logs = []
            for noise in itertools.product(range(VOCAB), repeat=len(noisy)):
                canvas = text.copy()
                canvas[noisy] = noise
                logs.append(_log_probs(canvas)[place, text[place]])
            product *= np.mean(np.exp(logs))
            total += np.mean(logs)
        likelihood += product / len(orders)
        bound += total / len(orders)
    return np.log(likelihood), bound


@pytest.mark.parametrize("counted", [[1, 1, 1], [0, 1, 1]])
def test_the_bound_is_the_enumerated_one_and_never_above_the_likelihood(counted):
    exact = np.array([_enumerate(text, counted) for text in TEXTS])
    if all(counted):
        assert np.exp(exact[:, 0]).sum() == pytest.approx(1.0)
    network = FakeNetwork(len(TEXTS), jnp.asarray(TABLE, jnp.float32), _answer)
    weights = jnp.broadcast_to(jnp.asarray(counted, jnp.float32), TEXTS.shape)
    corruption = UniformCorruption(VOCAB)
    bound, error = jax.jit(
        lambda rng: any_order_bound(network, corruption, jnp.asarray(TEXTS), weights, rng, 20_000)
    )(jax.random.PRNGKey(0))
    assert (error > 0).all() and (error < 0.05).all()
    np.testing.assert_array_less(np.abs(bound - exact[:, 1]), 4 * error)
    assert (exact[:, 1] < exact[:, 0]).all()
    assert (np.asarray(bound) < exact[:, 0] + 4 * np.asarray(error)).all()


def test_one_draw_is_refused_since_no_error_follows_from_it():
    network = FakeNetwork(1, jnp.asarray(TABLE, jnp.float32), _answer)
    with pytest.raises(ValueError, match="num_draws = 1"):
        any_order_bound(network, None, jnp.zeros((1, 3), int), jnp.ones((1, 3)), None, 1)
