"""Reading logits: a chunk of positions at a time, once for many sums, and cheap draws of tokens.

Sequences are scanned in chunks of positions, so that the logits of a whole batch never exist at
once. Within a position the vocabulary is taken in groups of neighbouring tokens. Where it may be
sharded, all groups are read at once, so that none moves between devices; else one after the other,
so that XLA reads each of them once for all sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
GROUPS = 16
LANES = 128  # a group holds a multiple of this many tokens, as TPUs store them
# Smaller batches read more positions of each row at once: a product of few positions takes as long
# as reading the vocabulary's embedding.
FEWEST_ROWS = 16


def read_in_chunks(
    read: Callable[[Array, Array, Array | None], Any],
    hidden: Array,
    logits_fn: Callable[[Array], Array],
    tokens: Array,
    rng: Array | None,
    chunk_logits: int,
) -> Any:
    """Applies `read` to the logits of every position, a chunk of positions at a time.

    Args:
      read: maps `(logits [batch, chunk, vocab] float32, tokens [batch, chunk], rng)` to a tree of
        `[batch, chunk]`, which are joined to `[batch, length]`.
      hidden: `[batch, length, embed]`.
      logits_fn: maps hidden states `[..., embed]` to logits `[..., vocab]`.
      tokens: `[batch, length]` int32, given to `read` with their positions.
      rng: key, split among the chunks, or None.
      chunk_logits: logits of a row that may exist at once; where there are fewer than `FEWEST_ROWS`
        rows, as many as all of these together.
    """
    vocab_size = jax.eval_shape(logits_fn, hidden[:, :1]).shape[-1]

    def read_chunk(chunk: Any) -> Any:
        hidden, (tokens, rng) = chunk
        return read(logits_fn(hidden).astype(jnp.float32), tokens, rng)

    chunk_logits *= max(1, FEWEST_ROWS // tokens.shape[0])
    length = chunk_length(tokens.shape[1], vocab_size, chunk_logits)
    return map_chunks(read_chunk, length, (hidden, (tokens, rng)))


def chunk_length(length: int, vocab_size: int, chunk_logits: int) -> int:
    """Returns positions per chunk, at least 1, such that all chunks are of nearly equal length."""
    most = max(1, chunk_logits // vocab_size)
    return -(-length // -(-length // most))


def map_chunks(read: Callable[[Any], Any], chunk_length: int, inputs: Any) -> Any:
    """Applies `read` to each chunk of positions and joins the results; see `scan_chunks`."""
    _, results = scan_chunks(lambda _, chunk: ((), read(chunk)), (), chunk_length, inputs)
    return results


def scan_chunks(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, chunk_length: int, inputs: Any
) -> tuple[Any, Any]:
    """Scans over chunks of positions, as `jax.lax.scan`.

    Args:
      step: maps `(carry, chunk)` to `(carry, result)`.
      carry: the first carry.
      chunk_length: positions per chunk.
      inputs: `(hidden [batch, length, embed], (*[batch, length], rng))`; all arrays are cut alike,
        and so are the results joined, scalars aside; the key is split among the chunks, or None.
    """
    hidden, (*arrays, rng) = inputs
    length = hidden.shape[1]
    if chunk_length == length:
        return step(carry, inputs)
    num_chunks = -(-length // chunk_length)
    cut = functools.partial(_split_length, num_chunks=num_chunks, chunk_length=chunk_length)
    rngs = None if rng is None else jax.random.split(rng, num_chunks)
    carry, results = jax.lax.scan(step, carry, (cut(hidden), (*map(cut, arrays), rngs)))
    return carry, jax.tree.map(lambda x: _join_length(x, length) if x.ndim > 1 else x, results)


def _split_length(x: Array, num_chunks: int, chunk_length: int) -> Array:
    """Cuts `[batch, length, ...]` to `[num_chunks, batch, chunk_length, ...]`, padded with 0."""
    padding = num_chunks * chunk_length - x.shape[1]
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], num_chunks, chunk_length, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def _join_length(x: Array, length: int) -> Array:
    """Joins `[num_chunks, batch, chunk_length, ...]` to `[batch, length, ...]`, without padding."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _group_size(vocab_size: int) -> int:
    return min(-(-vocab_size // (GROUPS * LANES)) * LANES, vocab_size)


def _vocabulary_may_be_sharded() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return any(size > 1 for axis, size in mesh.shape.items() if axis != "data")


def _all_groups(logits: Array) -> Array:
    """Cuts `[..., vocab]` into `[..., groups, tokens]`; the last may overlap the one before."""
    size = _group_size(logits.shape[-1])
    whole = logits.shape[-1] // size * size
    groups = logits[..., :whole].reshape(*logits.shape[:-1], -1, size)
    if whole == logits.shape[-1]:
        return groups
    return jnp.concatenate([groups, logits[..., None, -size:]], axis=-2)


def read_groups(read: Callable[[Array, Array, Array], Any], logits: Array) -> Any:
    """Applies `read` to each group of tokens of `logits [..., vocab]`.

    It maps `(logits [..., tokens], tokens, inside)` to a tree of `[...]`, which are stacked to
    `[..., groups]`; `tokens` int32 and `inside` bool broadcast to the logits. Where `inside` is
    False, a token is of another group.
    """
    vocab_size, size = logits.shape[-1], _group_size(logits.shape[-1])
    firsts = jnp.arange(0, vocab_size, size)  # [groups]
    # The last group may be shorter; it is read together with tokens of the group before.
    tokens = jnp.minimum(firsts, vocab_size - size)[:, None] + jnp.arange(size)  # [groups, size]
    if _vocabulary_may_be_sharded():
        return read(_all_groups(logits), tokens, tokens >= firsts[:, None])
    return jax.lax.platform_dependent(
        logits,
        cuda=functools.partial(_read_at_once, read, tokens),
        default=functools.partial(_read_in_turn, read, firsts, tokens),
    )


def _read_at_once(read: Callable[..., Any], tokens: Array, logits: Array) -> Any:
    """Reads whole groups together, then the last: a GPU's turns cost more than what they read."""
    size = tokens.shape[1]
    whole = logits.shape[-1] // size * size
    groups = logits[..., :whole].reshape(*logits.shape[:-1], -1, size)
    results = read(groups, tokens[: whole // size], jnp.array(True))
    if whole == logits.shape[-1]:
        return results
    rest = logits[..., None, whole:]
    last = read(rest, whole + jnp.arange(rest.shape[-1])[None], jnp.array(True))
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), results, last)


def _read_in_turn(read: Callable[..., Any], firsts: Array, tokens: Array, logits: Array) -> Any:
    """Reads one group after the other."""
    size = tokens.shape[1]

    def read_group(group: tuple[Array, Array]) -> Any:
        first, tokens = group
        part = jax.lax.dynamic_slice_in_dim(logits, tokens[0], size, axis=-1)
        return read(part, tokens, tokens >= first)

    results = jax.lax.map(read_group, (firsts, tokens))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), results)


