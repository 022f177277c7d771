"""What a pass says of each position, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_t5x.decoding.readout import read_hidden

ROWS, LENGTH = 3, 7


@pytest.mark.parametrize("chunk_logits", [11, 2**20])
@pytest.mark.parametrize(
    ("vocab_size", "offset"),
    [(11, 0.0), (11, 200.0), (300, 0.0)],  # one group of tokens, and three, the last one shorter
)
def test_log_probabilities_and_entropy_are_those_of_float64(chunk_logits, vocab_size, offset):
    rng = np.random.default_rng(0)
    logits = (offset + 4 * rng.normal(size=(ROWS, LENGTH, vocab_size))).astype(np.float32)
    logits[0, 0, [3, vocab_size - 1]] = offset + 20  # Of two, the first is the argmax.
    canvas = rng.integers(0, vocab_size, (ROWS, LENGTH))
    readout = jax.jit(
        lambda logits, canvas: read_hidden(
            logits, lambda x: x, canvas, jax.random.PRNGKey(0), 0.7, chunk_logits
        )
    )(logits, jnp.asarray(canvas))  # fmt: skip
    log_probs = logits.astype(np.float64)
    log_probs -= np.log(np.exp(log_probs - offset).sum(-1, keepdims=True)) + offset
    of = lambda tokens: np.take_along_axis(log_probs, np.asarray(tokens)[..., None], -1)[..., 0]  # noqa: E731
    np.testing.assert_array_equal(readout.argmax, logits.argmax(-1))
    assert (np.asarray(readout.drawn) != readout.argmax).any()
    close = {"atol": 2e-5}
    np.testing.assert_allclose(readout.argmax_log_prob, log_probs.max(-1), **close)
    np.testing.assert_allclose(readout.drawn_log_prob, of(readout.drawn), **close)
    np.testing.assert_allclose(readout.canvas_log_prob, of(canvas), **close)
    entropy = -(np.exp(log_probs) * log_probs).sum(-1)
    np.testing.assert_allclose(readout.entropy, entropy, **close)
