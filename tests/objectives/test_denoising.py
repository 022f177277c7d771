"""Objectives against a float64 reference and against what must hold of any network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_network import FakeNetwork, perfect_network, table_network

from diffusion_t5x.objectives import NextToken, StepUnrolledDenoising
from diffusion_t5x.objectives.corruption import (
    MaskCorruption,
    MixedCorruption,
    UniformCorruption,
)
from diffusion_t5x.objectives.losses import CrossEntropy

VOCAB, BATCH, LENGTH = 9, 4, 6
KEY = jax.random.PRNGKey(0)
MASK, MIXED = MaskCorruption(VOCAB, mask_id=VOCAB), MixedCorruption(VOCAB, mask_id=VOCAB)


def _data(seed=0):
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(VOCAB, VOCAB)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (BATCH, LENGTH))
    weights = rng.integers(0, 2, (BATCH, LENGTH)).astype(np.float32)
    return table, targets, weights


def _cross_entropy64(table, canvas, targets):
    logits = table.astype(np.float64)[canvas]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probs, targets[..., None], -1)[..., 0], logits.argmax(-1)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("num_unrolls", [0, 1, 2])
def test_denoising_loss_is_the_sum_of_its_passes_each_on_the_last_ones_argmax(
    reduction, num_unrolls
):
    table, targets, weights = _data()
    canvases = []
    network = table_network(
        jnp.asarray(table), BATCH, lambda canvas, rng: canvases.append(np.asarray(canvas))
    )
    objective = StepUnrolledDenoising(
        UniformCorruption(VOCAB), num_unrolls=num_unrolls, reduction=reduction
    )
    loss, weight_sum, metrics = objective.loss(
        network, jnp.asarray(targets), jnp.asarray(weights), KEY
    )
    assert len(canvases) == num_unrolls + 1
    canvas, total = canvases[0], 0.0
    for unroll in range(num_unrolls + 1):
        np.testing.assert_array_equal(canvases[unroll], canvas)
        cross_entropy, canvas = _cross_entropy64(table, canvas, targets)
        total += (cross_entropy * weights).sum()
        assert metrics[f"cross_entropy/unroll_{unroll}"][0] == pytest.approx(
            (cross_entropy * weights).sum(), rel=1e-5
        )
    total /= num_unrolls + 1 if reduction == "mean" else 1
    assert loss == pytest.approx(total, rel=1e-5)
    assert weight_sum == weights.sum()


def test_the_first_canvas_is_corrupted_at_a_rate_of_each_example_and_the_target_is_not_touched():
    targets = jnp.zeros((400, 50), jnp.int32)
    canvases = []
    network = table_network(jnp.eye(100), 400, lambda canvas, rng: canvases.append(canvas))
    StepUnrolledDenoising(UniformCorruption(100)).loss(
        network, targets, jnp.ones(targets.shape), KEY
    )
    fractions = np.sort(np.mean(np.asarray(canvases[0]) != 0, axis=1))
    np.testing.assert_allclose(np.quantile(fractions, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.06)


def test_no_gradient_flows_through_the_unroll():
    table, targets, weights = _data(1)
    targets, weights = jnp.asarray(targets), jnp.asarray(weights)
    seen = []
    objective = StepUnrolledDenoising(UniformCorruption(VOCAB))

    def loss(table):
        network = table_network(table, BATCH, lambda canvas, rng: seen.append(canvas))
        return objective.loss(network, targets, weights, KEY)[0]

    unrolled = jax.grad(loss)(jnp.asarray(table))
    canvases = [np.asarray(c) for c in seen if not isinstance(c, jax.core.Tracer)]
    if len(canvases) < 2:
        seen.clear()
        loss(jnp.asarray(table))
        canvases = [np.asarray(c) for c in seen]

    def frozen(table):
        network = table_network(table, BATCH)
        plain = CrossEntropy()
        return sum(
            plain(network.forward(c, None), network.logits, targets, weights).loss_sum
            for c in map(jnp.asarray, canvases[:2])
        )

    np.testing.assert_allclose(unrolled, jax.grad(frozen)(jnp.asarray(table)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("corruption", [UniformCorruption(VOCAB), MASK, MIXED])
def test_the_loss_of_the_last_pass_alone_has_its_gradient_alone(corruption):
    table, targets, weights = _data(5)
    args = jnp.asarray(targets), jnp.asarray(weights), KEY
    canvases = []
    objective = StepUnrolledDenoising(
        corruption, num_unrolls=2, loss_passes="last", reduction="mean"
    )

    def loss(table, network):
        return objective.loss(network(table), *args)[0]

    def unrolled(table):
        # The token that only noise has answers like token 0.
        return FakeNetwork(
            BATCH,
            table,
            lambda canvas: jax.nn.one_hot(canvas % VOCAB, VOCAB),
            lambda canvas, rng: canvases.append(canvas),
        )

    value = loss(jnp.asarray(table), unrolled)
    assert len(canvases) == 3
    assert all((canvas < VOCAB).all() for canvas in canvases[1:])  # the model's own draws
    assert (canvases[0] == VOCAB).any() == (VOCAB in corruption.forbidden)
    last = np.asarray(canvases[2])

    def frozen(table):
        network = table_network(table, BATCH)
        hidden = network.forward(jnp.asarray(last), None)
        return CrossEntropy()(hidden, network.logits, *args[:2]).loss_sum

    assert value == pytest.approx(float(frozen(jnp.asarray(table))))
    gradients = [jax.grad(loss)(jnp.asarray(table), unrolled), jax.grad(frozen)(jnp.asarray(table))]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-5)


def test_the_loss_by_rate_is_that_of_the_examples_whose_rate_is_in_each_part():
    table, targets, weights = _data(6)
    noise = UniformCorruption(VOCAB, per_token=True)
    network = table_network(jnp.asarray(table), BATCH)
    args = jnp.asarray(targets), jnp.asarray(weights), KEY
    objective = StepUnrolledDenoising(noise, cross_entropy=CrossEntropy(z_loss=0.1))
    metrics = objective.loss(network, *args)[2]
    sums, counts = metrics["cross_entropy/by_rate"]
    rates = np.asarray(noise.sample_times(jax.random.split(KEY, 3)[0], BATCH, LENGTH))
    expected = [weights[(rates >= i / 10) & (rates < (i + 1) / 10)].sum() for i in range(10)]
    np.testing.assert_allclose(counts, expected, atol=1e-6)
    passes = [float(metrics[f"cross_entropy/unroll_{i}"][0]) for i in range(2)]
    assert sums.sum() == pytest.approx(sum(passes) / 2, rel=1e-5)


def test_padding_positions_count_as_much_as_padding_weight_says():
    objective = StepUnrolledDenoising(UniformCorruption(VOCAB), padding_weight=0.25)
    targets = jnp.array([[3, 1, 0, 0]])
    np.testing.assert_array_equal(
        objective.token_weights(targets, jnp.ones((1, 4))), [[1, 1, 0.25, 0.25]]
    )
    paper = StepUnrolledDenoising(UniformCorruption(VOCAB))
    np.testing.assert_array_equal(paper.token_weights(targets, jnp.ones((1, 4))), [[1, 1, 1, 1]])


def test_a_perfect_network_reaches_the_floor_of_both_objectives():
    _, targets, _ = _data(2)
    targets = jnp.asarray(targets)
    network = perfect_network(targets, VOCAB)
    for objective in (NextToken(), StepUnrolledDenoising(UniformCorruption(VOCAB))):
        loss, _, _ = objective.loss(network, targets, jnp.ones(targets.shape), KEY)
        assert loss == pytest.approx(0.0, abs=1e-5)
        np.testing.assert_allclose(
            objective.score(network, targets, jnp.ones(targets.shape), KEY), 0.0, atol=1e-5
        )


def test_next_token_loss_and_score_against_float64():
    table, targets, weights = _data(3)
    network = table_network(jnp.asarray(table), BATCH)
    loss, weight_sum, metrics = NextToken().loss(
        network, jnp.asarray(targets), jnp.asarray(weights), KEY
    )
    cross_entropy, argmax = _cross_entropy64(table, targets, targets)
    assert loss == pytest.approx((cross_entropy * weights).sum(), rel=1e-5)
    assert weight_sum == weights.sum()
    assert metrics["accuracy"][0] == ((argmax == targets) * weights).sum()
    score = NextToken().score(network, jnp.asarray(targets), jnp.asarray(weights), KEY)
    np.testing.assert_allclose(score.log_likelihood, -(cross_entropy * weights).sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(score.error, 0.0)


def test_every_pass_gets_its_own_key():
    keys = []
    table, targets, weights = _data(4)
    network = table_network(jnp.asarray(table), BATCH, lambda canvas, rng: keys.append(rng))
    StepUnrolledDenoising(UniformCorruption(VOCAB), num_unrolls=2).loss(
        network, jnp.asarray(targets), jnp.asarray(weights), KEY
    )
    assert len({tuple(np.asarray(key)) for key in keys}) == 3


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match=r"reduction = 'max' is unknown; .*sum, mean"):
        StepUnrolledDenoising(UniformCorruption(VOCAB), reduction="max")
    with pytest.raises(
        ValueError, match=r"NextToken.attention_pattern = .*causal, prefix_bidirect"
    ):
        NextToken(attention_pattern="bidirectional")
    with pytest.raises(ValueError, match="num_unrolls = -1"):
        StepUnrolledDenoising(UniformCorruption(VOCAB), num_unrolls=-1)
