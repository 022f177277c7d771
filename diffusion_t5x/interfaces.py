"""What the mathematics sees of a network: functions over arrays, its parameters already bound."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

Array = jax.Array
Cache = Any


def _no_cached_prefix() -> BoundNetwork:
    raise ValueError("prefix_cache = True: this network cannot cache its prefixes; set it False.")


@dataclasses.dataclass(frozen=True)
class CachedPrefix:
    """What a network can do once its prefixes are cached; `rows` is `batch * n` for any `n`.

    Attributes:
      cache: the keys and values of `batch` prefixes.
      with_cache: `cache -> BoundNetwork`, the network with other cached prefixes.
      grow: `(cache, room) -> cache` with room for `room` more tokens after each prefix.
      extend: `(cache, tokens [batch, length] int32) -> cache` with the tokens at the end of each
        prefix, as if they had been there from the beginning.
      forward_keeping: `canvas [rows, length] -> (hidden, kept)`, as `forward`, and the canvas's
        keys and values.
      forward_at: `(kept, tokens, positions, seen) -> (hidden [rows, count, embed], kept)` reads
        only the canvas's tokens `[rows, count]` at `positions [rows, count]`; of the positions
        `seen [rows, length]` bool, the others are as they were kept.
    """

    cache: Cache
    with_cache: Callable[[Cache], BoundNetwork]
    grow: Callable[[Cache, int], Cache]
    extend: Callable[[Cache, Array], Cache]
    forward_keeping: Callable[[Array], tuple[Array, Cache]]
    forward_at: Callable[[Cache, Array, Array, Array], tuple[Array, Cache]]


@dataclasses.dataclass(frozen=True)
class BoundNetwork:
    """A network with its parameters and a batch of prefixes bound.

    Attributes:
      batch_size: number of prefixes, `batch` below.
      forward: `(canvas [batch, length] int32, rng or None) -> hidden [batch, length, embed]`, one
        full pass under the objective's attention pattern. Under a causal pattern the hidden state
        at a position has seen the prefix and the tokens *before* that position, and predicts it;
        under a bidirectional one it has seen the whole canvas. `rng` is for dropout.
      logits: `hidden [..., embed] -> logits [..., vocab]`, float32.
      prefill: `(max_length, repeats) -> (cache, hidden [batch * repeats, embed])` reads the prefix
        once into a key-value cache with room for `max_length` more tokens, each row then repeated
        `repeats` times; the hidden state predicts the first target token.
      step: `(cache, tokens [batch] int32) -> (cache, hidden [batch, embed])` appends one token to
        every row; the hidden state predicts the next one.
      grow: `(cache, room) -> cache` with room for `room` more tokens.
      extend: `(tokens [batch, length] int32, counts [batch] int32) -> BoundNetwork` whose prefixes
        go on with the first `counts` of `tokens`.
      repeat: `n -> BoundNetwork` with every prefix repeated `n` times in place, so that row
        `i * n + j` is sample `j` of prefix `i`.
      with_cached_prefix: `() -> BoundNetwork` whose `forward` gives the same numbers from keys and
        values of the prefixes that are computed once, for all its `repeat`s too.
      cached: what can be done with cached prefixes; None where they are not cached.
      read_once: prefix positions that are read once for all of an example's rows and passes.
      reread: prefix positions that each `forward` reads again for every row.
    """

    batch_size: int
    forward: Callable[[Array, Array | None], Array]
    logits: Callable[[Array], Array]
    prefill: Callable[[int, int], tuple[Cache, Array]]
    step: Callable[[Cache, Array], tuple[Cache, Array]]
    grow: Callable[[Cache, int], Cache]
    extend: Callable[[Array, Array], BoundNetwork]
    repeat: Callable[[int], BoundNetwork]
    with_cached_prefix: Callable[[], BoundNetwork] = _no_cached_prefix
    cached: CachedPrefix | None = None
    read_once: int = 0
    reread: int = 0
