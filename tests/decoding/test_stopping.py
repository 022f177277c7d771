"""Stop rules by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_t5x.decoding import canvases
from diffusion_t5x.decoding.stopping import ScoreSettled, StableAndConfident, Unchanged
from diffusion_t5x.interfaces import Readout, StepView


def ask(rule, canvas, argmax, previous_argmax=-1, entropy=0.0, score=0.0, previous_score=-np.inf):
    argmax = jnp.asarray(argmax)
    full = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), argmax.shape)  # noqa: E731
    readout = Readout(argmax, argmax, full(0), full(0), full(0), full(entropy))
    previous = jnp.broadcast_to(jnp.asarray(previous_argmax), argmax.shape)
    score, before = (
        jnp.broadcast_to(jnp.asarray(s), argmax.shape[:1]) for s in (score, previous_score)
    )
    read = canvases.start(jnp.asarray(canvas), 2, keep_trajectory=False)
    read = read._replace(score=before, readout=read.readout._replace(argmax=previous))
    return rule(StepView(read, readout, jnp.int32(1), 2), score)


def test_unchanged_asks_every_position_of_a_canvas():
    done = ask(Unchanged(), [[1, 2], [1, 2], [2, 1]], [[1, 2], [1, 3], [1, 2]])
    np.testing.assert_array_equal(done, [True, False, False])


def test_a_score_has_settled_when_it_moved_by_no_more_than_the_tolerance():
    tokens = [[1]] * 4
    scores = {"score": [-1.0, -1.0, -1.0, -1.0], "previous_score": [-1.4, -0.6, -1.6, -np.inf]}
    np.testing.assert_array_equal(
        ask(ScoreSettled(0.5), tokens, tokens, **scores), [True, True, False, False]
    )


def test_stable_and_confident_needs_both():
    argmax = [[1, 2], [1, 2], [1, 2]]
    entropy = [[0.001, 0.002], [0.001, 0.2], [0.0, 0.0]]
    previous = [[1, 2], [1, 2], [1, 3]]
    done = ask(StableAndConfident(0.01), [[9, 9]] * 3, argmax, previous, entropy)
    np.testing.assert_array_equal(done, [True, False, False])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreSettled(-0.1), "tolerance = -0.1"),
        (lambda: StableAndConfident(0.0), "max_entropy = 0.0"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
