"""Reading logits once for many sums, and draws of tokens that need few random numbers.

Both take the vocabulary in groups of neighbouring tokens. Where it may be split among devices, all
groups are taken at once, so that none is moved; else one after the other, so that XLA reads each of
them once for all that is asked of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
GROUPS = 16
LANES = 128  # a group holds a multiple of so many tokens, as TPUs store them


def _group_size(vocab_size: int) -> int:
    return min(-(-vocab_size // (GROUPS * LANES)) * LANES, vocab_size)


def _vocabulary_may_be_split() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return any(size > 1 for axis, size in mesh.shape.items() if axis != "data")


def _all_groups(logits: Array) -> Array:
    """`[..., vocab] -> [..., groups, tokens]`, the last one with what comes before it."""
    size = _group_size(logits.shape[-1])
    whole = logits.shape[-1] // size * size
    groups = logits[..., :whole].reshape(*logits.shape[:-1], -1, size)
    if whole == logits.shape[-1]:
        return groups
    return jnp.concatenate([groups, logits[..., None, -size:]], axis=-2)


def read_groups(read: Callable[[Array, Array, Array], Any], logits: Array) -> Any:
    """What `read` says of each group of tokens.

    Args:
      read: `(logits [..., tokens], tokens, inside)` to a tree of `[...]`; `tokens` int32 and
        `inside` bool broadcast to the logits. Where `inside` is False, a token is of another group.
      logits: `[..., vocab]`.

    Returns:
      The tree, each of its arrays `[..., groups]`.
    """
    vocab_size, size = logits.shape[-1], _group_size(logits.shape[-1])
    firsts = jnp.arange(0, vocab_size, size)
    # The last group may be shorter; it is read with what comes before it.
    tokens = jnp.minimum(firsts, vocab_size - size)[:, None] + jnp.arange(size)
    if _vocabulary_may_be_split():
        return read(_all_groups(logits), tokens, tokens >= firsts[:, None])

    def read_group(group: tuple[Array, Array]) -> Any:
        first, tokens = group
        part = jax.lax.dynamic_slice_in_dim(logits, tokens[0], size, axis=-1)
        return read(part, tokens, tokens >= first)

    results = jax.lax.map(read_group, (firsts, tokens))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), results)


def first_largest(below: Array, tokens: Array, inside: Array | bool = True) -> Array:
    """The first of the tokens with the largest logit of all: float32, infinity where there is none.

    XLA reads logits once for this and for sums, unlike for an argmax; and for results of one type,
    so that tokens are counted in float32, which holds them up to 2**24 exactly.

    Args:
      below: logits minus the largest of each position, `[..., tokens]`.
      tokens: int32, broadcasts to `below`.
      inside: which of them are looked at.
    """
    largest = inside & (below >= 0)
    return jnp.min(jnp.where(largest, tokens.astype(jnp.float32), jnp.inf), axis=-1)


def draw_tokens(rng: Array, logits: Array, totals: Array, temperature: Array | float) -> Array:
    """A draw from softmax(logits / temperature): of a group first, then of a token in it.

    It needs a random number for each group and for each token of one group, where a draw from all
    tokens at once needs one for each of them.

    Args:
      rng: a key.
      logits: `[batch, length, vocab]`.
      totals: of each group, the sum of exp((logit - c) / temperature), where c is the same for all
        groups of a position: `[batch, length, groups]`.
      temperature: positive.

    Returns:
      `[batch, length]` int32.
    """
    vocab_size, size = logits.shape[-1], _group_size(logits.shape[-1])
    of_group, of_token = jax.random.split(rng)
    group = jax.random.categorical(of_group, jnp.log(totals), axis=-1)
    first = group * size
    begin = jnp.minimum(first, vocab_size - size)
    if _vocabulary_may_be_split():
        parts = _all_groups(logits)
        part = jnp.take_along_axis(parts, group[..., None, None], axis=-2)[..., 0, :]
    else:

        def window(logits: Array, begin: Array) -> Array:
            return jax.lax.dynamic_slice(logits, (begin,), (size,))

        part = jax.vmap(jax.vmap(window))(logits, begin)
    inside = jnp.arange(size) >= (first - begin)[..., None]
    scaled = jnp.where(inside, part / temperature, -jnp.inf)
    return (begin + jax.random.categorical(of_token, scaled, axis=-1)).astype(jnp.int32)
