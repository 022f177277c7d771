"""What a pass says of each position, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_t5x.decoding.logits_rules import Penalize, Suppress, TopK
from diffusion_t5x.decoding.readout import read_hidden

ROWS, LENGTH = 3, 7


KEY = jax.random.PRNGKey(0)


def _logits(vocab_size, offset=0.0):
    rng = np.random.default_rng(0)
    logits = (offset + 4 * rng.normal(size=(ROWS, LENGTH, vocab_size))).astype(np.float32)
    logits[0, 0, [3, vocab_size - 1]] = offset + 20  # Of two, the first is the argmax.
    logits[:, 1, : vocab_size // 2] = -np.inf  # whole groups, if there are several
    logits[1, 2, 1:] = -np.inf
    return logits


def _read(logits, canvas, temperature, chunk_logits=2**20, **settings):
    read = lambda logits, canvas: read_hidden(  # noqa: E731
        logits, lambda x: x, canvas, KEY, temperature, chunk_logits, **settings
    )
    return jax.jit(read)(logits, jnp.asarray(canvas))


def _log_softmax(logits):
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _of(log_probs, tokens):
    return np.take_along_axis(log_probs, np.asarray(tokens)[..., None], -1)[..., 0]


def _entropy(log_probs):
    return -(np.exp(log_probs) * np.maximum(log_probs, -1e30)).sum(-1)


@pytest.mark.parametrize("chunk_logits", [11, pytest.param(2**20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("temperature", [0.05, 0.7, 3.0])
@pytest.mark.parametrize(
    ("vocab_size", "offset"),
    [(11, 0.0), (11, 200.0), (300, 0.0)],  # one group of tokens, and three, the last one shorter
)
def test_log_probabilities_and_entropy_are_those_of_float64(
    chunk_logits, temperature, vocab_size, offset
):
    logits = _logits(vocab_size, offset)
    canvas = np.random.default_rng(1).integers(0, vocab_size + 3, (ROWS, LENGTH))
    canvas[0, :2] = vocab_size, 0  # no token of the network's, and one of no likelihood
    readout = _read(logits, canvas, temperature, chunk_logits)
    log_probs = _log_softmax(logits)
    np.testing.assert_array_equal(readout.argmax, logits.argmax(-1))
    assert temperature < 0.1 or (np.asarray(readout.drawn) != readout.argmax).any()
    close = {"atol": 2e-5, "rtol": 2e-5}
    np.testing.assert_allclose(readout.argmax_log_prob, log_probs.max(-1), **close)
    np.testing.assert_allclose(readout.drawn_log_prob, _of(log_probs, readout.drawn), **close)
    known = np.concatenate([log_probs, np.full((ROWS, LENGTH, 3), -np.inf)], -1)
    np.testing.assert_allclose(readout.canvas_log_prob, _of(known, canvas), **close)
    assert np.isneginf(readout.canvas_log_prob[0, :2]).all()
    entropy = _entropy(_log_softmax(logits.astype(np.float64) / temperature))
    np.testing.assert_allclose(readout.entropy, entropy, **close)
    assert readout.margin is None


def test_at_temperature_zero_nothing_is_uncertain():
    readout = _read(_logits(11), np.zeros((ROWS, LENGTH), int), 0.0)
    np.testing.assert_array_equal(readout.entropy, 0)
    np.testing.assert_array_equal(readout.drawn, readout.argmax)


@pytest.mark.parametrize("vocab_size", [11, 300])
def test_rules_change_draw_argmax_and_entropy_and_probabilities_stay_the_networks(vocab_size):
    logits = _logits(vocab_size)
    logits[1, 2] = 0.0
    rules = (Suppress((3, 7)), Penalize({5: 2.0}), TopK(4))
    readout = _read(logits, np.full((ROWS, LENGTH), 3), 0.7, rules=rules, with_margin=True)
    ruled = logits.astype(np.float64)
    ruled[..., [3, 7]] = -np.inf
    ruled[..., 5] -= 2
    ruled[ruled < np.sort(ruled, -1)[..., -4:-3]] = -np.inf
    np.testing.assert_array_equal(readout.argmax, ruled.argmax(-1))
    assert (_of(ruled, readout.drawn) > -np.inf).all()
    assert (np.asarray(readout.drawn) != readout.argmax).any()
    log_probs = _log_softmax(logits)
    close = {"atol": 2e-5, "rtol": 2e-5}
    np.testing.assert_allclose(readout.argmax_log_prob, _of(log_probs, readout.argmax), **close)
    np.testing.assert_allclose(readout.drawn_log_prob, _of(log_probs, readout.drawn), **close)
    np.testing.assert_allclose(readout.canvas_log_prob, log_probs[..., 3], **close)
    np.testing.assert_allclose(readout.entropy, _entropy(_log_softmax(ruled / 0.7)), **close)
    second = np.argsort(-ruled, axis=-1, kind="stable")[..., 1]
    margin = np.exp(_of(log_probs, readout.argmax)) - np.exp(_of(log_probs, second))
    np.testing.assert_allclose(readout.margin, margin, **close)


def test_the_margin_over_nothing_is_the_whole_probability():
    logits = np.full((1, 1, 5), -np.inf, np.float32)
    logits[0, 0, 2] = 1.0
    readout = _read(logits, np.zeros((1, 1), int), 1.0, with_margin=True)
    np.testing.assert_array_equal(readout.margin, 1.0)
