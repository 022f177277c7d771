"""Bound networks whose answers are known, for tests of the mathematics."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_t5x.interfaces import BoundNetwork, CachedPrefix


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
        extend=lambda tokens, counts: table_network(table, batch_size, on_forward),
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
        extend=lambda tokens, counts: None,
        repeat=lambda n: perfect_network(targets, vocab_size, confidence),
    )


def with_cached_prefix(network):
    """The network as one that can cache its prefixes; what it keeps of a canvas is nothing."""

    def keep(canvas):
        return network.forward(canvas, None), jnp.zeros((*canvas.shape, 1, 1))

    def read(kept, tokens, positions, seen):
        del positions, seen
        return network.forward(tokens, None), kept

    cached = CachedPrefix(
        cache=None,
        with_cache=lambda cache: with_cached_prefix(network),
        grow=lambda cache, room: cache,
        extend=lambda cache, tokens: cache,
        forward_keeping=keep,
        forward_at=read,
    )
    return dataclasses.replace(
        network,
        with_cached_prefix=lambda: with_cached_prefix(network),
        repeat=lambda n: with_cached_prefix(network.repeat(n)),
        cached=cached,
    )
