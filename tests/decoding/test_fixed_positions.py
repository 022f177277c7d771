"""Fixed positions, against a loop over steps that is written out, under every rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_network import table_network

from diffusion_t5x.decoding import stopping, updates
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.diffusion import DiffusionDecoder
from diffusion_t5x.interfaces import Fixed
from diffusion_t5x.objectives.corruption import MaskCorruption, UniformCorruption

VOCAB, LENGTH, BATCH = 7, 9, 3
KEY = jax.random.PRNGKey(3)
TABLE = 3 * jax.random.normal(jax.random.PRNGKey(1), (VOCAB, VOCAB))
NOISE = UniformCorruption(VOCAB)
WHERE = np.array([[1, 0, 0, 1, 1, 0, 0, 0, 1], [0] * 9, [0, 1, 1, 1, 1, 1, 1, 1, 1]], bool)
TOKENS = np.array([[5, 9, 9, 0, 6, 9, 9, 9, 4], [9] * 9, [9, 1, 2, 3, 4, 5, 6, 0, 0]])  # 9: unread
FIXED = Fixed(jnp.asarray(TOKENS), jnp.asarray(WHERE))


def _run(settings):
    corruption = settings.get("corruption", NOISE)
    rest = {name: value for name, value in settings.items() if name != "corruption"}
    decoder = DiffusionDecoder(corruption, **{"num_steps": 4, "num_samples": 3, **rest})
    return decoder.decode(table_network(TABLE, BATCH), LENGTH, KEY, True, FIXED)


def _stands(tokens):
    """Whether arrays [batch, ..., length] have the fixed tokens at the fixed positions."""
    tokens = np.moveaxis(np.asarray(tokens), 0, -2)  # [..., batch, length]
    return bool(np.all((tokens == TOKENS) | ~WHERE[:, : tokens.shape[-1]]))


@pytest.mark.parametrize(
    "settings",
    [
        {"update": updates.ResampleAll(), "temperature": 1.0},
        pytest.param(
            {"update": updates.ResampleShare(0.6), "temperature": 1.0}, marks=pytest.mark.slow
        ),
        pytest.param({"update": updates.ArgmaxUnrolled(0.4)}, marks=pytest.mark.slow),
        {"update": updates.EntropyBound(0.3), "temperature": 1.0},
        pytest.param({"stop": stopping.Unchanged(), "temperature": 0.0}, marks=pytest.mark.slow),
        pytest.param({"stop": stopping.ScoreSettled(100.0)}, marks=pytest.mark.slow),
        {"stop": stopping.StableAndConfident(5.0)},
        {"halve_every": 1, "temperature": 1.0},
        {"trim_multiple": 2, "temperature": 0.0},
        {"corruption": MaskCorruption(VOCAB, mask_id=6), "temperature": 1.0},
        pytest.param({"final_temperature": 0.1, "temperature": 1.0}, marks=pytest.mark.slow),
        {"pad_after_eos": True, "eos_id": 1, "temperature": 1.0},
        {"scored": "text", "eos_id": 1, "stop": stopping.StableAndConfident(5.0)},
    ],
    ids=str,
)
def test_fixed_tokens_stand_in_every_sample_and_every_canvas(settings):
    decoded = jax.jit(lambda: _run(settings))()
    assert _stands(decoded.tokens)
    assert _stands(decoded.trajectory)
    # The other positions are decoded: at least those of the text of which nothing is fixed.
    assert len(np.unique(decoded.trajectory[1])) > 2


def test_argmax_decoding_is_a_loop_that_writes_what_is_free():
    decoded = jax.jit(lambda: _run({"temperature": 0.0, "num_samples": 1}))()
    table = np.asarray(TABLE, np.float64)
    log_probs = table - np.log(np.exp(table).sum(-1, keepdims=True))
    canvas = np.asarray(decoded.trajectory)[:, 0, 0]
    for step in range(4):
        score = np.where(WHERE, 0.0, log_probs[canvas, canvas]).sum(-1)
        canvas = np.where(WHERE, TOKENS, table[canvas].argmax(-1))
        np.testing.assert_array_equal(decoded.trajectory[:, 0, step + 1], canvas)
    np.testing.assert_array_equal(decoded.tokens[:, 0], canvas)
    np.testing.assert_allclose(decoded.scores[:, 0], score, rtol=1e-5)


def test_nothing_fixed_is_decoded_as_without():
    nothing = FIXED._replace(where=jnp.zeros_like(FIXED.where))
    network = table_network(TABLE, BATCH)
    decoder = DiffusionDecoder(NOISE, num_steps=3, num_samples=2, temperature=0.7)
    with_none, without = (decoder.decode(network, LENGTH, KEY, False, f) for f in (nothing, None))
    np.testing.assert_array_equal(with_none.tokens, without.tokens)


def test_blocks_have_them_too_and_no_text_ends_before_the_last():
    settings = {"num_steps": 2, "num_samples": 2, "prefix_cache": True, "block_length": 4}
    decoder = DiffusionDecoder(NOISE, temperature=0.0, eos_id=1, **settings)
    table = jnp.zeros((VOCAB, VOCAB)).at[:, 1].set(9.0)  # ends every text at once
    decoded = decoder.decode(table_network(table, BATCH), LENGTH, KEY, True, FIXED)
    assert _stands(decoded.tokens)
    assert _stands(decoded.trajectory)
    np.testing.assert_array_equal(decoded.tokens[1, 0], [1] * 4 + [0] * 5)  # nothing is fixed
    np.testing.assert_array_equal(decoded.tokens[0, 0], [5, 1, 1, 0, 6, 1, 1, 1, 4])
    np.testing.assert_array_equal(decoded.tokens[2, 0], [1, 1, 2, 3, 4, 5, 6, 0, 0])
    np.testing.assert_array_equal(decoded.steps, [3 * 2] * BATCH)


def test_steps_taken_one_by_one_keep_them():
    decoder = DiffusionDecoder(NOISE, num_steps=3, num_samples=2, temperature=1.0)
    network = table_network(TABLE, BATCH)
    _, state = decoder.start(network, LENGTH, KEY, FIXED)
    for _ in range(3):
        state = decoder.step(network, state, KEY)
    together = decoder.decode(network, LENGTH, KEY, False, FIXED)
    np.testing.assert_array_equal(decoder.finish(state).tokens, together.tokens)


def test_an_ar_decoder_refuses_them_and_counts_a_pass_for_each_token():
    network = table_network(TABLE, BATCH)
    with pytest.raises(ValueError, match=r"decoder_fixed_positions.*AutoregressiveDecoder"):
        AutoregressiveDecoder().decode(network, LENGTH, KEY, False, FIXED)
    decoded = AutoregressiveDecoder(2, eos_id=-1).decode(network, LENGTH, KEY)
    np.testing.assert_array_equal(decoded.steps, [LENGTH] * BATCH)
    np.testing.assert_array_equal(decoded.passes, [2 * LENGTH] * BATCH)
