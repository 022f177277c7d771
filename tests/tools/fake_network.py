"""Bound networks whose answers are known, for tests of the mathematics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class FakeNetwork:
    """An `interfaces.CachedNetwork` whose hidden states are `answer(canvas)` and whose logits are
    `hidden @ table`; prefixes and caches are nothing."""

    batch_size: int
    table: jax.Array
    answer: Callable[[jax.Array], jax.Array]
    on_forward: Callable[..., None] | None = None
    cache: Any = None

    def forward(self, canvas, rng):
        if self.on_forward is not None:
            self.on_forward(canvas, rng)
        return self.answer(canvas)

    def logits(self, hidden):
        return hidden @ self.table

    def prefill(self, max_length, repeats):
        del max_length
        return None, jnp.zeros((self.batch_size * repeats, self.table.shape[0]))

    def append_token(self, cache, tokens):
        return cache, self.answer(tokens[:, None])[:, 0]

    def add_room(self, cache, room):
        del room
        return cache

    def extend_prefix(self, tokens, counts):
        del tokens, counts
        return self

    def repeat(self, n):
        return dataclasses.replace(self, batch_size=self.batch_size * n)

    caches_prefix = False  # in training
    self_conditioning = False

    def cache_prefix(self, rng=None):
        del rng
        return self

    def with_cache(self, cache):
        return dataclasses.replace(self, cache=cache)

    def append_tokens(self, cache, tokens):
        del tokens
        return cache


def table_network(table, batch_size, on_forward=None):
    """Logits at a position are the row of `table [vocab, vocab]` that its canvas token selects."""
    return FakeNetwork(
        batch_size, table, lambda canvas: jax.nn.one_hot(canvas, table.shape[0]), on_forward
    )


def perfect_network(targets, vocab_size, confidence=50.0):
    """Answers every canvas with the targets `[batch, length]`."""

    def answer(canvas):
        repeats = canvas.shape[0] // targets.shape[0]
        rows = jnp.repeat(targets, repeats, axis=0)[:, : canvas.shape[1]]
        return confidence * jax.nn.one_hot(rows, vocab_size)

    return FakeNetwork(targets.shape[0], jnp.eye(vocab_size), answer)
