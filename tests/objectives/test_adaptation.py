"""Recipes that adapt AR models: attention that opens, the AR shift, an AR loss beside."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import QUICK, make

from diffusion_t5x.decoding.diffusion import DiffusionDecoder
from diffusion_t5x.networks import bound_network
from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.networks.encoder_decoder import EncoderDecoder
from diffusion_t5x.objectives import NextToken, StepUnrolledDenoising
from diffusion_t5x.objectives.attention_patterns import (
    DENOISING_PATTERNS,
    Opening,
    make_mask,
)
from diffusion_t5x.objectives.corruption import UniformCorruption
from diffusion_t5x.objectives.losses import CrossEntropy

KEY = jax.random.PRNGKey(0)
CORRUPTION = UniformCorruption(17)
PREFIX = np.array([[5, 6, 7, 8, 9], [3, 4, 0, 0, 0], [7, 0, 0, 0, 0]])
TARGET = np.array([[2, 3, 4, 1, 0, 0], [9, 8, 1, 0, 0, 0], [7, 1, 0, 0, 0, 0]])
# Windows shorter than the texts, scanned layers, and attention in chunks of one row.
FAMILY = {
    "num_layers": 2,
    "positions": "rotary",
    "attention_scale": 0.5,
    "sliding_window": 4,
    "sliding_period": 2,
    "scan_layers": True,
    "attention_block_logits": 1,
}
CONFIGS = {"t5": {}, "family": FAMILY}


def _bind(network, params, pattern, prefix=PREFIX, **settings):
    batch = {"encoder_input_tokens": prefix, "decoder_input_tokens": TARGET}
    return bound_network.bind(network, params, batch, pattern, **settings)


def _states(network, params, pattern, canvas=TARGET, share=None, **settings):
    """Hidden states of the canvas; `share` of attention is open, all of it if None."""

    def read(params, canvas, share):
        opening = None if share is None else Opening(share, KEY)
        return _bind(network, params, pattern, opening=opening, **settings).forward(canvas, None)

    return jax.jit(read, compiler_options=QUICK)(params, canvas, share)


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        ("family", "bidirectional"),
        ("t5", "causal_prefix"),
        *[
            pytest.param(config, pattern, marks=pytest.mark.slow)
            for config in CONFIGS
            for pattern in DENOISING_PATTERNS
            if (config, pattern) not in (("family", "bidirectional"), ("t5", "causal_prefix"))
        ],
    ],
)
def test_closed_attention_is_causal_and_open_attention_the_patterns_bit_for_bit(config, pattern):
    network, params = make(DecoderOnly, **CONFIGS[config])
    closed = _states(network, params, pattern, share=0.0, shift=True)
    # With the shift, a causal canvas is what the AR network reads: the same states, so logits.
    np.testing.assert_array_equal(closed, _states(network, params, "causal"))
    opened = _states(network, params, pattern, share=1.0)
    np.testing.assert_array_equal(opened, _states(network, params, pattern))
    half = _states(network, params, pattern, share=0.5)
    assert np.abs(half - opened).max() > 1e-3
    assert np.abs(half[:, :-1] - closed[:, 1:]).max() > 1e-3


@pytest.mark.slow
def test_an_encoder_decoders_canvas_opens_too():
    network, params = make(EncoderDecoder)
    begun = np.pad(TARGET, [(0, 0), (1, 0)])[:, :-1]
    closed = _states(network, params, "bidirectional", begun, share=0.0)
    np.testing.assert_array_equal(closed, _states(network, params, "causal"))
    opened = _states(network, params, "bidirectional", share=1.0)
    np.testing.assert_array_equal(opened, _states(network, params, "bidirectional"))


def test_an_opening_mask_grows_from_causal_by_its_share_and_is_one_for_all_rows():
    length = 60
    segments, is_prefix = np.ones((2, length), int), np.arange(length)[None] < [[20], [20]]

    def mask(pattern, share):
        opening = Opening(jnp.float32(share), KEY)
        return np.asarray(make_mask(pattern, segments, is_prefix, opening))

    causal = np.tril(np.ones((length, length), bool))
    last = causal
    for share in (0.1, 0.5, 0.9):
        now = mask("bidirectional", share)
        np.testing.assert_array_equal(now[0], now[1])
        assert (now[0] >= last).all()
        assert now[0][~causal].mean() == pytest.approx(share, abs=0.04)
        last = now[0]
        # No key is seen that the pattern hides.
        full = np.asarray(make_mask("causal_prefix", segments, is_prefix))
        np.testing.assert_array_equal(mask("causal_prefix", share), now & full)


def _by_hand(network, params, pattern, prefix, canvas):
    """Logits of a canvas `[length]` after a prefix `[n]`, each read at the position before it.

    The last prefix token is read as if it began the canvas, of which the states are not shifted.
    """
    row, canvas = prefix[None, :-1], jnp.append(prefix[-1], canvas)[None]
    if pattern == "bidirectional":
        bound = _bind(network, params, pattern, row)
        return bound.logits(bound.forward(canvas, None))[0, :-1]
    # The prefix does not see the canvas; the token before the canvas is the prefix's last.
    whole = _bind(network, params, pattern, prefix[None])
    count, alone = (2, "causal") if pattern == "causal_prefix" else (1, "bidirectional")
    before = _bind(network, params, alone, row).forward(canvas[:, :count], None)[:, -1:]
    states = jnp.concatenate([before, whole.forward(canvas[:, 1:], None)[:, :-1]], axis=1)
    return whole.logits(states)[0]


PATTERN_OF = {
    "whole": {"attention_pattern": "bidirectional"},
    "cached": {"attention_pattern": "cached_prefix", "prefix_cache": True},
    "blocks": {"attention_pattern": "causal_prefix", "prefix_cache": True, "block_length": 3},
}


# Blocks are cached too.
@pytest.mark.parametrize(
    "name", ["blocks", *(pytest.param(n, marks=pytest.mark.slow) for n in ("whole", "cached"))]
)
def test_a_decoder_with_the_shift_equals_a_loop_by_hand(name):
    settings = dict(PATTERN_OF[name])
    pattern = settings.pop("attention_pattern")
    network, params = make(DecoderOnly)
    steps, length = 3, 6
    decoder = DiffusionDecoder(
        CORRUPTION, num_steps=steps, num_samples=2, temperature=0.0, **settings
    )

    @jax.jit
    def decode(params):
        bound = _bind(network, params, pattern, shift=True)
        return decoder.decode(bound, length, KEY, return_trajectory=True)

    decoded = decode(params)
    logits = jax.jit(
        lambda params, prefix, canvas: _by_hand(network, params, pattern, prefix, canvas),
        compiler_options=QUICK,
    )
    block = settings.get("block_length", length)
    for row in (0, 1):
        prefix = PREFIX[row][PREFIX[row] > 0]
        for start in range(0, length, block):
            shown = np.asarray(decoded.trajectory[row, -1, :, start : start + block])
            canvas = shown[0]
            for step in range(steps):
                canvas = np.argmax(logits(params, jnp.asarray(prefix), jnp.asarray(canvas)), -1)
                np.testing.assert_array_equal(shown[step + 1], canvas)
            prefix = np.append(prefix, canvas)


@pytest.mark.parametrize(
    "pattern",
    ["bidirectional", pytest.param("cached_prefix", marks=pytest.mark.slow), "causal_prefix"],
)
def test_scores_of_a_shifted_model_are_those_by_hand(pattern):
    network, params = make(DecoderOnly)
    objective = StepUnrolledDenoising(CORRUPTION, attention_pattern=pattern, shift=True)
    weights = jnp.ones(TARGET.shape)

    @jax.jit
    def scores(params):
        bound = _bind(network, params, pattern, shift=True)
        rows = [jnp.asarray(row) for row in (PREFIX[0], PREFIX[1][:2])]
        logits = [_by_hand(network, params, pattern, p, TARGET[i]) for i, p in enumerate(rows)]
        log_probs = jax.nn.log_softmax(jnp.stack(logits))
        picked = jnp.take_along_axis(log_probs, TARGET[:2, :, None], axis=-1)
        score = objective.cross_entropy.log_likelihood(bound, TARGET, weights)
        return score[:2], picked.sum((1, 2))

    np.testing.assert_allclose(*scores(params), rtol=1e-4)


class _NoCorruption:
    vocab_size, forbidden = 17, ()

    def sample_times(self, rng, batch_size, length):
        return jnp.zeros((batch_size, 1))

    def rate(self, times):
        return times

    def corrupt(self, rng, tokens, times):
        return tokens, jnp.zeros(tokens.shape, bool)


@pytest.mark.parametrize(
    "network_class", [DecoderOnly, pytest.param(EncoderDecoder, marks=pytest.mark.slow)]
)
def test_the_ar_loss_beside_is_that_of_next_token_prediction(network_class):
    network, params = make(network_class)
    cross_entropy = CrossEntropy(z_loss=1e-3)
    alone = StepUnrolledDenoising(_NoCorruption(), cross_entropy=cross_entropy)
    beside = dataclasses.replace(alone, next_token_weight=0.3)
    text = jnp.asarray(TARGET != 0, jnp.float32)
    weights = jnp.ones(TARGET.shape)

    @jax.jit
    def losses(params):
        open_, causal = (_bind(network, params, p) for p in ("bidirectional", "causal"))
        return (
            NextToken(cross_entropy=cross_entropy).loss(causal, TARGET, text, KEY),
            alone.loss(open_, TARGET, weights, KEY),
            beside.loss(open_, TARGET, weights, KEY),
        )

    ar, without, both = losses(params)
    assert both[0] == pytest.approx(float(without[0] + 0.3 * ar[0]), rel=1e-6)
    assert both[1] == without[1]
    assert ar[0] > 1
    for name, value in ar[2].items():
        assert both[2][f"{name}/next_token"] == value
    assert both[2].keys() - without[2].keys() == {f"{name}/next_token" for name in ar[2]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"opening_steps": -1}, "opening_steps = -1; expected a value >= 0"),
        ({"opening_steps": 0.5}, "opening_steps = 0.5.* expected a whole number"),
        ({"shift": "no"}, "shift = 'no'; expected .* True or False"),
        ({"next_token_weight": -0.1}, "next_token_weight = -0.1; expected a value >= 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StepUnrolledDenoising(CORRUPTION, **settings)


def test_the_ar_loss_may_predict_the_prefix_too():
    network, params = make(DecoderOnly)
    objective = StepUnrolledDenoising(CORRUPTION, next_token_weight=1.0, next_token_prefix=True)
    # The same texts, with one token of prefix.
    texts = np.array([[6, 7, 8, 9, *TARGET[0]], [4, *TARGET[1], 0, 0, 0], [*TARGET[2], 0, 0, 0, 0]])

    def losses(params):
        weights = jnp.array([[2.0], [1.0], [3.0]]) * jnp.ones(TARGET.shape)
        bound = _bind(network, params, "bidirectional")
        ours = objective._loss_beside(bound, TARGET, weights, KEY)[0]
        short = _bind(network, params, "causal", PREFIX[:, :1])
        weights = weights[:, :1] * (texts != 0)
        return ours, NextToken().loss(short, texts, weights, KEY)[0]

    ours, expected = jax.jit(losses, compiler_options=QUICK)(params)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="next_token_prefix = True needs NEXT_TOKEN_WEIGHT"):
        StepUnrolledDenoising(CORRUPTION, next_token_prefix=True)
    network, params = make(EncoderDecoder)
    with pytest.raises(ValueError, match="next_token_prefix = True needs a decoder-only network"):
        _bind(network, params, "causal").read_text(TARGET, None)
