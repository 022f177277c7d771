"""Bounds of the likelihood against published equations, and against texts enumerated in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_network import FakeNetwork, table_network

from diffusion_t5x.objectives import BoundDenoising
from diffusion_t5x.objectives.corruption import (
    MaskCorruption,
    MixedCorruption,
    UniformCorruption,
)
from diffusion_t5x.objectives.losses import CrossEntropy

KEY = jax.random.PRNGKey(0)
VOCAB, BATCH, LENGTH = 5, 64, 8  # the mask is token 5
SCHEDULES = {  # rate and its derivative, float64
    "linear": (lambda t: t, np.ones_like),
    "cosine": (lambda t: 1 - np.cos(np.pi / 2 * t), lambda t: np.pi / 2 * np.sin(np.pi / 2 * t)),
    "polynomial": (lambda t: t**3, lambda t: 3 * t**2),
}


def _mask(**settings):
    return MaskCorruption(VOCAB, mask_id=VOCAB, **settings)


def _mixed(**settings):
    return MixedCorruption(VOCAB, mask_id=VOCAB, uniform_share=0.3, **settings)


def _mdlm(s, ds, x, x_theta, z):
    """MDLM's equation 10, which is MD4's: -alpha' / (1 - alpha) cross-entropy of masked tokens."""
    return np.where(z == VOCAB, ds / s * -np.log((x * x_theta).sum(-1)), 0.0)


def _udlm(s, ds, x, x_theta, z):
    """UDLM's equation 18, which is Duo's; `x_bar = K alpha x + 1 - alpha`."""
    alpha, dalpha = 1 - s, -ds
    bar, bar_theta = (VOCAB * alpha[..., None] * y + s[..., None] for y in (x, x_theta))
    at, at_theta = (np.take_along_axis(y, z[..., None], -1) for y in (bar, bar_theta))
    logs = np.log(at_theta * bar / (bar_theta * at))
    inside = VOCAB / at - VOCAB / at_theta - (bar / at * logs).sum(-1, keepdims=True)
    return dalpha / (VOCAB * alpha) * inside[..., 0]


def _gidd(s, ds, x, x_theta, z):
    """GIDD's theorem 3.1, of its hybrid noise (section 3.2) with B such that the share is 0.3."""
    mask = np.eye(VOCAB + 1)[VOCAB]
    uniform = (1 - mask) / VOCAB

    def noise(s):
        c = 2 * 0.3 / 0.7 * np.sqrt(s * (1 - s))
        alpha = (1 - s) / (1 + c)
        beta_pi = (s[..., None] * mask + c[..., None] * uniform) / (1 + c[..., None])
        return alpha, beta_pi / (1 - alpha)[..., None]

    step = 1e-6 * s * (1 - s)
    (alpha, pi), (later, pi_later), (before, pi_before) = map(noise, (s, s + step, s - step))
    dalpha, dpi = (later - before) / (2 * step), (pi_later - pi_before) / (2 * step)[..., None]

    def at(y):
        return np.take_along_axis(y, z[..., None], -1)[..., 0]

    beta = 1 - alpha
    q, p = (
        alpha[..., None] * np.pad(y, [(0, 0)] * 2 + [(0, 1)]) + beta[..., None] * pi
        for y in (x, x_theta)
    )
    weight = at(beta[..., None] * dpi - (dalpha / alpha)[..., None] * pi) / at(q)
    ratio = at(q) / at(p)
    return ds * weight * ((q * np.log(q / p)).sum(-1) + ratio - np.log(ratio) - 1)


