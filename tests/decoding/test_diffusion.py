"""The diffusion sampler against a naive loop and a naive score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_network import FakeNetwork, perfect_network, table_network

from diffusion_t5x.decoding.diffusion import DiffusionDecoder
from diffusion_t5x.decoding.stopping import Unchanged
from diffusion_t5x.decoding.updates import ArgmaxUnrolled, EntropyBound, ResampleAll
from diffusion_t5x.objectives.corruption import UniformCorruption

VOCAB, BATCH, LENGTH = 7, 2, 5
KEY = jax.random.PRNGKey(3)


def _decoder(**kwargs):
    return DiffusionDecoder(UniformCorruption(VOCAB), **kwargs)


def test_at_temperature_zero_every_step_is_the_argmax_of_the_canvas_before():
    table = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32)
    decoded = _decoder(num_steps=4, num_samples=3, temperature=0.0).decode(
        table_network(jnp.asarray(table), BATCH), LENGTH, KEY, return_trajectory=True
    )
    trajectory = np.asarray(decoded.trajectory)
    assert trajectory.shape == (BATCH, 3, 5, LENGTH)
    for step in range(4):
        np.testing.assert_array_equal(
            trajectory[:, :, step + 1], table.argmax(-1)[trajectory[:, :, step]]
        )
    np.testing.assert_array_equal(trajectory[:, :, -1], decoded.tokens)


def test_score_is_the_log_likelihood_of_the_last_steps_input_under_its_output():
    table = np.random.default_rng(1).normal(size=(VOCAB, VOCAB))
    decoded = _decoder(num_steps=3, num_samples=4, temperature=1.0).decode(
        table_network(jnp.asarray(table, jnp.float32), BATCH), LENGTH, KEY, return_trajectory=True
    )
    log_probs = table - np.log(np.exp(table).sum(-1, keepdims=True))
    last_input = np.asarray(decoded.trajectory)[:, :, -2]
    naive = log_probs[last_input, last_input].sum(-1)
    np.testing.assert_allclose(decoded.scores, naive, rtol=1e-5)


def test_the_best_sample_comes_last_and_the_trajectory_does_not_change_the_result():
    table = jnp.asarray(np.random.default_rng(2).normal(size=(VOCAB, VOCAB)), jnp.float32)
    decoder = _decoder(num_steps=2, num_samples=6, temperature=1.0)
    plain = decoder.decode(table_network(table, BATCH), LENGTH, KEY)
    looked = decoder.decode(table_network(table, BATCH), LENGTH, KEY, return_trajectory=True)
    assert (np.diff(np.asarray(plain.scores), axis=1) >= 0).all()
    np.testing.assert_array_equal(plain.tokens, looked.tokens)
    assert plain.trajectory is None


def test_a_perfect_network_is_decoded_perfectly_in_one_step():
    targets = jnp.array([[1, 2, 3, 0, 0], [4, 5, 6, 6, 1]])
    decoded = _decoder(num_steps=1, num_samples=3, temperature=0.2).decode(
        perfect_network(targets, VOCAB), LENGTH, KEY
    )
    np.testing.assert_array_equal(decoded.tokens, jnp.repeat(targets[:, None], 3, axis=1))


def test_one_compiled_program_whatever_the_number_of_steps_runs_num_steps_passes():
    calls = []
    network = table_network(
        jnp.eye(VOCAB), BATCH, lambda canvas, rng: jax.debug.callback(lambda: calls.append(1))
    )
    jax.jit(lambda key: _decoder(num_steps=7, num_samples=2).decode(network, LENGTH, key))(KEY)
    jax.effects_barrier()
    assert len(calls) == 7


def test_first_canvas_is_uniform_noise_and_samples_differ():
    decoded = _decoder(num_steps=1, num_samples=500, temperature=0.0).decode(
        table_network(jnp.eye(VOCAB), BATCH), LENGTH, KEY, return_trajectory=True
    )
    first = np.asarray(decoded.trajectory)[:, :, 0]
    frequency = np.bincount(first.ravel(), minlength=VOCAB) / first.size
    np.testing.assert_allclose(frequency, 1 / VOCAB, atol=0.02)


@pytest.mark.parametrize("field", ["num_steps", "num_samples"])
def test_no_steps_or_samples_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} = 0"):
        _decoder(**{field: 0})


def test_draws_are_those_of_a_plain_loop_over_steps_with_the_same_keys():
    table = jnp.asarray(np.random.default_rng(4).normal(size=(VOCAB, VOCAB)), jnp.float32)
    decoder = _decoder(num_steps=4, num_samples=3, temperature=0.7)
    decoded = decoder.decode(table_network(table, BATCH), LENGTH, KEY, return_trajectory=True)
    canvas_rng, steps_rng = jax.random.split(KEY)
    canvas = decoder.corruption.prior(canvas_rng, (BATCH * 3, LENGTH))
    for rng in jax.random.split(steps_rng, 4):
        log_probs = jax.nn.log_softmax(table[canvas], axis=-1)
        scores = jnp.take_along_axis(log_probs, canvas[..., None], axis=-1)[..., 0].sum(-1)
        of_token = jax.random.split(rng)[1]  # The first key is for groups; here there is one.
        canvas = jax.random.categorical(of_token, table[canvas] / 0.7, axis=-1)
    order = jnp.argsort(scores.reshape(BATCH, 3), axis=1)
    expected = jnp.take_along_axis(canvas.reshape(BATCH, 3, LENGTH), order[..., None], axis=1)
    np.testing.assert_array_equal(decoded.tokens, expected)


EOS = 1


def _texts(rows):
    """`rows` up to their first `EOS`, and padding after it; a loop."""
    rows = np.array(rows)
    for row in rows.reshape(-1, rows.shape[-1]):
        if EOS in row:
            row[list(row).index(EOS) + 1 :] = 0
    return rows


@pytest.mark.parametrize("update", [ResampleAll(), ArgmaxUnrolled(), EntropyBound(bound=1.0)])
def test_the_score_of_a_text_counts_up_to_its_first_end_and_changes_no_canvas(update):
    table = np.random.default_rng(4).normal(size=(VOCAB, VOCAB))
    network = table_network(jnp.asarray(table, jnp.float32), BATCH)
    settings = {"num_steps": 3, "num_samples": 6, "temperature": 1.0, "update": update}
    decoded = {
        scored: _decoder(scored=scored, eos_id=EOS, **settings).decode(
            network, LENGTH, KEY, return_trajectory=True
        )
        for scored in ("canvas", "text")
    }
    log_probs = table - np.log(np.exp(table).sum(-1, keepdims=True))
    for scored, found in decoded.items():
        read = np.asarray(found.trajectory)[:, :, -2]
        tokens = log_probs.argmax(-1)[read] if isinstance(update, EntropyBound) else read
        counted = np.ones(read.shape) if scored == "canvas" else np.zeros(read.shape)
        for place in np.ndindex(*read.shape[:2]) if scored == "text" else ():
            row = list(tokens[place])
            counted[place][: row.index(EOS) + 1 if EOS in row else LENGTH] = 1
        naive = np.take_along_axis(log_probs[read], tokens[..., None], -1)[..., 0] * counted
        np.testing.assert_allclose(found.scores, naive.sum(-1), rtol=1e-5)
    one, other = ({row.tobytes() for row in np.asarray(d.tokens)[0]} for d in decoded.values())
    assert one == other


def test_padding_is_written_after_the_first_end_of_each_text():
    table = jnp.asarray(np.random.default_rng(5).normal(size=(VOCAB, VOCAB)), jnp.float32)
    network = table_network(table, BATCH)
    for update in (ResampleAll(), EntropyBound(bound=1.0)):
        settings = {"num_steps": 2, "num_samples": 8, "temperature": 1.0, "update": update}
        decoder = _decoder(pad_after_eos=True, eos_id=EOS, **settings)
        decoded = decoder.decode(network, LENGTH, KEY, return_trajectory=True)
        tokens = np.asarray(decoded.tokens)
        np.testing.assert_array_equal(tokens, _texts(tokens))
        assert (tokens == EOS).any() and (np.asarray(decoded.trajectory)[:, :, 0] != 0).any()


def test_neither_stopping_nor_trimming_waits_for_what_comes_after_texts():
    """The network writes a text, then tokens that never settle: the other of two, each time."""
    length = 32
    text = jnp.array([[3, 4, 5, EOS] + [0] * 28])

    def answer(canvas):
        count = canvas.shape[1]
        others = jnp.where(canvas == 2, 6, 2)
        wanted = jnp.where(jnp.arange(count) >= 4, others, text[:, :count])
        return 20.0 * jax.nn.one_hot(wanted, VOCAB)

    network = FakeNetwork(1, jnp.eye(VOCAB), answer)
    settings = {
        "num_steps": 12, "num_samples": 2, "temperature": 0.0, "stop": Unchanged(),
        "trim_multiple": 4, "eos_id": EOS,
    }  # fmt: skip
    of_canvas, of_text = (
        _decoder(scored=scored, **settings).decode(network, length, KEY)
        for scored in ("canvas", "text")
    )
    assert int(of_canvas.passes[0]) == 2 * 12 and int(of_canvas.positions[0]) == 2 * 12 * length
    assert int(of_text.passes[0]) <= 2 * 4
    np.testing.assert_array_equal(_texts(of_text.tokens), jnp.repeat(text[:, None], 2, axis=1))
    np.testing.assert_allclose(of_text.scores, 0.0, atol=1e-5)
    # As soon as a step has read a text, the next reads no more than it.
    assert int(of_text.positions[0]) <= int(of_text.passes[0]) * 8 + 2 * 2 * length


@pytest.mark.parametrize("setting", [{"scored": "text"}, {"pad_after_eos": True}])
def test_a_text_that_nothing_ends_cannot_be_asked_for(setting):
    with pytest.raises(ValueError, match=r"eos_id = -1 .* expected the token that ends a text"):
        _decoder(**setting)
    with pytest.raises(ValueError, match="did you mean 'text'"):
        _decoder(scored="texts", eos_id=1)
