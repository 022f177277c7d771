"""Bound networks whose answers are known, for tests of the mathematics."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffusion_t5x.bound_network import BoundNetwork


def table_network(table, batch_size, on_forward=None):
    """Logits at a position are the row of `table [vocab, vocab]` that its canvas token selects."""

    def forward(canvas, rng):
        if on_forward is not None:
            on_forward(canvas, rng)
        return jax.nn.one_hot(canvas, table.shape[0])

    return BoundNetwork(
        batch_size=batch_size,
        forward=forward,
        logits=lambda hidden: hidden @ table,
        prefill=lambda length, repeats: (None, jnp.zeros((batch_size * repeats, table.shape[0]))),
        step=lambda cache, tokens: (cache, jax.nn.one_hot(tokens, table.shape[0])),
        grow=lambda cache, room: cache,
        repeat=lambda n: table_network(table, batch_size * n, on_forward),
    )


def perfect_network(targets, vocab_size, confidence=50.0):
    """Answers every canvas with the targets `[batch, length]`."""

    def forward(canvas, rng):
        del rng
        repeats = canvas.shape[0] // targets.shape[0]
        rows = jnp.repeat(targets, repeats, axis=0)[:, : canvas.shape[1]]
        return confidence * jax.nn.one_hot(rows, vocab_size)

    return BoundNetwork(
        batch_size=targets.shape[0],
        forward=forward,
        logits=lambda hidden: hidden,
        prefill=lambda length, repeats: None,
        step=lambda cache, tokens: None,
        grow=lambda cache, room: None,
        repeat=lambda n: perfect_network(targets, vocab_size, confidence),
    )
