"""Tokens are drawn as softmax says, whatever groups the vocabulary is read in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_t5x.objectives import logits as logits_lib

TEMPERATURE = 0.6


def _draw(logits, draws, rng):
    logits = jnp.broadcast_to(jnp.asarray(logits), (1, draws, len(logits)))
    totals = logits_lib.read_groups(
        lambda part, tokens, inside: jnp.sum(
            jnp.where(inside, jnp.exp(part / TEMPERATURE), 0), axis=-1
        ),
        logits,
    )
    return logits_lib.draw_tokens(rng, logits, totals, TEMPERATURE)


@pytest.mark.parametrize("vocab_size", [5, 256, 300])  # one group, two, and a third of 44 tokens
def test_tokens_come_as_often_as_the_softmax_says(vocab_size):
    logits = np.random.default_rng(0).normal(size=vocab_size).astype(np.float32)
    draws = 40_000
    tokens = jax.jit(_draw, static_argnums=1)(logits, draws, jax.random.PRNGKey(1))
    counts = np.bincount(np.asarray(tokens[0]), minlength=vocab_size)
    expected = np.exp(logits.astype(np.float64) / TEMPERATURE)
    expected *= draws / expected.sum()
    # Pearson's sum has this mean, and a variance of twice that.
    freedom = vocab_size - 1
    assert np.sum((counts - expected) ** 2 / expected) < freedom + 4 * np.sqrt(2 * freedom)


def test_a_vocabulary_on_several_devices_gives_the_same_draws(monkeypatch):
    logits = np.random.default_rng(0).normal(size=300).astype(np.float32)
    key = jax.random.PRNGKey(2)
    alone = jax.jit(lambda logits: _draw(logits, 500, key))(logits)
    monkeypatch.setattr(logits_lib, "_vocabulary_may_be_sharded", lambda: True)
    split = jax.jit(lambda logits: _draw(logits, 500, key))(logits)
    np.testing.assert_array_equal(split, alone)
