"""The layout of `[prefix; target]` in a row, in which distances never depend on padding.

SeqIO provides prefixes and targets as two arrays, each padded at its end, perhaps packed. They are
merged into one row in which each text is contiguous: all padding first, then the prefix and target
of the first text, then those of the second. The distance between two tokens of a text is then the
distance of their indices, in every row alike, so one position bias serves the whole batch.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array


class Prefix(flax.struct.PyTreeNode):
    """Prefix tokens with their padding moved to the front, unless packed."""

    tokens: Array  # [batch, prefix_length] int32
    segment_ids: Array  # int32 of the same shape; 0 is padding. Without packing, 1 is text.
    packed: bool = flax.struct.field(pytree_node=False, default=False)  # rows hold several texts


def read_prefix(tokens: Array, segment_ids: Array | None, *, start: bool) -> Prefix:
    """Right-aligns prefixes, `tokens [batch, prefix_length]` padded with 0, unless packed.

    A row without any prefix token uses its last padding token as the start of the text, so that
    there is always a token from which the first target token is predicted.

    Args:
      segment_ids: `[batch, prefix_length]` int32 if rows are packed, else None.
      start: Put a 0 before the first token of every text, which makes the prefix one token longer;
        packed rows are left to `start_texts`.
    """
    if segment_ids is not None:
        return Prefix(tokens, segment_ids, packed=True)
    length = tokens.shape[1]
    width = length + start
    ends = jnp.where(tokens != 0, jnp.arange(length) + 1, 0)  # [batch, prefix_length]
    free = width - jnp.max(ends, axis=1, keepdims=True)  # [batch, 1]
    aligned = _move_right(jnp.pad(tokens, [(0, 0), (0, int(start))]), free)
    is_text = jnp.arange(width) >= jnp.minimum(free - start, width - 1)
    return Prefix(aligned, is_text.astype(jnp.int32))


def drop_prefix(prefix: Prefix, dropped: Array) -> Prefix:
    """Empties prefixes of rows `dropped [batch]`, not packed, as `read_prefix` reads empty ones."""
    kept = ~dropped[:, None]
    last = jnp.arange(prefix.tokens.shape[1]) == prefix.tokens.shape[1] - 1
    segment_ids = jnp.where(kept, prefix.segment_ids, last.astype(jnp.int32))
    return Prefix(jnp.where(kept, prefix.tokens, 0), segment_ids)


def _move_right(x: Array, places: Array) -> Array:
    """Moves each row of `x [batch, width]` right by `places [batch, 1]`, filled up with 0."""
    source = jnp.arange(x.shape[1]) - places  # [batch, width]; negative for what is filled up
    return jnp.where(source >= 0, jnp.take_along_axis(x, jnp.maximum(source, 0), axis=1), 0)


def extend_prefix(prefix: Prefix, tokens: Array, counts: Array) -> Prefix:
    """Appends the first `counts [batch]` of `tokens [batch, length]` to prefixes, not packed."""
    length = tokens.shape[1]
    places = length - counts[:, None]
    both = jnp.concatenate([prefix.tokens, tokens], axis=1)  # [batch, prefix_length + length]
    segment_ids = jnp.pad(prefix.segment_ids, ((0, 0), (0, length)), constant_values=1)
    return Prefix(_move_right(both, places), _move_right(segment_ids, places))


class Row(flax.struct.PyTreeNode):
    """Prefix and target in one row."""

    tokens: Array  # [batch, prefix_length + length] int32
    segment_ids: Array  # int32 of the same shape; 0 is padding
    is_prefix: Array  # bool of the same shape
    # [batch, length] int32, the index of each target token in the row; None if the targets are the
    # last `length` tokens of every row.
    target_index: Array | None


def merge(prefix: Prefix, target: Array, segment_ids: Array | None) -> Row:
    """Merges prefixes and targets into one contiguous row per example.

    Args:
      prefix: Prefixes from `read_prefix`.
      target: `[batch, length]` int32, target tokens or canvas; without packing every position is
        part of the text, padding included.
      segment_ids: `[batch, length]` int32 if rows are packed, else None.

    Raises:
      ValueError: if only one of prefix and target is packed.
    """
    if prefix.packed != (segment_ids is not None):
        raise ValueError("prefix and target must both be packed (segment ids) or both not.")
    if segment_ids is None:
        segment_ids = jnp.ones_like(target)
    tokens = jnp.concatenate([prefix.tokens, target], axis=1)  # [batch, prefix_length + length]
    segments = jnp.concatenate([prefix.segment_ids, segment_ids], axis=1)
    prefix_length = prefix.tokens.shape[1]
    is_prefix = jnp.broadcast_to(jnp.arange(tokens.shape[1]) < prefix_length, tokens.shape)
    if not prefix.packed:
        return Row(tokens, segments, is_prefix, None)
    # A stable sort keeps the order of tokens in a text, and its prefix before its target.
    order = jnp.argsort(segments, axis=1, stable=True)  # row index -> index in `tokens`
    where = jnp.argsort(order, axis=1)  # index in `tokens` -> row index

    def take(x: Array) -> Array:
        return jnp.take_along_axis(x, order, axis=1)

    return Row(take(tokens), take(segments), take(is_prefix), where[:, prefix_length:])


def shift_texts(x: Array, segment_ids: Array, first: int | bool) -> Array:
    """Shifts each text of `x [batch, length]` right after a `first`, and drops its last token."""
    before = jnp.pad(segment_ids, [(0, 0), (1, 0)])[:, :-1]  # segment of the token before
    return jnp.where(segment_ids == before, jnp.roll(x, 1, axis=1), first)


def text_index(segment_ids: Array) -> Array:
    """Returns the place of each token in its own text, int32 of the shape of `segment_ids`.

    Texts are contiguous in `segment_ids [batch, length]`.
    """
    index = jnp.arange(segment_ids.shape[1])
    before = jnp.pad(segment_ids, [(0, 0), (1, 0)], constant_values=-1)[:, :-1]
    starts = jnp.where(segment_ids != before, index, 0)
    return index - jax.lax.cummax(starts, axis=1)


def start_texts(row: Row) -> Row:
    """Begins each text of a packed row with a 0 and shifts its tokens right; drops the last one.

    The token at a position is then the one that predicts what `row` has there, and the last prefix
    token is where the target begins.
    """
    return row.replace(
        tokens=shift_texts(row.tokens, row.segment_ids, 0),
        is_prefix=shift_texts(row.is_prefix, row.segment_ids, True),
    )


def take_targets(hidden: Array, row: Row, length: int, before: bool) -> Array:
    """Picks from `hidden`, laid out as `row`, the states of targets: `[batch, length, embed]`.

    With `before` they are those of the token before each target token, which predict it.
    """
    shift = 1 if before else 0
    if row.target_index is None:
        start = hidden.shape[1] - length - shift
        return hidden[:, start : start + length]
    index = jnp.maximum(row.target_index - shift, 0)  # [batch, length]
    taken = jnp.take_along_axis(hidden, index[..., None], axis=1)  # [batch, length, embed]
    # A packed text without a prefix must not be predicted from the text before it.
    segment = jnp.take_along_axis(row.segment_ids, row.target_index, axis=1)
    same_text = jnp.take_along_axis(row.segment_ids, index, axis=1) == segment
    return jnp.where(same_text[..., None], taken, 0)
