"""Every update rule under every other setting of the decoder, with every kind of noise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_network import perfect_network, table_network

from diffusion_t5x.decoding.diffusion import DiffusionDecoder
from diffusion_t5x.decoding.logits_rules import Suppress, TopK, TopP
from diffusion_t5x.decoding.stopping import ScoreSettled, StableAndConfident, Unchanged
from diffusion_t5x.decoding.updates import (
    Ancestral,
    ArgmaxUnrolled,
    ConfidenceUnmask,
    EntropyBound,
    Remask,
    ResampleAll,
    ResampleShare,
)
from diffusion_t5x.objectives.corruption import MaskCorruption, MixedCorruption, UniformCorruption

# Token 7 is the mask, which is no token of the network.
VOCAB, BATCH, LENGTH, SUPPRESSED = 7, 2, 6, 4
KEY = jax.random.PRNGKey(3)
MASKS = MaskCorruption(VOCAB + 1, mask_id=VOCAB)
NOISES = UniformCorruption(VOCAB), MASKS, MixedCorruption(VOCAB + 1, mask_id=VOCAB)
RULES = (
    ResampleAll(), ResampleShare(0.5), ArgmaxUnrolled(0.5), EntropyBound(0.5), ConfidenceUnmask(),
    ConfidenceUnmask("margin", threshold=0.4), ConfidenceUnmask("entropy", 0.5, 2), Ancestral(),
    Remask(eta=0.3), Remask("rescaled", 0.5, by_confidence=True),
)  # fmt: skip
SETTINGS = {
    "alone": {"num_samples": 1},
    "halved_and_trimmed": {"halve_every": 2, "trim_multiple": 4, "stop": Unchanged()},
    "stopped": {"stop": StableAndConfident(0.5), "final_temperature": 0.3},
    "blocks": {"block_length": 4, "prefix_cache": True, "eos_id": 1, "stop": ScoreSettled(0.5)},
    "ruled": {"logits_rules": (Suppress((SUPPRESSED,)), TopK(3), TopP(0.9)), "temperature": 0.0},
}
TABLE = jnp.asarray(2 * np.random.default_rng(0).normal(size=(VOCAB + 1, VOCAB)), jnp.float32)


@functools.cache
def _network():
    network = table_network(TABLE.T, BATCH)  # of any canvas token, masks among them, logits
    return dataclasses.replace(
        network, table=TABLE, answer=lambda canvas: jax.nn.one_hot(canvas, VOCAB + 1)
    )


def _cases():
    """Each rule with every setting, of which the quick tests take some, and the noises in turn."""
    for number, rule in enumerate(RULES):
        noises = [MASKS] if isinstance(rule, Remask) else NOISES
        for offset, name in enumerate(SETTINGS):
            quick = offset == number % len(SETTINGS) and number % 2 == 0
            marks = [] if quick else [pytest.mark.slow]
            noise = noises[(number + offset) % len(noises)]
            name_of_case = f"{type(rule).__name__}{number}-{name}"
            yield pytest.param(rule, noise, name, id=name_of_case, marks=marks)


@pytest.mark.parametrize(("rule", "noise", "name"), _cases())
def test_texts_are_clean_and_ranked_whatever_the_settings(rule, noise, name):
    settings = {"num_steps": 3, "num_samples": 3, "temperature": 0.9, **SETTINGS[name]}
    decoder = DiffusionDecoder(noise, update=rule, **settings)
    decoded = jax.jit(lambda: decoder.decode(_network(), LENGTH, KEY, return_trajectory=True))()
    tokens, scores = np.asarray(decoded.tokens), np.asarray(decoded.scores)
    assert np.isfinite(scores).all()
    assert (np.diff(scores, axis=1) >= 0).all()
    assert ((tokens >= 0) & (tokens < VOCAB)).all()
    if name == "ruled" and not isinstance(rule, ResampleShare) and noise is MASKS:
        assert (tokens != SUPPRESSED).all()
    if decoder.block_length == 0:
        np.testing.assert_array_equal(decoded.trajectory[:, :, -1], tokens)
    if decoder.block_length == 0 and decoder.halve_every == 0:
        network, state = decoder.start(_network(), LENGTH, KEY)
        step = jax.jit(lambda state: decoder.step(network, state, KEY))
        for _ in range(decoder.count_steps(LENGTH)):
            state = step(state)
        apart = decoder.finish(state)
        np.testing.assert_array_equal(apart.tokens, tokens)
        np.testing.assert_allclose(apart.scores, scores, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_perfect_network_is_decoded_perfectly_from_masks(rule):
    targets = jnp.array([[1, 2, 3, 0, 0, 0], [4, 5, 6, 6, 2, 1]])
    decoder = DiffusionDecoder(MASKS, num_steps=4, num_samples=2, temperature=0.7, update=rule)
    decoded = decoder.decode(perfect_network(targets, VOCAB), LENGTH, KEY)
    np.testing.assert_array_equal(decoded.tokens[:, -1], targets)


@pytest.mark.slow
def test_unmasking_takes_no_more_passes_than_it_needs():
    targets = jnp.array([[1, 2, 3, 0, 0, 0], [4, 5, 6, 6, 2, 1]])
    network = perfect_network(targets, VOCAB)
    plain = DiffusionDecoder(MASKS, num_steps=6, num_samples=2, update=ConfidenceUnmask())
    for rule, passes in ((ConfidenceUnmask(), 6), (ConfidenceUnmask(per_step=3), 2),
                         (ConfidenceUnmask(threshold=0.9), 1)):  # fmt: skip
        decoded = dataclasses.replace(plain, update=rule).decode(network, LENGTH, KEY)
        np.testing.assert_array_equal(decoded.passes, [passes * 2] * BATCH)
        np.testing.assert_array_equal(decoded.tokens[:, -1], targets)


def test_unmasking_scores_are_log_likelihoods_in_the_order_of_writing():
    # Each step writes one token, of which the network says the same whatever the canvas.
    logits = np.random.default_rng(5).normal(size=(BATCH, LENGTH, VOCAB))
    network = dataclasses.replace(
        perfect_network(jnp.zeros((BATCH, LENGTH), int), VOCAB),
        answer=lambda canvas: jnp.repeat(jnp.asarray(logits, jnp.float32), 3, axis=0),
    )
    decoder = DiffusionDecoder(
        MASKS, num_steps=LENGTH, num_samples=3, temperature=1.0, update=ConfidenceUnmask(per_step=1)
    )
    decoded = decoder.decode(network, LENGTH, KEY)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    tokens = np.asarray(decoded.tokens)
    naive = np.take_along_axis(log_probs[:, None], tokens[..., None], -1)[..., 0].sum(-1)
    np.testing.assert_allclose(decoded.scores, naive, rtol=1e-5)


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        (ConfidenceUnmask(per_step=1), {"scored": "text"}),
        (Remask(eta=0.3), {"scored": "text"}),
        (Ancestral(), {"scored": "text", "pad_after_eos": True}),
    ],
)
def test_texts_that_end_early_are_scored_to_their_end_by_rules_that_keep_them(rule, settings):
    logits = np.random.default_rng(5).normal(size=(BATCH, LENGTH, VOCAB))
    network = dataclasses.replace(
        perfect_network(jnp.zeros((BATCH, LENGTH), int), VOCAB),
        answer=lambda canvas: jnp.repeat(jnp.asarray(logits, jnp.float32), 8, axis=0),
    )
    decoder = DiffusionDecoder(
        MASKS, num_steps=LENGTH, num_samples=8, temperature=1.0, update=rule, eos_id=1, **settings
    )
    decoded = jax.jit(lambda: decoder.decode(network, LENGTH, KEY))()
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    tokens = np.asarray(decoded.tokens)
    given = np.take_along_axis(log_probs[:, None], tokens[..., None], -1)[..., 0]
    inside = np.cumsum(tokens == 1, axis=-1) - (tokens == 1) == 0
    assert 0.2 < inside.mean() < 0.95
    np.testing.assert_allclose(decoded.scores, (given * inside).sum(-1), rtol=1e-4)


def test_remasking_without_masks_is_refused_when_the_decoder_is_made():
    with pytest.raises(ValueError, match="UniformCorruption has uniform noise"):
        DiffusionDecoder(UniformCorruption(VOCAB), update=Remask())
