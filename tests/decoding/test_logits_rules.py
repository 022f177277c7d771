"""Logits rules against transformers' processors, and what is refused."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import toy

from diffusion_t5x.decoding.diffusion import DiffusionDecoder
from diffusion_t5x.decoding.logits_rules import (
    Penalize,
    Suppress,
    TopK,
    TopP,
    apply_rules,
    check_rules,
    sampling_rules,
)
from diffusion_t5x.models import Model
from diffusion_t5x.objectives.corruption import UniformCorruption

VOCAB = 50


def _decoder(rules):
    return DiffusionDecoder(UniformCorruption(toy.VOCABULARY.vocab_size), logits_rules=rules)


def _logits():
    logits = 3 * np.random.default_rng(0).normal(size=(6, VOCAB)).astype(np.float32)
    logits[0, 10:] = -np.inf
    logits[1, 4] = logits[1].max() + 30.0
    return logits


@pytest.mark.parametrize(
    "temperature", [0.4, *(pytest.param(t, marks=pytest.mark.slow) for t in (1.0, 2.0))]
)
def test_rules_are_transformers_processors_and_warpers_in_their_order(temperature):
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers").generation.logits_process
    logits = _logits()
    for k, p, suppress in itertools.product([1, 7, 90], [0.05, 0.6, 0.95, 1.0], [(), (4, 0, 49)]):
        scores = torch.tensor(logits)
        if suppress:
            scores = process.SuppressTokensLogitsProcessor(list(suppress), device="cpu")(
                None, scores
            )
        scores = process.TemperatureLogitsWarper(temperature)(None, scores)
        scores = process.TopKLogitsWarper(k)(None, scores)
        if p < 1:  # as in `generate`; alone it would drop what underflows
            scores = process.TopPLogitsWarper(p)(None, scores)
        rules = sampling_rules(k, p, suppress)
        ours = np.asarray(apply_rules(rules, jnp.asarray(logits), temperature)) / temperature
        np.testing.assert_allclose(ours, scores.numpy(), rtol=1e-6, err_msg=str(rules))


@pytest.mark.parametrize(
    ("p", "kept"),
    [(0.01, {0}), (0.5, {0}), (0.6, {0, 2}), (0.8, {0, 2, 3}), (1.0, {0, 1, 2, 3})],
)
def test_the_nucleus_by_hand(p, kept):
    ruled = TopP(p)(jnp.log(jnp.array([0.5, 0.05, 0.25, 0.2])), 1.0)
    assert set(np.flatnonzero(np.asarray(ruled) > -np.inf)) == kept


def test_penalties_are_odds_in_nats_at_temperature_one():
    ruled = Penalize({3: 2.0, 5: -1.0})(jnp.zeros(7), 0.5)
    np.testing.assert_array_equal(ruled, [0, 0, 0, -2, 0, 1, 0])
    assert hash(Penalize({3: 2.0})) == hash(Penalize({3: 2.0}))


def test_by_default_there_are_no_rules():
    assert sampling_rules() == ()
    logits = jnp.asarray(_logits())
    assert apply_rules((), logits, 0.5) is logits


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0), "TopK.k = 0; expected at least 1"),
        (lambda: TopK(2.5), "TopK.k = 2.5"),
        (lambda: TopP(0.0), r"TopP.p = 0.0; expected 0 < p <= 1"),
        (lambda: TopP(1.5), r"TopP.p = 1.5"),
        (lambda: TopP(float("nan")), r"TopP.p = nan"),
        (lambda: Suppress(()), r"Suppress.tokens = \(\)"),
        (lambda: Suppress((-1,)), r"Suppress.tokens = \(-1,\)"),
        (lambda: sampling_rules(suppress=3), "Suppress.tokens = 3; expected tokens"),
        (lambda: sampling_rules(suppress=0), "Suppress.tokens = 0; expected tokens"),
        (lambda: sampling_rules(suppress="eos"), "Suppress.tokens = 'eos'"),
        (lambda: Penalize({3: float("inf")}), "expected values within 1e30"),
        (lambda: Penalize({3: 1e39}), "expected values within 1e30"),
        (lambda: Penalize({2.5: 1.0}), "Penalize.nats"),
        (
            lambda: DiffusionDecoder(UniformCorruption(7), logits_rules=TopK(3)),
            "logits_rules = TopK",
        ),
        (lambda: DiffusionDecoder(UniformCorruption(7), logits_rules=("a",)), "logits_rules = "),
        (lambda: check_rules((Suppress((7,)),), 7), r"names the tokens \[7\].* vocab_size = 7"),
        (lambda: check_rules((Penalize({9: 1.0}),), 7), r"names the tokens \[9\]"),
        (lambda: check_rules((Suppress((0, 1)), Suppress((2,))), 3), "all 3 tokens are suppressed"),
        (lambda: check_rules((Suppress((0, 1)),), 3, (2,)), "all 3 tokens are suppressed"),
    ],
)
def test_rules_without_a_meaning_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_model_refuses_rules_for_tokens_that_its_network_lacks():
    plain = toy.model()
    rules = (Suppress((plain.module.config.vocab_size,)),)
    decoder = _decoder(rules)
    with pytest.raises(ValueError, match=r"logits_rules: Suppress.* names the tokens"):
        Model(plain.module, plain.objective, decoder, toy.VOCABULARY, None)
    with pytest.raises(ValueError, match=r"logits_rules: Suppress.* names the tokens"):
        plain.predict_batch_with_aux({}, {}, logits_rules=rules)
