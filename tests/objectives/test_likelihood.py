"""Scores against texts of two tokens and three positions, enumerated in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_network import FakeNetwork

from diffusion_t5x.objectives import NextToken, StepUnrolledDenoising
from diffusion_t5x.objectives.corruption import MaskCorruption, UniformCorruption
from diffusion_t5x.objectives.likelihood import any_order_bound

VOCAB, LENGTH, MASK = 2, 3, 2
TEXTS = np.array(list(itertools.product(range(VOCAB), repeat=LENGTH)))
CORRUPTIONS = {
    "uniform": UniformCorruption(VOCAB),
    "mask": MaskCorruption(VOCAB + 1, mask_id=MASK),
}
NOISE = {"uniform": range(VOCAB), "mask": [MASK]}
DRAWS = 4_000
CANVASES = (VOCAB + 1) ** LENGTH
PREFIXES = 1 + VOCAB**2  # none, or that of the first two tokens
# Logits for each prefix, canvas and position: [PREFIXES, CANVASES, LENGTH, VOCAB].
TABLE = np.random.default_rng(0).normal(scale=2.0, size=(PREFIXES, CANVASES, LENGTH, VOCAB))
LOG_PROBS = TABLE - np.log(np.exp(TABLE).sum(-1, keepdims=True))


def _code(canvas):
    return canvas @ np.array([1, 3, 9])[: canvas.shape[-1]]


class _Network(FakeNetwork):
    """Reads its prefix, a number below `PREFIXES`, as well as the canvas."""

    def extend_prefix(self, tokens, counts):
        return _network(jnp.where(counts > 0, 1 + tokens[:, 0] + 2 * tokens[:, 1], 0))


def _network(prefix):
    def answer(canvas):
        row = (prefix * CANVASES + _code(canvas))[:, None] * LENGTH + jnp.arange(canvas.shape[1])
        return jax.nn.one_hot(row, TABLE[..., 0].size)

    return _Network(len(TEXTS), jnp.asarray(TABLE.reshape(-1, VOCAB), jnp.float32), answer)


def _enumerate(text, counted, noise, prefix=0):
    """Returns log p(text) of the text model, and the expectation of log p over orders and noise."""
    orders = list(itertools.permutations(np.flatnonzero(counted)))
    likelihood, bound = 0.0, 0.0
    for order in orders:
        product, total = 1.0, 0.0
        for written, place in enumerate(order):
            noisy = list(order[written:])
            logs = []
            for tokens in itertools.product(noise, repeat=len(noisy)):
                canvas = text.copy()
                canvas[noisy] = tokens
                logs.append(LOG_PROBS[prefix, _code(canvas), place, text[place]])
            product *= np.mean(np.exp(logs))
            total += np.mean(logs)
        likelihood += product / len(orders)
        bound += total / len(orders)
    return np.log(likelihood), bound


def _score(objective, weights):
    network, texts = _network(jnp.zeros(len(TEXTS), int)), jnp.asarray(TEXTS)
    weights = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), TEXTS.shape)
    score = jax.jit(lambda rng: objective.score(network, texts, weights, rng))
    return jax.tree.map(lambda x: np.asarray(x, np.float64), score(jax.random.PRNGKey(0)))


def _check(score, exact):
    """Holds a score to the expectation of the bound, and that to the likelihood: `exact [n, 2]`."""
    bound, error = score
    assert (error > 0).all() and (error < 0.1).all()
    np.testing.assert_array_less(np.abs(bound - exact[:, 1]), 4 * error)
    assert (exact[:, 1] < exact[:, 0]).all()
    assert (bound < exact[:, 0] + 4 * error).all()


@pytest.mark.parametrize(
    ("noise", "counted"),
    [
        ("uniform", [1, 1, 1]),
        ("mask", [1, 1, 1]),
        pytest.param("uniform", [0, 1, 1], marks=pytest.mark.slow),
        pytest.param("mask", [0, 1, 1], marks=pytest.mark.slow),
    ],
)
def test_the_bound_is_the_enumerated_one_and_never_above_the_likelihood(noise, counted):
    exact = np.array([_enumerate(text, counted, NOISE[noise]) for text in TEXTS])
    if all(counted):
        assert np.exp(exact[:, 0]).sum() == pytest.approx(1.0)
    objective = StepUnrolledDenoising(CORRUPTIONS[noise], score_draws=DRAWS)
    _check(_score(objective, counted), exact)


def test_the_bound_of_a_text_in_blocks_is_the_sum_of_its_blocks():
    objective = StepUnrolledDenoising(
        CORRUPTIONS["uniform"],
        attention_pattern="causal_prefix",
        block_length=2,
        score_draws=DRAWS,
    )
    score = _score(objective, [1, 1, 1])
    exact = []
    for text in TEXTS:
        first = _enumerate(text[:2], [1, 1], NOISE["uniform"])
        last = _enumerate(
            np.array([text[2], 0]), [1, 0], NOISE["uniform"], 1 + text[0] + 2 * text[1]
        )
        exact.append(np.add(first, last))
    exact = np.array(exact)
    assert np.exp(exact[:, 0]).sum() == pytest.approx(1.0)
    _check(score, exact)


def test_the_score_of_an_ar_model_is_its_likelihood():
    def answer(canvas):  # a state has seen the tokens before its position
        seen = jnp.cumsum(canvas * jnp.array([1, 3, 9]), axis=1) - canvas * jnp.array([1, 3, 9])
        return jax.nn.one_hot(seen * LENGTH + jnp.arange(LENGTH), CANVASES * LENGTH)

    network = FakeNetwork(len(TEXTS), jnp.asarray(TABLE[0].reshape(-1, VOCAB), jnp.float32), answer)
    weights = jnp.ones(TEXTS.shape)
    score = jax.jit(lambda texts: NextToken().score(network, texts, weights, None))(TEXTS)
    exact = [
        sum(
            LOG_PROBS[0, _code(np.where(np.arange(LENGTH) < place, text, 0)), place, text[place]]
            for place in range(LENGTH)
        )
        for text in TEXTS
    ]
    assert np.exp(exact).sum() == pytest.approx(1.0)
    np.testing.assert_allclose(score.log_likelihood, exact, rtol=1e-5)
    np.testing.assert_array_equal(score.error, 0.0)


def test_one_draw_is_refused_since_no_error_follows_from_it():
    network = _network(jnp.zeros(len(TEXTS), int))
    with pytest.raises(ValueError, match="num_draws = 1"):
        any_order_bound(network, None, jnp.zeros((8, 3), int), jnp.ones((8, 3)), None, 1)
    for draws in (1, 2.5):
        with pytest.raises(ValueError, match=rf"score_draws = {draws}; .*SCORE_DRAWS"):
            StepUnrolledDenoising(CORRUPTIONS["uniform"], score_draws=draws)
