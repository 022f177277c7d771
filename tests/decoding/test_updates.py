"""Update rules against what they say, position by position."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_t5x.decoding import canvases
from diffusion_t5x.decoding.updates import (
    Ancestral,
    ArgmaxUnrolled,
    ConfidenceUnmask,
    EntropyBound,
    Remask,
    ResampleAll,
    ResampleShare,
)
from diffusion_t5x.interfaces import Readout, StepView
from diffusion_t5x.objectives.corruption import MaskCorruption, MixedCorruption, UniformCorruption

KEY = jax.random.PRNGKey(0)
NOISE = 77  # what every fresh random token is, here
MASK = 99
MASKS = MaskCorruption(100, mask_id=MASK)


class _Noise(UniformCorruption):
    def prior(self, rng, shape):
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


def update(rule, canvas, readout, step=0, num_steps=1, corruption=None):
    corruption = corruption or _Noise(100)
    return rule(StepView(canvas, readout, jnp.int32(step), num_steps), KEY, corruption)


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


def test_text_of_a_share_has_no_masks():
    before = canvas([[MASK] * 8], [[-np.inf] * 8])
    result, _ = update(ResampleShare(0.5), before, readout(np.ones((1, 8))), corruption=MASKS)
    drawn = np.asarray(result.tokens[0]) != MASK
    assert drawn.sum() == 4
    expected = np.where(drawn, np.arange(10, 18), np.arange(30, 38))
    np.testing.assert_array_equal(result.text[0], expected)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 6])
def test_argmax_unrolling_is_sundaes_loop(num_steps):
    # Logits of position i depend on the tokens at i and before it.
    table = np.random.default_rng(0).normal(size=(7, 7, 7))
    log_probs = table - np.log(np.exp(table).sum(-1, keepdims=True))
    read = lambda tokens: log_probs[tokens, np.roll(tokens, 1)]  # noqa: E731
    tokens = np.random.default_rng(1).integers(0, 7, 10)
    now = canvas(tokens[None], [[-np.inf] * 10])
    for step in range(num_steps):
        logs = read(np.asarray(now.tokens[0]))
        likely = jnp.asarray(logs.max(-1))[None]
        said = readout(-likely, argmax=logs.argmax(-1)[None])
        now, _ = update(ArgmaxUnrolled(0.3), now, said, step, num_steps)
    for _ in range(-(-num_steps // 2)):
        first = read(tokens)
        tokens = first.argmax(-1)
        if _ == num_steps // 2:
            break
        uncertain = np.argsort(first.max(-1))[:3]
        tokens[uncertain] = read(tokens).argmax(-1)[uncertain]
    np.testing.assert_array_equal(now.tokens[0], tokens)


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


CONFIDENT = np.array([[0.9, 0.2, 0.6, 0.8, 0.1, 0.7, 0.3]])  # of 7 positions


def _unmask(rule, num_steps, noise=MASK):
    """The positions that each step writes, by a network that always says the same."""
    said = readout(-np.log(CONFIDENT))._replace(margin=jnp.asarray(CONFIDENT) ** 2)
    now = canvas([[noise] * 7], [[-np.inf] * 7])
    written = []
    for step in range(num_steps):
        before = now
        now, score = update(rule, now, said, step, num_steps, MASKS)
        where = np.flatnonzero(np.asarray(now.certainty[0]) > -np.inf)
        written.append(set(where) - set().union(*written))
        kept = np.asarray(before.certainty[0]) > -np.inf
        np.testing.assert_array_equal(now.tokens[0][kept], before.tokens[0][kept])
        # Noise that is left is scored, and read, as its argmax; all has one log-probability here.
        np.testing.assert_allclose(score, np.log(CONFIDENT).sum(-1), rtol=1e-6)
        rest = np.setdiff1d(np.arange(7), where)
        np.testing.assert_array_equal(now.text[0][rest], np.arange(30, 37)[rest])
        np.testing.assert_array_equal(now.tokens[0][rest], noise)
        assert bool(now.done[0]) == (rest.size == 0)
    np.testing.assert_array_equal(now.tokens[0], np.arange(10, 17))
    return written


@pytest.mark.parametrize("measure", ["probability", "margin", "entropy"])
@pytest.mark.parametrize("noise", [MASK, 3])
def test_the_most_confident_positions_are_written_in_even_shares(measure, noise):
    # LLaDA's numbers of 7 tokens in 4 steps: 7 // 4, and one more in the first 7 % 4 steps.
    assert _unmask(ConfidenceUnmask(measure), 4, noise) == [{0, 3}, {5, 2}, {6, 1}, {4}]


def test_a_number_per_step_is_kept_to_and_the_last_step_writes_the_rest():
    assert _unmask(ConfidenceUnmask(per_step=3), 4) == [{0, 3, 5}, {2, 6, 1}, {4}, set()]
    assert _unmask(ConfidenceUnmask(per_step=1), 2) == [{0, 3, 5, 2}, {6, 1, 4}]


@pytest.mark.parametrize(
    ("measure", "threshold"),
    [("probability", 0.65), ("margin", 0.65**2), ("entropy", -np.log(0.65))],
)
def test_a_threshold_writes_all_that_reach_it_and_at_least_one(measure, threshold):
    steps = _unmask(ConfidenceUnmask(measure, threshold), 7)
    assert steps == [{0, 3, 5}, {2}, {6}, {1}, {4}, set(), set()]


def _sample(rule, corruption, num_steps, clean, rows=4000):
    """Decodes with a network that knows nothing but how likely each clean token is."""
    clean = jnp.asarray(clean)

    def step(index, now):
        draw, key = jax.random.split(jax.random.fold_in(KEY, index))
        drawn = jax.random.categorical(draw, jnp.log(clean), shape=now.tokens.shape)
        log_prob = jnp.log(clean)[drawn]
        said = Readout(drawn, drawn, log_prob, log_prob, log_prob, 0 * log_prob)
        new, score = rule(StepView(now, said, index, num_steps), key, corruption)
        return new._replace(score=score)

    noise = corruption.prior(KEY, (rows, 3))
    state = canvases.start(noise, num_steps, keep_trajectory=False)
    step = jax.jit(step)
    return [state := step(jnp.int32(i), state) for i in range(num_steps)]


@pytest.mark.parametrize("corruption", [
    pytest.param(MaskCorruption(4, mask_id=3, schedule="cosine"), marks=pytest.mark.slow),
    pytest.param(UniformCorruption(4), marks=pytest.mark.slow),
    MixedCorruption(4, mask_id=3, uniform_share=0.4),
], ids=lambda c: type(c).__name__)  # fmt: skip
def test_ancestral_steps_have_the_noises_marginals_and_end_in_clean_text(corruption):
    clean = np.array([0.6, 0.3, 0.1, 0.0])
    states = _sample(Ancestral(), corruption, 4, clean)
    for index, state in enumerate(states):
        masses = corruption.masses(jnp.float32(1 - (index + 1) / 4))
        uniform = np.full(4, 1 / corruption.num_uniform)
        uniform[list(corruption.forbidden)] = 0
        expected = clean * masses.clean + uniform * masses.uniform + np.eye(4)[3] * masses.mask
        got = np.bincount(np.asarray(state.tokens).ravel(), minlength=4) / state.tokens.size
        np.testing.assert_allclose(got, expected, atol=0.02)  # 4 standard errors
        assert not np.asarray(corruption.is_noise(state.text)).any()
        assert np.isfinite(state.score).all()
    np.testing.assert_array_equal(states[-1].tokens, states[-1].text)
    expected = np.log(np.maximum(clean, 1e-9))[states[-1].text].sum(-1)
    np.testing.assert_allclose(states[-1].score, expected, rtol=1e-5)


@pytest.mark.parametrize("by_confidence", [False, True])
@pytest.mark.parametrize(("sigma", "eta"), [("capped", 0.3), ("rescaled", 0.5), ("rescaled", 1.0)])
def test_remasking_masks_as_its_sigma_says_and_keeps_the_noises_share_of_masks(
    sigma, eta, by_confidence
):
    corruption, num_steps = MaskCorruption(4, mask_id=3), 4
    rule = Remask(sigma, eta, by_confidence)
    states = _sample(rule, corruption, num_steps, [0.6, 0.3, 0.1, 0.0])
    for index, (before, after) in enumerate(itertools.pairwise(states), 1):
        now, later = 1 - index / num_steps, 1 - (index + 1) / num_steps
        most = min(1, later / (1 - now))
        expected = min(eta, most) if sigma == "capped" else eta * most
        was = np.asarray(before.tokens) != 3
        remasked = was & (np.asarray(after.tokens) == 3)
        if by_confidence:
            # Of a row's text, sigma is shared out by softmax(-p).
            weight = np.where(was, np.exp(-np.exp(np.asarray(before.certainty))), 0)
            weight = weight / np.maximum(weight.sum(-1, keepdims=True), 1e-9)
            for p in (0.6, 0.1):
                of = was & np.isclose(np.exp(np.asarray(before.certainty)), p)
                np.testing.assert_allclose(
                    remasked[of].mean(), expected * weight[of].mean(), atol=0.06
                )
        else:
            np.testing.assert_allclose(remasked.sum() / was.sum(), expected, atol=0.03)
            np.testing.assert_allclose((np.asarray(after.tokens) == 3).mean(), later, atol=0.02)
    assert (np.asarray(states[-1].tokens) != 3).all()
    assert np.isfinite(states[-1].score).all()


def test_without_remasking_it_is_ancestral():
    masks = MaskCorruption(4, mask_id=3)
    kept = [np.asarray(s.tokens) for s in _sample(Remask(eta=0.0), masks, 4, [0.6, 0.4, 0, 0])]
    for before, after in itertools.pairwise(kept):
        np.testing.assert_array_equal(after[before != 3], before[before != 3])


def test_remasking_needs_masks():
    with pytest.raises(ValueError, match="UniformCorruption has uniform noise"):
        Remask().check(UniformCorruption(4))
    with pytest.raises(ValueError, match="MixedCorruption has uniform noise"):
        jax.jit(lambda: Remask().check(MixedCorruption(4, mask_id=3)))()
    Remask().check(MixedCorruption(4, mask_id=3, uniform_share=0.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResampleShare(0.0), "share = 0.0"),
        (lambda: ArgmaxUnrolled(1.5), "uncertain_share = 1.5"),
        (lambda: EntropyBound(-1.0), "bound = -1.0"),
        (lambda: ConfidenceUnmask("probabilty"), "did you mean 'probability'"),
        (lambda: ConfidenceUnmask(threshold=1.5), "threshold = 1.5"),
        (lambda: ConfidenceUnmask("entropy", threshold=0.0), "threshold = 0.0"),
        (lambda: ConfidenceUnmask(per_step=0), "per_step = 0"),
        (lambda: Remask("max"), "Remask.sigma"),
        (lambda: Remask(eta=1.5), "eta = 1.5"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
