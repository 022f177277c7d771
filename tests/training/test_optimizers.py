"""Schedules by hand, and updates against plain float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_t5x.training import optimizers

SETTINGS = {
    "base_learning_rate": 0.5,
    "warmup_steps": 100,
    "decay_factor": 0.25,
    "steps_per_decay": 40,
    "steps_per_cycle": 200,
}
# factor -> step -> value; every number is worked out by hand from T5X's definitions.
BY_HAND = {
    "constant": {0: 0.5, 1: 0.5, 10**6: 0.5},
    "linear_warmup": {1: 0.01, 25: 0.25, 100: 1.0, 101: 1.0, 10**6: 1.0},
    "rsqrt_decay": {0: 0.1, 99: 0.1, 100: 0.1, 400: 0.05, 10_000: 0.01},
    "rsqrt_normalized_decay": {0: 1.0, 100: 1.0, 400: 0.5, 10_000: 0.1},
    "decay_every": {0: 1.0, 39: 1.0, 40: 0.25, 79: 0.25, 80: 0.0625, 120: 0.015625},
    # Half a cycle after the warm-up is a half; where a cycle is over the next one begins.
    "cosine_decay": {0: 1.0, 100: 1.0, 200: 0.5, 250: 0.14644661, 300: 1.0, 400: 0.5},
    # The slope is a quarter of the base rate a step, so only the warm-up's end is above zero.
    "linear_decay": {1: 0.005, 50: 0.25, 100: 0.5, 101: 0.375, 102: 0.25, 103: 0.125},
}


@pytest.mark.parametrize("factor", BY_HAND)
def test_each_factor_has_the_values_computed_by_hand(factor):
    schedule = optimizers.create_learning_rate_scheduler(factor, **SETTINGS)
    for step, value in BY_HAND[factor].items():
        assert schedule(step) == pytest.approx(value, rel=1e-5), step
        assert jax.jit(schedule)(jnp.int32(step)) == pytest.approx(value, rel=1e-5), step


def test_factors_are_multiplied_whatever_the_spaces():
    schedule = optimizers.create_learning_rate_scheduler(
        " constant*linear_warmup *  rsqrt_decay", **SETTINGS
    )
    assert schedule(25) == pytest.approx(0.5 * 0.25 * 0.1)
    assert schedule(400) == pytest.approx(0.5 * 1.0 * 0.05)


def test_the_step_offset_counts_as_steps_not_taken():
    schedule = optimizers.create_learning_rate_scheduler(
        "linear_warmup", **SETTINGS, step_offset=1000
    )
    assert schedule(1025) == pytest.approx(0.25)
    assert schedule(1100) == pytest.approx(1.0)
    # Before the offset no step was taken.
    assert schedule(900) == schedule(1000) == pytest.approx(1e-8)


def test_the_rate_never_falls_below_the_least():
    settings = {**SETTINGS, "min_learning_rate": 0.02}
    assert optimizers.create_learning_rate_scheduler("linear_warmup", **settings)(
        0
    ) == pytest.approx(0.02)
    # Past its end the slope of linear_decay would give a negative rate.
    assert optimizers.create_learning_rate_scheduler("linear_decay", **settings)(
        500
    ) == pytest.approx(0.02)


@pytest.mark.parametrize("factor", BY_HAND)
def test_no_warmup_and_no_cycle_divide_nothing_by_zero(factor):
    schedule = optimizers.create_learning_rate_scheduler(
        factor, **{**SETTINGS, "warmup_steps": 0, "steps_per_cycle": 0}
    )
    assert all(np.isfinite(schedule(step)) for step in (0, 1, 10))


def test_an_unknown_factor_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"has 'rsqrt'; did you mean 'rsqrt_decay'\? Known: const"):
        optimizers.create_learning_rate_scheduler("constant * rsqrt")


def _tree(seed, scale=1.0):
    """A matrix that adafactor factors, one too small for that, and a vector."""
    rng = np.random.default_rng(seed)
    shapes = {"large": (8, 6), "small": (8, 3), "vector": (9,)}
    return {name: scale * rng.normal(size=shape) for name, shape in shapes.items()}


def _as_float32(tree):
    return {name: jnp.asarray(value, jnp.float32) for name, value in tree.items()}


def _rms(x):
    return np.sqrt(np.mean(np.square(x)))


class _Adafactor:
    """Algorithms 4 and 5 of Shazeer and Stern (2018), without a learning rate."""

    def __init__(self, clip=1.0, decay_rate=0.8, parameter_scale=True):
        self.clip, self.decay_rate, self.parameter_scale = clip, decay_rate, parameter_scale
        self.step, self.moments = 0, {}

    def update(self, params, grads):
        self.step += 1
        beta = 1.0 - self.step**-self.decay_rate
        updates = {}
        for name, grad in grads.items():
            square = np.square(grad) + 1e-30
            # The factored second moment is the outer product of the means of rows and columns.
            new = (square.mean(1), square.mean(0)) if name == "large" else (square,)
            old = self.moments.get(name, [np.zeros_like(x) for x in new])
            moments = [beta * a + (1 - beta) * b for a, b in zip(old, new, strict=True)]
            self.moments[name] = moments
            v = np.outer(*moments) / moments[0].mean() if name == "large" else moments[0]
            update = grad / np.sqrt(v)
            update /= max(1.0, _rms(update) / self.clip)
            scale = max(_rms(params[name]), 1e-3) if self.parameter_scale else 1.0
            updates[name] = -scale * update
        return updates


@pytest.mark.parametrize("parameter_scale", [True, False])
@pytest.mark.parametrize("clip", [1.0, 0.5])
def test_adafactor_is_the_papers_algorithm_at_unit_learning_rate(parameter_scale, clip):
    optimizer = optimizers.adafactor(
        clipping_threshold=clip,
        multiply_by_parameter_scale=parameter_scale,
        min_dim_size_to_factor=4,
    )
    reference = _Adafactor(clip, parameter_scale=parameter_scale)
    params = _tree(0, scale=0.3)
    params["vector"] = np.zeros(9)  # whose scale is then the least there is
    state = optimizer.init(_as_float32(params))
    for step in range(3):
        grads = _tree(step + 1, scale=10.0**-step)
        updates, state = optimizer.update(_as_float32(grads), state, _as_float32(params))
        expected = reference.update(params, grads)
        for name, value in expected.items():
            np.testing.assert_allclose(updates[name], value, rtol=2e-5, atol=1e-8, err_msg=name)
        params = {name: value + 0.01 * expected[name] for name, value in params.items()}


def test_adafactors_second_moment_of_a_large_matrix_is_a_row_and_a_column():
    params = {"wide": jnp.ones((128, 256)), "narrow": jnp.ones((128, 127))}
    state = optimizers.adafactor().init(params)
    sizes = {
        name: sum(
            leaf.size
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
            if name in jax.tree_util.keystr(path) and leaf.size > 1
        )
        for name in params
    }
    assert sizes == {"wide": 128 + 256, "narrow": 128 * 127}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_its_definition_at_unit_learning_rate(weight_decay):
    b1, b2, eps = 0.8, 0.95, 1e-3
    optimizer = optimizers.adamw(b1, b2, eps, weight_decay)
    params = _tree(0)
    state = optimizer.init(_as_float32(params))
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for step in range(1, 5):
        grads = _tree(step, scale=0.1 * step)
        updates, state = optimizer.update(_as_float32(grads), state, _as_float32(params))
        for name, grad in grads.items():
            first[name] = b1 * first[name] + (1 - b1) * grad
            second[name] = b2 * second[name] + (1 - b2) * grad**2
            mean, square = first[name] / (1 - b1**step), second[name] / (1 - b2**step)
            expected = -(mean / (np.sqrt(square) + eps) + weight_decay * params[name])
            np.testing.assert_allclose(updates[name], expected, rtol=2e-5, atol=1e-7, err_msg=name)
            params[name] = params[name] + 0.1 * expected
