"""Token losses against a float64 reference, whole and in blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_t5x.objectives.losses import CrossEntropy, normalize_weights

BATCH, LENGTH, EMBED, VOCAB = 3, 7, 5, 13


def _inputs(seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(BATCH, LENGTH, EMBED)).astype(np.float32)
    matrix = rng.normal(size=(EMBED, VOCAB)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (BATCH, LENGTH))
    return hidden, matrix, targets


def _reference(hidden, matrix, targets, smoothing, z_loss):
    """The definition, in float64: cross-entropy with soft targets, less its floor, plus z-loss."""
    logits = hidden.astype(np.float64) @ matrix.astype(np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    log_probs = logits - log_z[..., None]
    soft = np.full(logits.shape, smoothing / (VOCAB - 1))
    np.put_along_axis(soft, targets[..., None], 1 - smoothing, axis=-1)
    floor = -(soft * np.log(np.where(soft > 0, soft, 1))).sum(-1)
    return -(soft * log_probs).sum(-1) - floor + z_loss * log_z**2, z_loss * log_z**2


@pytest.mark.parametrize(
    ("smoothing", "block_logits"),
    [
        (0.0, 2**22),
        (0.1, 3 * VOCAB),
        *[
            pytest.param(*each, marks=pytest.mark.slow)
            for each in ((0.1, 2**22), (0.0, 2 * VOCAB), (0.1, 2 * VOCAB), (0.0, 3 * VOCAB))
        ],
    ],
)
def test_loss_is_the_float64_reference_whole_and_in_blocks(smoothing, block_logits):
    hidden, matrix, targets = _inputs()
    loss = CrossEntropy(smoothing, z_loss=0.01, block_logits=block_logits)
    weights = np.random.default_rng(5).random(targets.shape).astype(np.float32)
    readout = loss(jnp.asarray(hidden), lambda h: h @ matrix, jnp.asarray(targets), weights)
    expected, expected_z = _reference(hidden, matrix, targets, smoothing, 0.01)
    np.testing.assert_allclose(readout.loss, expected, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(readout.loss_sum, (expected * weights).sum(), rtol=2e-5)
    np.testing.assert_allclose(readout.z_loss, expected_z, rtol=2e-5, atol=1e-5)
    argmax = (hidden.astype(np.float64) @ matrix).argmax(-1)
    np.testing.assert_array_equal(readout.tokens, argmax)
    np.testing.assert_array_equal(readout.correct, argmax == targets)


@pytest.mark.parametrize("block_logits", [2**22, 3 * VOCAB])
def test_gradient_matches_finite_differences_of_the_float64_reference(block_logits):
    hidden, matrix, targets = _inputs(1)
    loss = CrossEntropy(0.1, z_loss=0.01, block_logits=block_logits)

    def total(hidden, matrix):
        # Scaled, as the trainer does, which the kept gradients must be too.
        return 3.0 * loss(hidden, lambda h: h @ matrix, jnp.asarray(targets), weights).loss_sum

    weights = np.random.default_rng(5).random(targets.shape).astype(np.float32)
    grads = jax.grad(total, argnums=(0, 1))(jnp.asarray(hidden), jnp.asarray(matrix))
    rng = np.random.default_rng(2)
    for index, direction in enumerate(
        (rng.normal(size=hidden.shape), rng.normal(size=matrix.shape))
    ):
        values = []
        for step in (1e-5, -1e-5):
            moved = [hidden.astype(np.float64), matrix.astype(np.float64)]
            moved[index] = moved[index] + step * direction
            values.append(3 * (_reference(*moved, targets, 0.1, 0.01)[0] * weights).sum())
        slope = (values[0] - values[1]) / 2e-5
        assert np.vdot(grads[index], direction) == pytest.approx(slope, rel=1e-4)


def test_blocks_never_hold_all_logits_and_give_the_same_gradient():
    hidden, matrix, targets = map(jnp.asarray, _inputs(3))

    def grads(block_logits):
        loss = CrossEntropy(block_logits=block_logits)
        weights = jnp.ones(targets.shape)
        return jax.grad(lambda h: loss(h, lambda x: x @ matrix, targets, weights).loss_sum)

    np.testing.assert_allclose(grads(2 * VOCAB)(hidden), grads(2**22)(hidden), rtol=1e-5, atol=1e-6)
    assert f"{BATCH},{LENGTH},{VOCAB}" in str(jax.make_jaxpr(grads(2**22))(hidden))
    assert f"{BATCH},{LENGTH},{VOCAB}" not in str(jax.make_jaxpr(grads(2 * VOCAB))(hidden))


def test_the_gradient_costs_three_products_with_the_vocabulary_in_blocks_as_without():
    hidden, matrix, targets = map(jnp.asarray, _inputs(3))

    def products(block_logits):
        loss = CrossEntropy(block_logits=block_logits)

        def total(hidden, matrix):
            weights = jnp.ones(targets.shape)
            return loss(hidden, lambda x: x @ matrix, targets, weights).loss_sum

        return str(jax.make_jaxpr(jax.grad(total, (0, 1)))(hidden, matrix)).count("dot_general")

    assert products(2**22) == products(2 * VOCAB) == 3


def test_no_gradient_flows_through_the_draw():
    hidden, matrix, targets = map(jnp.asarray, _inputs(4))

    def drawn(hidden):
        readout = CrossEntropy()(
            hidden,
            lambda x: x @ matrix,
            targets,
            jnp.ones(targets.shape),
            rng=jax.random.PRNGKey(0),
            temperature=1.0,
        )
        return jnp.sum(readout.tokens.astype(jnp.float32))

    assert (jax.grad(drawn)(hidden) == 0).all()


def test_draws_follow_the_softmax_at_the_temperature():
    logits = np.log(np.array([0.5, 0.3, 0.2]))
    hidden = jnp.zeros((1, 60_000, 1))
    readout = CrossEntropy(block_logits=3 * 1000)(
        hidden,
        lambda h: jnp.broadcast_to(logits, (*h.shape[:2], 3)),
        jnp.zeros((1, 60_000), jnp.int32),
        jnp.ones((1, 60_000)),
        rng=jax.random.PRNGKey(0),
        temperature=0.5,
    )
    squared = np.array([0.25, 0.09, 0.04])
    frequency = np.bincount(np.asarray(readout.tokens[0]), minlength=3) / 60_000
    np.testing.assert_allclose(frequency, squared / squared.sum(), atol=0.01)


@pytest.mark.parametrize(
    ("factor", "expected"),
    [(None, 1.0), (7, 7.0), ("NUM_REAL_TARGET_TOKENS", 5.0), ("num_total_target_tokens", 8.0)],
)
def test_normalizers_by_hand(factor, expected):
    weights = jnp.array([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    same, normalizer = normalize_weights(factor, weights)
    assert normalizer == expected
    np.testing.assert_array_equal(same, weights)


def test_average_per_sequence_weighs_every_sequence_alike_packed_or_not():
    weights = jnp.array([[1.0, 1.0, 1.0, 1.0, 0.0]])
    segments = jnp.array([[1, 1, 1, 2, 0]])
    scaled, normalizer = normalize_weights("AVERAGE_PER_SEQUENCE", weights, segments)
    np.testing.assert_allclose(scaled, [[1 / 3, 1 / 3, 1 / 3, 1.0, 0.0]], rtol=1e-6)
    assert normalizer == pytest.approx(2.0)
    padded = jnp.array([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    scaled, normalizer = normalize_weights("AVERAGE_PER_SEQUENCE", padded)
    np.testing.assert_allclose(scaled.sum(axis=1), [1, 1, 0], rtol=1e-6)
    assert normalizer == pytest.approx(2.0)


def test_an_unknown_normalizer_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'NUM_REAL_TARGET_TOKENS'"):
        normalize_weights("NUM_REAL_TOKENS", jnp.ones((1, 1)))
