"""What a pass says of each position, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_t5x.decoding.readout import read_canvas

ROWS, LENGTH, VOCAB = 3, 7, 11


@pytest.mark.parametrize("block_logits", [VOCAB, 2**20])
@pytest.mark.parametrize("offset", [0.0, 200.0])
def test_log_probabilities_and_entropy_are_those_of_float64(block_logits, offset):
    rng = np.random.default_rng(0)
    logits = (offset + 4 * rng.normal(size=(ROWS, LENGTH, VOCAB))).astype(np.float32)
    canvas = rng.integers(0, VOCAB, (ROWS, LENGTH))
    readout = jax.jit(
        lambda logits, canvas: read_canvas(
            logits, lambda x: x, canvas,
            rng=jax.random.PRNGKey(0), temperature=0.7, block_logits=block_logits,
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
