"""Texts written block by block, against prefixes that are written out and read anew."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from diffusion_t5x.decoding import block_decoding
from diffusion_t5x.decoding.diffusion import DiffusionDecoder
from diffusion_t5x.decoding.stopping import Unchanged
from diffusion_t5x.models import Model
from diffusion_t5x.objectives.corruption import UniformCorruption

KEY = jax.random.PRNGKey(3)
BLOCK, LENGTH, COUNT = 3, 8, 3
PREFIXES = jnp.array([[5, 6, 7, 8], [3, 4, 0, 0]])
BATCH = {"encoder_input_tokens": PREFIXES, "decoder_input_tokens": jnp.zeros((2, LENGTH), int)}
PLAIN = DiffusionDecoder(
    UniformCorruption(toy.VOCABULARY.vocab_size), num_steps=3, num_samples=2, prefix_cache=True
)


@functools.cache
def _model(**config):
    plain = toy.model(**config)
    objective = dataclasses.replace(
        plain.objective, attention_pattern="causal_prefix", block_length=BLOCK
    )
    decoder = dataclasses.replace(PLAIN, block_length=BLOCK)
    model = Model(plain.module, objective, decoder, toy.VOCABULARY, None)
    shapes = {name: value.shape for name, value in BATCH.items()}
    init = jax.jit(lambda: model.get_initial_variables(KEY, shapes))
    return model, init()["params"]


def _decode(model, params, **decoder):
    return jax.jit(
        functools.partial(
            model.predict_batch_with_aux,
            return_all_decodes=True,
            return_trajectory=True,
            return_cost=True,
            **decoder,
        )
    )(params, BATCH, KEY)


@functools.cache
def _whole():
    """What is written where no text ends."""
    return np.asarray(_decode(*_model())[0][:, 0])


@pytest.mark.parametrize(
    "config",
    [
        {"start_token": True, "scan_layers": True, "num_layers": 2},
        pytest.param({}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_blocks_are_what_canvases_after_written_out_prefixes_are(config, monkeypatch):
    # A cache that has to grow.
    monkeypatch.setattr(block_decoding, "FIRST", 2 * BLOCK)
    model, params = _model(**config)
    tokens, aux = _decode(model, params)
    assert tokens.shape == (2, 1, LENGTH)

    @jax.jit
    def canvas(written, count, rng):
        network = model.bind(params, BATCH).extend_prefix(written, jnp.full(2, count))
        return dataclasses.replace(PLAIN, prefix_cache=False).decode(
            network, BLOCK, rng, return_trajectory=True
        )

    written, steps, scores = np.zeros((2, BLOCK * COUNT), int), [], 0.0
    for start, rng in zip(range(0, LENGTH, BLOCK), jax.random.split(KEY, COUNT), strict=True):
        decoded = canvas(written, start, rng)
        written[:, start : start + BLOCK] = decoded.tokens[:, -1]
        steps.append(decoded.trajectory[:, -1])
        scores += decoded.scores[:, -1]
    np.testing.assert_array_equal(tokens[:, 0], written[:, :LENGTH])
    trajectory = np.concatenate(steps, axis=2)[:, :, :LENGTH]
    np.testing.assert_array_equal(aux["trajectory"][:, 0], trajectory)
    np.testing.assert_allclose(aux["scores"][:, 0], scores, rtol=1e-4)
    # Finished blocks once, each canvas of each step.
    cost = COUNT * 3 * 2 * BLOCK + (COUNT - 1) * BLOCK
    np.testing.assert_array_equal(aux["positions"], [cost] * 2)
    np.testing.assert_array_equal(aux["passes"], [COUNT * 3 * 2] * 2)


def test_a_text_that_has_ended_is_padded_and_others_go_on():
    model, params = _model()
    first, second = _whole()
    end = next(t for t in first[:BLOCK] if t > 0 and t not in second)
    tokens, aux = _decode(model, params, eos_id=int(end))
    np.testing.assert_array_equal(tokens[0, 0, :BLOCK], first[:BLOCK])
    np.testing.assert_array_equal(tokens[0, 0, BLOCK:], 0)
    np.testing.assert_array_equal(tokens[1, 0], second)
    np.testing.assert_array_equal(aux["trajectory"][0, 0, :, BLOCK:], 0)


def test_decoding_ends_with_the_last_text():
    model, params = _model()
    first = _whole()[0]
    batch_of_one = {name: value[:1] for name, value in BATCH.items()}
    end = next(t for t in first[BLOCK : 2 * BLOCK] if t > 0 and t not in first[:BLOCK])
    predict = functools.partial(model.predict_batch_with_aux, return_cost=True, eos_id=int(end))
    tokens, aux = jax.jit(predict)(params, batch_of_one, KEY)
    assert end in np.asarray(tokens)[0, BLOCK : 2 * BLOCK]
    np.testing.assert_array_equal(tokens[0, 2 * BLOCK :], 0)
    assert aux["positions"][0] == 2 * 3 * 2 * BLOCK + BLOCK


def test_blocks_go_with_every_other_setting():
    model, params = _model()
    settings = {"halve_every": 1, "stop": Unchanged(), "trim_multiple": 2, "temperature": 0.0}
    tokens, aux = _decode(model, params, **settings)
    assert tokens.shape == (2, 1, LENGTH)
    most = COUNT * (2 + 2 * 1) * BLOCK + (COUNT - 1) * BLOCK
    assert (aux["positions"] <= most).all()
    assert np.isfinite(aux["scores"]).all()


def test_blocks_without_cached_prefixes_are_refused():
    with pytest.raises(ValueError, match=r"block_length needs cached prefixes.*diffusion_blocks"):
        dataclasses.replace(PLAIN, block_length=4, prefix_cache=False)
    with pytest.raises(ValueError, match="block_length = -4; expected a value >= 0"):
        dataclasses.replace(PLAIN, block_length=-4)


def test_a_prefix_that_sees_what_follows_cannot_be_followed_by_blocks():
    model, params = _model()
    objective = dataclasses.replace(
        model.objective, attention_pattern="cached_prefix", block_length=0
    )
    other = Model(model.module, objective, PLAIN, toy.VOCABULARY, None)
    with pytest.raises(ValueError, match="set BLOCK_LENGTH for both"):
        jax.eval_shape(lambda: other.predict_batch_with_aux(params, BATCH, block_length=BLOCK))