def first_largest(below: Array, tokens: Array, inside: Array | bool = True) -> Array:
    """Finds the first of `tokens` with the largest logit: float32, infinity where there is none.

    Unlike an argmax, XLA computes this in the same reading of the logits as sums, if all results
    have one type; float32 counts tokens up to 2**24 exactly.

    Args:
      below: logits minus the largest of each position, `[..., tokens]`.
      tokens: int32, broadcasts to `below`, as `inside` does, which says which of them count.
    """
    largest = inside & (below >= 0)
    return jnp.min(jnp.where(largest, tokens.astype(jnp.float32), jnp.inf), axis=-1)


def draw_tokens(rng: Array, logits: Array, totals: Array, temperature: Array | float) -> Array:
    """Draws from softmax(logits / temperature): first a group, then a token of that group.

    This takes one random number per group and per token of one group, where a draw from all tokens
    at once takes one per token of the vocabulary.

    Args:
      rng: key for both draws.
      logits: `[batch, length, vocab]`; the tokens are `[batch, length]` int32.
      totals: `[batch, length, groups]`, the sum over each group of exp((logit - c) / temperature),
        where c is the same for all groups of a position.
      temperature: positive.
    """
    vocab_size, size = logits.shape[-1], _group_size(logits.shape[-1])
    group_rng, token_rng = jax.random.split(rng)
    group = jax.random.categorical(group_rng, jnp.log(totals), axis=-1)  # [batch, length]
    first = group * size
    begin = jnp.minimum(first, vocab_size - size)
    if _vocabulary_may_be_sharded():
        parts = _all_groups(logits)
        part = jnp.take_along_axis(parts, group[..., None, None], axis=-2)[..., 0, :]
    else:

        def window(logits: Array, begin: Array) -> Array:
            return jax.lax.dynamic_slice(logits, (begin,), (size,))

        part = jax.vmap(jax.vmap(window))(logits, begin)  # [batch, length, size]
    inside = jnp.arange(size) >= (first - begin)[..., None]
    scaled = jnp.where(inside, part / temperature, -jnp.inf)
    return (begin + jax.random.categorical(token_rng, scaled, axis=-1)).astype(jnp.int32)