@pytest.mark.parametrize(
    "schedule",
    [pytest.param(s, marks=pytest.mark.slow) if s == "polynomial" else s for s in SCHEDULES],
)
@pytest.mark.parametrize(
    ("noise", "reference"), [(_mask, _mdlm), (UniformCorruption, _udlm), (_mixed, _gidd)]
)
def test_the_loss_is_the_published_one(noise, reference, schedule):
    settings = {"schedule": schedule, "power": 3.0}
    corruption = noise(VOCAB, **settings) if noise is UniformCorruption else noise(**settings)
    rng = np.random.default_rng(0)
    table = rng.normal(scale=2.0, size=(VOCAB + 1, VOCAB))
    targets = rng.integers(0, VOCAB, (BATCH, LENGTH))
    weights = rng.integers(0, 3, (BATCH, LENGTH)).astype(np.float32)
    canvases = []
    network = FakeNetwork(
        BATCH,
        jnp.asarray(table, jnp.float32),
        lambda canvas: jax.nn.one_hot(canvas, VOCAB + 1),
        lambda canvas, rng: canvases.append(np.asarray(canvas)),
    )
    args = jnp.asarray(targets), jnp.asarray(weights), KEY
    loss, weight_sum, metrics = BoundDenoising(corruption).loss(network, *args)
    times = np.float64(corruption.sample_times(jax.random.split(KEY, 4)[0], BATCH, LENGTH))
    times = np.broadcast_to(times, targets.shape)
    rate, slope = SCHEDULES[schedule]
    [canvas] = canvases
    x_theta = np.exp(table)[canvas]
    x_theta /= x_theta.sum(-1, keepdims=True)
    each = reference(rate(times), slope(times), np.eye(VOCAB)[targets], x_theta, canvas)
    assert loss == pytest.approx((each * weights).sum(), rel=2e-4)
    assert metrics["bound"][0] == pytest.approx(loss)
    assert weight_sum == weights.sum()
    if noise is not UniformCorruption:
        assert (canvas == VOCAB).any()


