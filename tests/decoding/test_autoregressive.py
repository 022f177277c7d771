"""AR decoding: scores against the chain rule, logits rules, stopping."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_network import table_network

from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.logits_rules import Suppress, TopK

KEY = jax.random.PRNGKey(0)
LOGITS = np.log(np.array([[0.5, 0.05, 0.25, 0.2], [0.1, 0.2, 0.3, 0.4]]))


def _chain(successor, vocab=6):
    """Token t is followed by successor[t]; the network's first logits are uniform."""
    table = np.full((vocab, vocab), -20.0, np.float32)
    for token, following in enumerate(successor):
        table[token, following] = 20.0
    return jnp.asarray(table)


def test_greedy_follows_the_argmax_pads_after_the_end_and_stops():
    # Uniform first logits: argmax is 0. Then 0 -> 3 -> 4 -> 1 (end).
    network = table_network(_chain([3, 0, 0, 4, 1, 0]), 2)
    steps = []

    def counted(tokens):
        jax.debug.callback(lambda: steps.append(1))
        return network.answer(tokens)

    counting = dataclasses.replace(network, answer=counted)
    decoded = jax.jit(lambda key: AutoregressiveDecoder().decode(counting, 10, key))(KEY)
    jax.effects_barrier()
    np.testing.assert_array_equal(decoded.tokens[0, 0], [0, 3, 4, 1, 0, 0, 0, 0, 0, 0])
    assert len(steps) == 3
    np.testing.assert_allclose(decoded.scores, np.log(1 / 6), rtol=1e-4)


def test_a_text_that_never_ends_fills_the_length():
    decoded = AutoregressiveDecoder().decode(table_network(_chain([2, 2, 3, 2, 2, 2]), 1), 5, KEY)
    np.testing.assert_array_equal(decoded.tokens[0, 0], [0, 2, 3, 2, 3])


def test_sampled_scores_are_the_chain_rule_and_best_comes_last():
    table = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)
    decoded = AutoregressiveDecoder(num_samples=5, temperature=0.7, logits_rules=(TopK(4),)).decode(
        table_network(jnp.asarray(table), 3), 6, KEY
    )
    log_probs = table - np.log(np.exp(table).sum(-1, keepdims=True))
    for tokens, score in zip(
        np.asarray(decoded.tokens).reshape(-1, 6), np.asarray(decoded.scores).ravel(), strict=True
    ):
        naive = np.log(1 / 6)
        for before, after in itertools.pairwise(tokens):
            if before == 1:
                break
            naive += log_probs[before, after]
        assert score == pytest.approx(naive, rel=1e-4)
    assert (np.diff(np.asarray(decoded.scores), axis=1) >= 0).all()


def test_samples_follow_the_tempered_distribution():
    decoder = AutoregressiveDecoder(temperature=0.5)
    drawn = np.asarray(decoder.sample(KEY, jnp.tile(jnp.asarray(LOGITS[1]), (40_000, 1))))
    squared = np.array([0.01, 0.04, 0.09, 0.16])
    np.testing.assert_allclose(
        np.bincount(drawn, minlength=4) / 40_000, squared / squared.sum(), atol=0.01
    )


def test_suppressed_tokens_are_never_written_and_scores_stay_the_networks_own():
    # Uniform first logits; then 0 -> 3, or what is next to it where 3 is suppressed.
    table = _chain([3, 0, 0, 4, 1, 0]).at[0, 5].set(19.0)
    for temperature in (0.0, 0.1):
        decoded = AutoregressiveDecoder(
            temperature=temperature, logits_rules=(Suppress((3, 2, 1)), TopK(1))
        ).decode(table_network(table, 1), 4, KEY)
        np.testing.assert_array_equal(decoded.tokens[0, 0], [0, 5, 0, 5])
        expected = np.log(1 / 6) - 2 * np.log1p(np.exp(1.0))
        np.testing.assert_allclose(decoded.scores, expected, rtol=1e-5)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"temperature = -1"):
        AutoregressiveDecoder(temperature=-1)
    with pytest.raises(ValueError, match=r"logits_rules = .*a tuple of rules"):
        AutoregressiveDecoder(logits_rules=(TopK,))
    with pytest.raises(ValueError, match="no canvas"):
        AutoregressiveDecoder().decode(table_network(jnp.eye(3), 1), 2, KEY, return_trajectory=True)
