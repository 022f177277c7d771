"""Properties of noise, against expectations, Bayes' rule and Google's `hackable-diffusion`."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_t5x.objectives.corruption import (
    MaskCorruption,
    MixedCorruption,
    UniformCorruption,
)

VOCAB = 11
KEY = jax.random.PRNGKey(0)


def test_rate_zero_changes_nothing_and_rate_one_keeps_tokens_only_by_chance():
    corruption = UniformCorruption(VOCAB)
    tokens = jnp.full((2, 20_000), 3)
    canvas, changed = corruption.corrupt(KEY, tokens, jnp.array([[0.0], [1.0]]))
    assert (canvas[0] == 3).all()
    np.testing.assert_array_equal(changed.mean(axis=1), [0, 1])
    counts = np.bincount(np.asarray(canvas[1]), minlength=VOCAB) / 20_000
    np.testing.assert_allclose(counts, 1 / VOCAB, atol=0.01)


def test_a_token_differs_with_probability_rate_times_one_minus_one_over_vocabulary():
    corruption = UniformCorruption(VOCAB)
    tokens = jnp.full((1, 40_000), 5)
    canvas, replaced = corruption.corrupt(KEY, tokens, jnp.array([[0.3]]))
    assert (replaced | (canvas == tokens)).all()
    changed = float(jnp.mean(canvas != tokens))
    assert changed == pytest.approx(0.3 * (1 - 1 / VOCAB), abs=0.01)


def test_positions_are_corrupted_independently():
    corruption = UniformCorruption(1000)
    tokens, times = jnp.zeros((20_000, 2), jnp.int32), jnp.full((20_000, 1), 0.5)
    _, changed = corruption.corrupt(KEY, tokens, times)
    both = float(jnp.mean(changed[:, 0] & changed[:, 1]))
    assert both == pytest.approx(0.25, abs=0.015)


def test_rates_are_uniform_in_the_interval_and_one_per_example():
    corruption = UniformCorruption(VOCAB, min_rate=0.2, max_rate=0.6)
    rates = np.asarray(corruption.rate(corruption.sample_times(KEY, 20_000, 3)))
    assert rates.shape == (20_000, 1)
    assert rates.min() >= 0.2
    assert rates.max() <= 0.6
    np.testing.assert_allclose(np.quantile(rates, [0.25, 0.5, 0.75]), [0.3, 0.4, 0.5], atol=0.01)


def test_same_key_same_canvas_and_tokens_stay_in_the_vocabulary():
    corruption = UniformCorruption(VOCAB)
    first = corruption.prior(KEY, (4, 100))
    assert (first == corruption.prior(KEY, (4, 100))).all()
    assert set(np.unique(first)) == set(range(VOCAB))


@pytest.mark.parametrize("rates", [(-0.1, 1.0), (0.5, 0.4), (0.0, 1.1)])
def test_impossible_rates_are_refused(rates):
    with pytest.raises(ValueError, match="min_rate"):
        UniformCorruption(VOCAB, min_rate=rates[0], max_rate=rates[1])


# ------------------- All kinds of noise ------------------------------
TOKENS = 4  # the mask is token 4
KINDS = {
    "uniform": UniformCorruption(TOKENS),
    "mask": MaskCorruption(TOKENS, mask_id=TOKENS),
    "mixed": MixedCorruption(TOKENS, mask_id=TOKENS, uniform_share=0.3),
    "mask of the vocabulary": MaskCorruption(TOKENS + 1, mask_id=2),
}
PARITY = json.loads((pathlib.Path(__file__).parent / "hackable_diffusion.json").read_text())


def _marginal(noise, time, clean):
    """q(canvas | clean) in float64, `[tokens and mask]`, by the definitions of the papers."""
    s = time
    c = 2 * 0.3 / 0.7 * np.sqrt(s * (1 - s)) if isinstance(noise, MixedCorruption) else 0.0
    mask = np.eye(TOKENS + 1)[getattr(noise, "mask_id", TOKENS)]
    uniform = (1 - mask) / TOKENS
    if type(noise) is UniformCorruption:
        return (1 - s) * np.eye(TOKENS + 1)[clean] + s * uniform
    return ((1 - s) * np.eye(TOKENS + 1)[clean] + s * mask + c * uniform) / (1 + c)


@pytest.mark.parametrize("kind", KINDS)
def test_canvases_and_posteriors_are_bayes_rule_over_a_small_vocabulary(kind):
    noise, count, clean, (s, t) = KINDS[kind], 20_000, 1, (0.3, 0.7)
    shape = (TOKENS + 1, count)

    def frequencies(tokens):
        tokens = np.asarray(tokens)
        return np.stack([np.bincount(row, minlength=TOKENS + 1) / count for row in tokens])

    tokens = jnp.full(shape, clean)
    canvas, changed = noise.corrupt(KEY, tokens, jnp.full((TOKENS + 1, 1), t))
    marginal = _marginal(noise, t, clean)
    np.testing.assert_allclose(frequencies(canvas)[0], marginal, atol=0.015)
    assert (changed | (canvas == clean)).all()
    assert float(changed.mean()) == pytest.approx(float(noise.rate(jnp.float32(t))), abs=0.01)
    # The forward step from s to t, by which the marginals of all clean tokens are consistent.
    now, before = (np.stack([_marginal(noise, time, x) for x in range(TOKENS)]) for time in (t, s))
    a, a_s = (m[0, 0] - m[1, 0] for m in (now, before))
    if getattr(noise, "mask_id", None) == 2:
        now, before = (np.delete(m, 2, axis=0) for m in (now, before))
    rest = now[0] - a / a_s * before[0]
    step = a / a_s * np.eye(TOKENS + 1) + rest  # [earlier, canvas]
    np.testing.assert_allclose(before @ step, now, atol=1e-12)
    # Each row of the draws has another canvas.
    canvas = jnp.broadcast_to(jnp.arange(TOKENS + 1)[:, None], shape)
    drawn = frequencies(noise.posterior(KEY, canvas, tokens, jnp.float32(t), jnp.float32(s)))
    for z in range(TOKENS + 1):
        joint = _marginal(noise, s, clean) * step[:, z]
        if joint.sum() > 0:  # else noise never makes such a canvas of this text
            np.testing.assert_allclose(drawn[z], joint / joint.sum(), atol=0.015)


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_ends_of_time_all_is_clean_or_noise(kind):
    noise, shape = KINDS[kind], (3, 500)
    tokens = jax.random.randint(KEY, shape, 0, 2)
    ones = jnp.ones((3, 1))
    assert (noise.corrupt(KEY, tokens, 0 * ones)[0] == tokens).all()
    end, changed = noise.corrupt(KEY, tokens, ones)
    assert changed.all()
    prior = noise.prior(KEY, shape)
    assert set(np.unique(prior)) == set(np.unique(end))
    assert noise.is_noise(prior).all() == (kind != "uniform")
    assert (noise.posterior(KEY, prior, tokens, ones, 0 * ones) == tokens).all()
    assert set(noise.forbidden) == (set() if kind == "uniform" else set(np.unique(prior)))
    assert int(prior.max()) < noise.vocab_size


def test_schedules_masses_weights_and_steps_are_those_of_hackable_diffusion():
    assert PARITY["made_by"] == "hackable-diffusion 1.0.1"
    times = jnp.array(PARITY["times"])

    def make(kind, schedule):
        settings = {"schedule": schedule, "power": PARITY["power"]}
        if kind == "uniform":
            return UniformCorruption(TOKENS, **settings)
        return MaskCorruption(TOKENS, mask_id=TOKENS, **settings)

    for schedule, theirs in PARITY["schedules"].items():
        for kind in ("mask", "uniform"):
            noise = make(kind, schedule)
            masses, slopes = jax.jvp(noise.masses, (times,), (jnp.ones_like(times),))
            np.testing.assert_allclose(masses.clean, theirs["clean"], rtol=1e-5)
            frequency = theirs[f"{kind}_corrupted_at_0.35"]
            assert float(noise.rate(jnp.float32(0.35))) == pytest.approx(frequency, abs=0.01)
        weight = -slopes.clean / (1 - masses.clean)
        np.testing.assert_allclose(weight, theirs["md4_weight"], rtol=1e-4)
    shape = (1, 20_000)
    posterior = jax.jit(lambda noise, *args: noise.posterior(KEY, *args), static_argnums=0)
    for step in PARITY["steps"]:
        canvas, clean = jnp.full(shape, step["canvas"]), jnp.full(shape, step["clean"])
        noise = make(step["noise"], step["schedule"])
        drawn = posterior(noise, canvas, clean, step["time"], step["earlier"])
        counts = np.bincount(np.asarray(drawn)[0], minlength=len(step["probabilities"]))
        np.testing.assert_allclose(counts / shape[1], step["probabilities"], atol=0.015)


@pytest.mark.parametrize("per_token", [False, True])
def test_antithetic_times_are_one_in_each_equal_part_and_in_no_order(per_token):
    noise = UniformCorruption(VOCAB, antithetic=True, per_token=per_token)
    times = np.asarray(noise.sample_times(KEY, 40, 5))
    assert times.shape == (40, 5 if per_token else 1)
    count = times.size
    np.testing.assert_array_equal(np.floor(np.sort(times.ravel()) * count), np.arange(count))
    assert (np.diff(times.ravel()) < 0).any()
    other = np.asarray(noise.sample_times(jax.random.PRNGKey(1), 40, 5))
    assert not np.allclose(np.sort(times.ravel()), np.sort(other.ravel()))


def test_a_rate_per_token_changes_each_position_by_its_own():
    noise = UniformCorruption(1000)
    tokens = jnp.zeros((5000, 3), jnp.int32)
    times = jnp.broadcast_to(jnp.array([0.1, 0.5, 0.9]), tokens.shape)
    changed = noise.corrupt(KEY, tokens, times)[1]
    np.testing.assert_allclose(changed.mean(axis=0), [0.1, 0.5, 0.9], atol=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskCorruption(4, mask_id=5), "mask_id = 5, vocab_size = 4"),
        (lambda: MaskCorruption(4, mask_id=0), "mask_id = 0"),
        (lambda: MixedCorruption(4, mask_id=4, uniform_share=1.0), "uniform_share = 1.0"),
        (lambda: UniformCorruption(4, schedule="cosin"), "schedule = 'cosin' is unknown.*cosine"),
        (lambda: UniformCorruption(4, power=0), "power = 0"),
        (lambda: UniformCorruption(1), "vocab_size = 1"),
    ],
)
def test_impossible_noise_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
