"""Update rules against what they say, position by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_t5x.decoding import canvases
from diffusion_t5x.decoding.updates import (
    ArgmaxUnrolled,
    EntropyBound,
    ResampleAll,
    ResampleShare,
)
from diffusion_t5x.interfaces import Readout, StepView

KEY = jax.random.PRNGKey(0)
NOISE = 77  # what every fresh random token is, here


def noise(rng, shape):
    return jnp.full(shape, NOISE, jnp.int32)


def readout(entropy, drawn=None, argmax=None, log_prob=None):
    entropy = jnp.asarray(entropy, jnp.float32)
    tokens = jnp.broadcast_to(jnp.arange(10, 10 + entropy.shape[1]), entropy.shape)
    drawn = tokens if drawn is None else jnp.asarray(drawn)
    argmax = tokens + 20 if argmax is None else jnp.asarray(argmax)
    log_prob = -entropy if log_prob is None else jnp.asarray(log_prob)
    return Readout(drawn, argmax, log_prob, log_prob, log_prob, entropy)


def canvas(tokens, certainty):
    start = canvases.start(jnp.asarray(tokens, jnp.int32), 1, keep_trajectory=False)
    return start._replace(certainty=jnp.asarray(certainty, jnp.float32))


def update(rule, canvas, readout):
    return rule(StepView(canvas, readout, jnp.int32(0), 1), KEY, noise)


def test_resampling_all_takes_every_draw():
    result, score = update(ResampleAll(), canvas([[1, 2, 3]], [[0, 0, 0]]), readout([[1, 2, 3]]))
    np.testing.assert_array_equal(result.tokens, [[10, 11, 12]])
    np.testing.assert_array_equal(result.text, result.tokens)
    np.testing.assert_array_equal(score, [-6])


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_resampling_a_share_changes_so_many_positions_others_at_each_step(share):
    before = canvas(np.zeros((64, 8), int), np.zeros((64, 8)))
    result, _ = update(ResampleShare(share), before, readout(np.ones((64, 8))))
    changed = np.asarray(result.tokens) == np.arange(10, 18)
    np.testing.assert_array_equal(changed.sum(-1), np.full(64, share * 8))
    if share < 1:
        assert len({tuple(row) for row in changed}) > 8
    np.testing.assert_array_equal(np.asarray(result.tokens)[~changed], 0)


def test_argmax_unrolling_rewrites_noise_first_and_then_what_was_uncertain():
    rule = ArgmaxUnrolled(uncertain_share=0.25)
    fresh = canvas([[1, 2, 3, 4]], [[-np.inf] * 4])
    first, _ = update(rule, fresh, readout([[1, 4, 2, 3]]))
    np.testing.assert_array_equal(first.tokens, [[30, 31, 32, 33]])
    # Position 1 was written with the lowest log-probability.
    second, _ = update(rule, first, readout([[1, 1, 1, 1]], argmax=[[50, 51, 52, 53]]))
    np.testing.assert_array_equal(second.tokens, [[30, 51, 32, 33]])
    np.testing.assert_array_equal(second.certainty, [[-1, -1, -2, -3]])


@pytest.mark.parametrize(
    ("bound", "accepted"),
    [
        (0.0, [False, True, False, True]),  # entropies 0 and 0.02: the largest is not counted
        (0.03, [True, True, False, True]),
        (0.1, [True, True, False, True]),
        (0.2, [True, True, True, True]),
    ],
)
def test_the_entropy_bound_accepts_by_hand_and_renoises_the_rest(bound, accepted):
    # Ascending 0, 0.02, 0.09, 0.5: sums without the largest 0, 0, 0.02, 0.11.
    entropy = [[0.09, 0.02, 0.5, 0.0]]
    result, _ = update(EntropyBound(bound), canvas([[1] * 4], [[0] * 4]), readout(entropy))
    expected = np.where(accepted, [10, 11, 12, 13], NOISE)
    np.testing.assert_array_equal(result.tokens[0], expected)
    np.testing.assert_array_equal(result.text[0], [30, 31, 32, 33])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResampleShare(0.0), "share = 0.0"),
        (lambda: ArgmaxUnrolled(1.5), "uncertain_share = 1.5"),
        (lambda: EntropyBound(-1.0), "bound = -1.0"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