@pytest.mark.parametrize(
    "noise",
    [
        pytest.param(_mask(), marks=pytest.mark.slow),
        pytest.param(UniformCorruption(VOCAB), marks=pytest.mark.slow),
        _mixed(),
    ],
)
def test_loss_and_gradient_do_not_depend_on_chunks_and_are_finite_at_all_times(noise, monkeypatch):
    rng = np.random.default_rng(1)
    table = jnp.asarray(rng.normal(scale=8.0, size=(VOCAB + 1, VOCAB)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, (BATCH, LENGTH)))
    ends = jnp.array([0.0, 1e-9, 1e-6, 1e-3, 0.5, 1 - 1e-3, 1 - 1e-7, 1.0])
    monkeypatch.setattr(
        type(noise), "sample_times", lambda *args: jnp.repeat(ends, BATCH // 8)[:, None]
    )

    def loss(table, block_logits):
        objective = BoundDenoising(noise, cross_entropy=CrossEntropy(block_logits=block_logits))
        network = FakeNetwork(BATCH, table, lambda canvas: jax.nn.one_hot(canvas, VOCAB + 1))
        return objective.loss(network, targets, jnp.ones(targets.shape), KEY)[0]

    whole = jax.value_and_grad(loss)(table, 2**20)
    parts = jax.value_and_grad(loss)(table, 3 * VOCAB)
    assert np.isfinite(whole[0]) and np.isfinite(whole[1]).all()
    np.testing.assert_allclose(whole[0], parts[0], rtol=1e-4)
    np.testing.assert_allclose(whole[1], parts[1], rtol=1e-3, atol=1e-3)


# ------------------- Two tokens, three positions, enumerated ------------------------------
SMALL = {
    "mask": MaskCorruption(2, mask_id=2),
    "uniform": UniformCorruption(2),
    "mixed": MixedCorruption(2, mask_id=2, uniform_share=0.4),
}
TEXTS = np.array(list(itertools.product(range(2), repeat=3)))
CANVASES = np.array(list(itertools.product(range(3), repeat=3)))
# Logits of each position for each of all canvases: [canvas and position, vocab].
TABLE = np.random.default_rng(0).normal(scale=1.5, size=(27 * 3, 2))


def _answer(canvas):
    code = canvas @ jnp.array([9, 3, 1])
    return jax.nn.one_hot(code[:, None] * 3 + jnp.arange(3), 81)


def _masses(kind, t):
    c = {"mask": 0.0, "uniform": None, "mixed": 2 * 0.4 / 0.6 * np.sqrt(t * (1 - t))}[kind]
    a, mask, uniform = (1 - t, 0.0, t) if c is None else np.array([1 - t, t, c]) / (1 + c)
    return a, np.array([uniform / 2, uniform / 2, mask])


def _log_likelihoods(kind, p, steps=1000):
    """The texts' log-likelihoods under ancestral sampling in many steps, exactly: `[texts]`."""
    _, end = _masses(kind, 1.0)
    state = np.prod(end[CANVASES], axis=-1)  # of all canvases
    # Steps are shorter at both ends, where mixed noise changes fastest.
    times = np.sin(np.linspace(0, np.pi / 2, steps + 1)) ** 2
    for s, t in zip(times[-2::-1], times[:0:-1], strict=True):
        (a, b), (a_s, b_s) = _masses(kind, t), _masses(kind, s)
        step = a / a_s * np.eye(3) + (b - a / a_s * b_s)  # q(z_t | z_s), [z_s, z_t]
        joint = (a_s * p + b_s) * step.T[CANVASES]  # [canvas, position, z_s], by Bayes' rule
        total = joint.sum(-1, keepdims=True)
        each = np.divide(joint, total, out=np.zeros_like(joint), where=total > 0)
        state = np.einsum("c,ci,cj,ck->ijk", state, *np.moveaxis(each, 1, 0)).ravel()
    assert state.sum() == pytest.approx(1.0)
    return np.log(state.reshape(3, 3, 3)[:2, :2, :2].ravel())


def _bounds(kind, p, count=4000):
    """The bound of minus each text's log-likelihood, by quadrature over all canvases: `[texts]`."""
    total = np.zeros(8)
    for root in (np.arange(count) + 0.5) / count:
        t, h = root**2, 1e-4 * root**2 * (1 - root**2)
        (a, b), (after, b_after), (before, b_before) = (
            _masses(kind, time) for time in (t, t + h, t - h)
        )
        da, db = (after - before) / (2 * h), (b_after - b_before) / (2 * h)
        p_t = np.maximum(a * p + b, 1e-300)[None]  # [1, canvas, position, z]
        q_t = np.maximum(a * np.eye(3)[TEXTS] + b, 1e-300)[:, None]  # [text, 1, position, z]

        def at(y):
            y = np.broadcast_to(y, (8, 27, 3, 3))
            return np.take_along_axis(y, CANVASES[None, ..., None], -1)[..., 0]

        q, ratio = at(q_t), at(q_t) / at(p_t)
        weight = at(db - da / a * b) / q
        each = weight * ((q_t * np.log(q_t / p_t)).sum(-1) + ratio - np.log(ratio) - 1)
        each = np.where(q > 1e-200, each, 0.0).sum(-1) * np.prod(q, axis=-1)
        total += each.sum(-1) * 2 * root / count
    return total


@pytest.mark.parametrize(
    "kind", [k if k == "mask" else pytest.param(k, marks=pytest.mark.slow) for k in SMALL]
)
def test_scores_are_bounds_of_the_enumerated_likelihood(kind):
    p = np.exp(TABLE).reshape(27, 3, 2)
    p = np.pad(p / p.sum(-1, keepdims=True), [(0, 0), (0, 0), (0, 1)])
    exact, bound = _log_likelihoods(kind, p), -_bounds(kind, p)
    assert (bound < exact).all() and (bound > exact - 2.5).all()
    if kind == "mask":
        np.testing.assert_allclose(bound, [_any_order(text) for text in TEXTS], rtol=1e-3)
    # A run with a limit has the same score.
    objective = BoundDenoising(SMALL[kind], max_weight=2.0, score_draws=4000)
    network = FakeNetwork(8, jnp.asarray(TABLE, jnp.float32), _answer)
    score = jax.jit(
        lambda rng: objective.score(network, jnp.asarray(TEXTS), jnp.ones((8, 3)), rng)
    )(KEY)
    estimate, error = np.asarray(score.log_likelihood), np.asarray(score.error)
    assert (error > 0).all() and (error < 0.5).all()
    np.testing.assert_array_less(np.abs(estimate - bound), 4 * error)


def _any_order(text):
    """The expectation of the log-likelihood over orders of unmasking: MDLM's bound, exactly."""
    orders = list(itertools.permutations(range(3)))
    total = 0.0
    for order in orders:
        for written, place in enumerate(order):
            canvas = text.copy()
            canvas[list(order[written:])] = 2
            logits = TABLE.reshape(27, 3, 2)[canvas @ [9, 3, 1], place]
            total += logits[text[place]] - np.log(np.exp(logits).sum())
    return total / len(orders)


def test_a_score_ignores_positions_of_no_weight_and_what_only_training_has():
    network = FakeNetwork(8, jnp.asarray(TABLE, jnp.float32), _answer)
    weights = jnp.ones((8, 3)).at[:, 0].set(0.0)
    seen = []
    network.__dict__["on_forward"] = lambda canvas, rng: jax.debug.callback(
        lambda c: seen.append(np.asarray(c)), canvas
    )
    args = network, jnp.asarray(TEXTS), weights, KEY
    plain = BoundDenoising(SMALL["mask"]).score(*args)
    other = BoundDenoising(
        MaskCorruption(2, mask_id=2, min_rate=0.2, max_rate=0.5, per_token=True),
        weighting="flat",
        cross_entropy=CrossEntropy(z_loss=1.0),
    ).score(*args)
    np.testing.assert_array_equal(plain, other)
    assert (np.stack(seen)[:, :, 0] == TEXTS[:, 0]).all()


def test_flat_weights_are_the_cross_entropy_of_what_was_replaced_and_a_limit_holds():
    rng = np.random.default_rng(2)
    table = rng.normal(size=(VOCAB, VOCAB)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (BATCH, LENGTH))
    noise = UniformCorruption(VOCAB, per_token=True)
    canvases = []
    network = table_network(jnp.asarray(table), BATCH, lambda canvas, _: canvases.append(canvas))
    args = jnp.asarray(targets), jnp.ones(targets.shape), KEY
    loss, _, metrics = BoundDenoising(noise, weighting="flat").loss(network, *args)
    times_rng, corrupt_rng, *_ = jax.random.split(KEY, 4)
    _, noisy = noise.corrupt(corrupt_rng, args[0], noise.sample_times(times_rng, BATCH, LENGTH))
    log_probs, noisy = table - np.log(np.exp(table).sum(-1, keepdims=True)), np.asarray(noisy)
    expected = -(log_probs[np.asarray(canvases[0]), targets] * noisy).sum()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert metrics["cross_entropy"] == (pytest.approx(expected, rel=1e-5), noisy.sum())
    sums, counts = metrics["cross_entropy/by_rate"]
    assert sums.sum() == pytest.approx(expected, rel=1e-5)
    assert counts.sum() == noisy.sum()
    network = FakeNetwork(BATCH, jnp.ones((VOCAB + 1, VOCAB)), lambda c: jax.nn.one_hot(c, 6))
    limited = BoundDenoising(_mask(), max_weight=1.0).loss(network, *args)
    masked = limited[2]["cross_entropy"][1]
    assert limited[0] == pytest.approx(
        float(masked) * np.log(VOCAB), rel=1e-5
    )  # 1 / t is at least 1


def test_settings_that_make_it_no_bound_are_refused():
    noise = UniformCorruption(VOCAB, per_token=True)
    with pytest.raises(ValueError, match="per_token = True: the bound needs one time"):
        BoundDenoising(noise)
    with pytest.raises(ValueError, match=r"label_smoothing = 0\.1"):
        BoundDenoising(_mask(), cross_entropy=CrossEntropy(label_smoothing=0.1))
    with pytest.raises(ValueError, match=r"weighting = 'bounds' is unknown"):
        BoundDenoising(_mask(), weighting="bounds")
    with pytest.raises(ValueError, match=r"max_weight = 2\.0; weighting = 'flat'"):
        BoundDenoising(_mask(), weighting="flat", max_weight=2.0)
    with pytest.raises(ValueError, match="max_weight = 0"):
        BoundDenoising(_mask(), max_weight=0)
    with pytest.raises(ValueError, match="score_draws = 1; expected a whole number of at least 2"):
        BoundDenoising(_mask(), score_draws=1)
