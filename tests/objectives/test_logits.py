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


@pytest.mark.parametrize("vocab_size", [5, 256, 300, 4500])  # the last: 17 groups of 256, and 148
def test_groups_at_once_and_in_turn_give_the_same_numbers(monkeypatch, vocab_size):
    """GPUs read them at once, all else in turn; neither is what this test compares them with."""
    rng = np.random.default_rng(1)
    logits = np.round(rng.normal(size=(2, 3, vocab_size)), 1).astype(np.float32)

    def read(part, tokens, inside):
        top = jnp.max(jnp.where(inside, part, -jnp.inf), axis=-1)
        first = logits_lib.first_largest(part - top[..., None], tokens, inside)
        return top, first, jnp.sum(jnp.where(inside, jnp.exp(part), 0), axis=-1)

    def by_platform(name):
        def choose(*args, **functions):
            return functions[name](*args)

        monkeypatch.setattr(jax.lax, "platform_dependent", choose)
        return jax.jit(lambda x: logits_lib.read_groups(read, x))(logits)

    size = logits_lib._group_size(vocab_size)
    cuts = range(size, vocab_size, size)
    parts = np.split(logits.astype(np.float64), cuts, axis=-1)
    for found in (by_platform("cuda"), by_platform("default")):
        top, first, total = map(np.asarray, found)
        np.testing.assert_array_equal(top, np.stack([p.max(-1) for p in parts], -1))
        argmax = [p.argmax(-1) + size * i for i, p in enumerate(parts)]
        np.testing.assert_array_equal(first, np.stack(argmax, -1))
        sums = np.stack([np.exp(p).sum(-1) for p in parts], -1)
        np.testing.assert_allclose(total, sums, rtol=1e-6)
