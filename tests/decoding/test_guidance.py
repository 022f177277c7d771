"""Classifier-free guidance, and training and reading without prefixes."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import QUICK, make

from diffusion_t5x.decoding.diffusion import DiffusionDecoder
from diffusion_t5x.decoding.guidance import GuidedNetwork, guide
from diffusion_t5x.networks import bound_network
from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.networks.encoder_decoder import EncoderDecoder
from diffusion_t5x.objectives import StepUnrolledDenoising
from diffusion_t5x.objectives.corruption import UniformCorruption

KEY = jax.random.PRNGKey(0)
PREFIX = np.array([[5, 6, 7], [3, 4, 0]])
EMPTY = np.zeros_like(PREFIX)
CANVAS = jnp.array([[2, 3, 4, 1], [9, 8, 1, 0]])
CORRUPTION = UniformCorruption(17)


def _bind(network, params, prefix=PREFIX, pattern="causal_prefix"):
    batch = {"encoder_input_tokens": prefix, "decoder_input_tokens": CANVAS}
    return bound_network.bind(network, params, batch, pattern)


@pytest.mark.parametrize(
    ("network_class", "config"),
    [
        (DecoderOnly, {}),
        pytest.param(EncoderDecoder, {}, marks=pytest.mark.slow),
        pytest.param(DecoderOnly, {"start_token": True}, marks=pytest.mark.slow),
    ],
)
def test_guided_logits_are_those_of_an_empty_prefix_moved_towards_and_beyond_those_with_one(
    network_class, config
):
    network, params = make(network_class, **config)

    def logits(params):
        bound = _bind(network, params)
        plain = [b.logits(b.forward(CANVAS, None)) for b in (bound, _bind(network, params, EMPTY))]
        guided = guide(bound, 2.5)
        return plain, [b.logits(b.forward(CANVAS, None)) for b in (guided, guided.cache_prefix())]

    (given, empty), results = jax.jit(logits, compiler_options=QUICK)(params)
    assert np.abs(given - empty).max() > 0.1
    for result in results:
        np.testing.assert_allclose(result, empty + 2.5 * (given - empty), atol=1e-4)


def test_logits_of_tokens_that_are_never_drawn_stay():
    table = jnp.array([[1.0, 3.0, -jnp.inf]])
    fake = types.SimpleNamespace(logits=lambda hidden: hidden)
    guided = GuidedNetwork(fake, fake, 3.0).logits(jnp.concatenate([table, table + 1], axis=-1))
    np.testing.assert_array_equal(guided, [[-1.0, 1.0, -np.inf]])


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(
            {"prefix_cache": True, "block_length": 2, "num_samples": 2}, marks=pytest.mark.slow
        ),
        {"num_samples": 3, "halve_every": 1},
    ],
    ids=str,
)
def test_decoding_with_scale_0_is_decoding_without_prefixes_at_twice_the_passes(fields):
    network, params = make(DecoderOnly)
    plain = DiffusionDecoder(CORRUPTION, num_steps=2, **fields)

    @functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def decode(decoder, params, prefix):
        return decoder.decode(_bind(network, params, prefix), 4, KEY)

    guided = decode(dataclasses.replace(plain, guidance_scale=0.0), params, PREFIX)
    expected = decode(plain, params, EMPTY)
    np.testing.assert_array_equal(guided.tokens, expected.tokens)
    np.testing.assert_allclose(guided.scores, expected.scores, rtol=1e-4)
    np.testing.assert_array_equal(guided.passes, 2 * expected.passes)


def test_training_drops_prefixes_at_a_rate():
    network, params = make(DecoderOnly)

    def loss(rate, prefix=PREFIX):
        objective = StepUnrolledDenoising(CORRUPTION, num_unrolls=0, prefix_drop_rate=rate)

        def run(params):
            bound = _bind(network, params, prefix, "bidirectional")
            return objective.loss(bound, CANVAS, jnp.ones(CANVAS.shape), KEY)[0]

        return jax.jit(run, compiler_options=QUICK)(params)

    assert loss(1.0) == loss(1.0, EMPTY) != loss(1e-9)
    with pytest.raises(ValueError, match=r"prefix_drop_rate = 1.5; expected a probability"):
        StepUnrolledDenoising(CORRUPTION, prefix_drop_rate=1.5)


def test_what_guidance_cannot_do_is_refused():
    with pytest.raises(ValueError, match="guidance_scale = -1; expected a value >= 0"):
        DiffusionDecoder(CORRUPTION, guidance_scale=-1)
    with pytest.raises(ValueError, match=r"guidance_scale = 2.0; expected 1: a step alone"):
        DiffusionDecoder(CORRUPTION, guidance_scale=2.0).count_steps(4)
    network, params = make(DecoderOnly)
    with pytest.raises(ValueError, match="drop them before they are cached"):
        jax.eval_shape(lambda p: guide(_bind(network, p).cache_prefix(), 2.0).cache, params)
