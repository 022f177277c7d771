"""How much of the padding after a text counts, against a loop over positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_network import FakeNetwork

from diffusion_t5x.objectives import StepUnrolledDenoising
from diffusion_t5x.objectives.corruption import UniformCorruption
from diffusion_t5x.objectives.losses import normalize_weights

VOCAB = 9
# Ends early, with an end of text inside, with a zero inside, whole, cut, empty.
TARGETS = np.array(
    [
        [5, 1, 0, 0, 0, 0],
        [5, 1, 6, 1, 0, 0],
        [5, 0, 6, 1, 0, 0],
        [5, 6, 7, 8, 5, 1],
        [5, 6, 7, 8, 5, 6],
        [0, 0, 0, 0, 0, 0],
    ]
)
WEIGHTS = np.random.default_rng(0).uniform(0.5, 2.0, TARGETS.shape).astype(np.float32)
SETTINGS = [
    {"padding": "canvas", "padding_weight": 0.5},
    {"padding": "tail", "tail_length": 1, "padding_weight": 0.25},
    {"padding": "tail", "tail_length": 3},
    {"padding": "tail", "tail_length": 100},
    {"padding": "eos_only"},
]


def _expected(padding="canvas", tail_length=0, padding_weight=1.0, block_length=None):
    counted = np.zeros(TARGETS.shape)
    for row, tokens in enumerate(TARGETS):
        end = max((place + 1 for place, token in enumerate(tokens) if token), default=0)
        last = {"canvas": len(tokens), "tail": end + tail_length, "eos_only": end}[padding]
        if block_length:  # no decoder writes a block after the one in which a text ends
            last = min(last, -(-max(end, 1) // block_length) * block_length)
        for place, token in enumerate(tokens[:last]):
            counted[row, place] = 1.0 if token else padding_weight
    return counted * WEIGHTS


@pytest.mark.parametrize("block_length", [0, 2, 4])
@pytest.mark.parametrize("settings", SETTINGS)
def test_weights_are_those_of_a_loop_over_positions(settings, block_length):
    blocks = {"block_length": block_length, "attention_pattern": "causal_prefix"}
    objective = StepUnrolledDenoising(
        UniformCorruption(VOCAB), **settings, **(blocks if block_length else {})
    )
    weights = objective.token_weights(jnp.asarray(TARGETS), jnp.asarray(WEIGHTS))
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, _expected(**settings, block_length=block_length))


def test_a_long_tail_is_the_canvas_and_both_are_what_they_were():
    canvas, tail = (
        StepUnrolledDenoising(UniformCorruption(VOCAB), **settings)
        for settings in ({}, {"padding": "tail", "tail_length": TARGETS.shape[1]})
    )
    for objective in (canvas, tail):
        weights = objective.token_weights(jnp.asarray(TARGETS), jnp.asarray(WEIGHTS))
        np.testing.assert_array_equal(weights, WEIGHTS)


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_what_does_not_count_has_no_gradient_and_no_part_in_the_normalisation(settings):
    """The loss changes with the tokens that count, and is a mean over these."""
    objective = StepUnrolledDenoising(UniformCorruption(VOCAB), num_unrolls=0, **settings)
    targets = jnp.asarray(TARGETS)
    weights = objective.token_weights(targets, jnp.ones(targets.shape))
    normalized, total = normalize_weights("NUM_REAL_TARGET_TOKENS", weights)
    expected = _expected(**settings) / WEIGHTS
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-6)

    def loss(hidden):
        network = FakeNetwork(len(TARGETS), jnp.eye(VOCAB), lambda canvas: hidden)
        return objective.loss(network, targets, normalized, jax.random.PRNGKey(0))[0] / total

    value, gradient = jax.value_and_grad(loss)(jnp.zeros((*targets.shape, VOCAB)))
    assert value == pytest.approx(np.log(VOCAB), rel=1e-5)  # of a uniform distribution
    felt = np.abs(np.asarray(gradient)).sum(-1) > 0
    np.testing.assert_array_equal(felt, expected > 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"padding": "tails"}, "did you mean 'tail'"),
        ({"padding": "tail"}, "tail_length = 0 with padding = 'tail'; expected .* at least 1"),
        ({"padding": "tail", "tail_length": -1}, "at least 1"),
        ({"padding": "tail", "tail_length": 1.5}, "whole number"),
        ({"padding": "tail", "tail_length": True}, "whole number"),
        ({"tail_length": 4}, "tail_length = 4 with padding = 'canvas'; expected 0"),
        ({"padding": "eos_only", "tail_length": 4}, "with padding = 'eos_only'; expected 0"),
        ({"padding": "eos_only", "padding_weight": 0.5}, "expected 1.0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        StepUnrolledDenoising(UniformCorruption(VOCAB), **settings)
