"""Tiles of NVIDIA's attention kernels: their sizes, what they read, and their logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from diffusion_t5x.networks.kernels.flash_attention import ABSENT, MASKED
from diffusion_t5x.networks.kv_cache import KeyValues

Array = jax.Array
Ref: TypeAlias = Any  # An array in main memory, inside the kernel.
Tables: TypeAlias = Sequence[Array] | None
Sizes: TypeAlias = tuple[int, int]  # of a tile: queries, keys

TILE = (64, 64)
WARPS, STAGES = 4, 2  # of an instance, and of the loads ahead of its products


class Rows(NamedTuple):
    """What the gradients of keys, values and biases read of queries; also refs and their specs."""

    query: Any
    d_mixed: Any  # the gradient of the result
    log_sum_exp: Any
    delta: Any  # sums of the result times its gradient, [batch, heads, queries]


def supports(query: Array) -> bool:
    """Returns True if the kernels take these heads: 16, 32, 64, 128 or 256 wide."""
    return query.shape[-1] in (16, 32, 64, 128, 256)


def toeplitz(table: Array, queries: int) -> Array:
    """Expands a bias by distance, `[..., queries + keys - 1]`, to `[..., queries, keys]`.

    The first number is that of the last query and the first key, the last that of the first query
    and the last key.
    """
    *others, size = table.shape
    padded = jnp.pad(table, [(0, 0)] * len(others) + [(0, 1)])
    # Each row of `size` numbers begins one earlier in the period of `size + 1`.
    rows = jnp.broadcast_to(padded[..., None, :], (*others, queries, size + 1))
    rows = rows.reshape(*others, -1)[..., : queries * size].reshape(*others, queries, size)
    return rows[..., queries - 1 :]


def in_float32(tables: Tables) -> list[Array] | None:
    """Returns tables in the type that kernels read."""
    return None if tables is None else [table.astype(jnp.float32) for table in tables]


def is_wide(query: Array) -> bool:
    """Returns True if heads are of more than 256 bytes."""
    return query.shape[-1] * query.dtype.itemsize > 256


def compiler_params(query: Array) -> triton.CompilerParams:
    """Returns what an instance is compiled with; wide heads leave no room to load ahead."""
    return triton.CompilerParams(num_warps=WARPS, num_stages=1 if is_wide(query) else STAGES)


def fit(wide: bool, queries: int, keys: int) -> Sizes:
    """Shrinks tiles for short texts, and for wide heads."""
    fitted = [
        max(16, min(size // (2 if wide else 1), pl.next_power_of_2(length)))
        for size, length in zip(TILE, (queries, keys), strict=True)
    ]
    return fitted[0], fitted[1]


class Seen(flax.struct.PyTreeNode):
    """Which tiles of logits matter, for each part of the keys; tiles outside bounds are skipped.

    Bounds `[..., 2]` int32 are the first tile, and the one after the last.
    """

    of_queries: list[Array]  # of the keys' tiles, [batch or 1, query tiles, 2]
    of_keys: list[Array]  # of the queries' tiles, [batch or 1, key tiles, 2]
    # Of the queries' tiles on a diagonal of square tiles, [batch or 1, diagonals, 2].
    of_diagonals: list[Array]


def see(mask: Array, queries: int, keys: Sequence[int], wide: bool) -> Seen:
    """Finds the tiles that matter under a mask; all layers under it may share the result.

    A query that sees no key mixes all values alike, so that all of its tiles matter.

    Args:
      mask: `[batch or 1, queries or 1, keys]` bool.
      queries: Number of queries.
      keys: Number of keys of each part.
      wide: Whether heads are of more than 256 bytes.
    """
    blind = ~jnp.any(mask, axis=-1, keepdims=True)  # [batch or 1, queries or 1, 1]
    sizes = fit(wide, queries, max(keys))
    found, start = Seen([], [], []), 0
    for count in keys:
        part = mask[..., start : start + count]
        start += count
        tiles = _tiles(part | blind, sizes, queries)
        found.of_queries.append(_bounds(tiles, 2))
        found.of_keys.append(_bounds(tiles, 1))
        size = min(fit(wide, queries, count))
        found.of_diagonals.append(_diagonal_bounds(_tiles(part, (size, size), queries)))
    return found


def _tiles(seen: Array, sizes: Sizes, queries: int) -> Array:
    """Reduces `seen [batch or 1, queries or 1, keys]` to tiles, `[.., query tiles, key tiles]`."""
    if seen.shape[1] > 1:
        seen = _any_of(seen, 1, sizes[0])
    seen = _any_of(seen, 2, sizes[1])
    return jnp.broadcast_to(seen, (len(seen), pl.cdiv(queries, sizes[0]), seen.shape[2]))


def _diagonal_bounds(seen: Array) -> Array:
    """Computes the bounds of each diagonal of `[batch or 1, query tiles, key tiles]`."""
    rows, columns = seen.shape[1:]
    # Tile of keys of each diagonal and tile of queries.
    column = jnp.arange(rows + columns - 1)[:, None] - (rows - 1) + jnp.arange(rows)
    inside = (column >= 0) & (column < columns)
    return _bounds(inside & seen[:, jnp.arange(rows), jnp.clip(column, 0, columns - 1)], 2)


def union(bounds: Array) -> Array:
    """Computes the bounds within which those of all rows lie: `[rows, n, 2]` to `[n, 2]`."""
    first, last = bounds[..., 0], bounds[..., 1]
    end = jnp.max(last, axis=0)
    begin = jnp.min(jnp.where(first < last, first, end), axis=0)
    return jnp.stack([begin, end], axis=-1)


def _any_of(x: Array, axis: int, size: int) -> Array:
    """Reduces groups of `size` neighbours along an axis; the last group may be shorter."""
    count = x.shape[axis] // size
    whole, rest = jnp.split(x, [count * size], axis)
    parts = [whole.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]).any(axis + 1)]
    if rest.shape[axis]:
        parts.append(rest.any(axis, keepdims=True))
    return jnp.concatenate(parts, axis)


def _bounds(seen: Array, axis: int) -> Array:
    """Computes the first tile seen along an axis, and the one after the last: `[..., 2]`."""
    count = seen.shape[axis]
    first = jnp.argmax(seen, axis)
    last = count - jnp.argmax(jnp.flip(seen, axis), axis)
    none = ~jnp.any(seen, axis)
    return jnp.where(none[..., None], 0, jnp.stack([first, last], -1)).astype(jnp.int32)


def row_spec(size: int, head_dim: int) -> pl.BlockSpec:
    """Describes a tile of queries of a head, `[size, head_dim]`."""
    return pl.BlockSpec((None, size, None, head_dim), lambda i, b, h: (b, i, h, 0))


def head_spec(size: int) -> pl.BlockSpec:
    """Describes a number for each query of a tile, `[size]`."""
    return pl.BlockSpec((None, None, size), lambda i, b, h: (b, h, i))


def bound_specs(bounds: Sequence[Array]) -> list[pl.BlockSpec]:
    """Describes the two bounds of a tile of queries, for each part."""
    own = len(bounds[0]) > 1
    return [pl.BlockSpec((None, None, 2), lambda i, b, h: (b if own else 0, i, 0)) for _ in bounds]


def specs(
    query: Array, key_values: Sequence[KeyValues], mask: Array, tables: Tables
) -> tuple[Any, ...]:
    """Describes what an instance for a tile of queries sees of keys and values, mask and tables."""
    batch, _, heads, head_dim = query.shape

    def of_part(part: KeyValues) -> KeyValues:
        rows, keys, kv_heads, _ = part.keys.shape
        group, per_row = heads // kv_heads, batch // rows
        spec = pl.BlockSpec(
            (None, keys, None, head_dim), lambda i, b, h: (b // per_row, 0, h // group, 0)
        )
        return KeyValues(spec, spec)  # type: ignore[arg-type]

    own = len(mask) > 1
    mask_spec = pl.BlockSpec((None, *mask.shape[1:]), lambda i, b, h: (b if own else 0, 0, 0))
    table_specs = None
    if tables is not None:
        table_specs = [
            pl.BlockSpec((None, table.shape[1]), lambda i, b, h: (h, 0)) for table in tables
        ]
    return list(map(of_part, key_values)), mask_spec, table_specs


def load_rows(ref: Ref, first: Any, size: int, count: int, *index: Any) -> Array:
    """Reads `size` rows of `[count, head_dim]`, 0 beyond the last; `index` picks leading axes."""
    inside = first + jnp.arange(size) < count
    rows = ref.at[(*index, pl.ds(first, size), slice(None))]
    return triton.load(rows, mask=inside[:, None], other=0)


def load_row(ref: Ref, first: Any, size: int, count: int, *index: Any) -> Array:
    """Reads `size` numbers of `[count]`, 0 beyond the last; `index` picks leading axes."""
    inside = first + jnp.arange(size) < count
    return triton.load(ref.at[(*index, pl.ds(first, size))], mask=inside, other=0)


def zero() -> Array:
    """Returns an index that Pallas can interpret, as it cannot Python's."""
    return jnp.zeros((), jnp.int32)


def dot(left: Array, right: Array, axes: tuple[int, int]) -> Array:
    """Multiplies over an axis of each, in float32."""
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def logits_of(
    query: Array,
    keys: Array,
    mask_of: Callable[[Any], Any],
    table_of: Callable[[Any], Any] | None,
    firsts: tuple[Any, Any],
    counts: tuple[int, int, int, int],
) -> tuple[Array, Array]:
    """Computes a tile of logits, and which of them are seen: `[tile queries, tile keys]` each.

    Args:
      query: `[tile queries, head_dim]`.
      keys: `[tile keys, head_dim]`.
      mask_of: Returns the mask's ref at the indices of queries and of keys.
      table_of: Returns the table's ref at an index; None for no bias.
      firsts: First query, and first key in its part.
      counts: Number of queries, of keys in the part, of keys before the part, of the mask's rows.
    """
    num_queries, num_keys, before, mask_rows = counts
    rows = firsts[0] + jnp.arange(query.shape[0])
    columns = firsts[1] + jnp.arange(keys.shape[0])
    logits = dot(query, keys, (1, 1))
    inside = (rows < num_queries)[:, None] & (columns < num_keys)[None]
    if table_of is not None:
        index = columns[None] - rows[:, None] + num_queries - 1
        logits += triton.load(table_of(index), mask=inside, other=0)
    span = pl.ds(before + firsts[1], keys.shape[0])
    if mask_rows > 1:
        ref = mask_of((pl.ds(firsts[0], query.shape[0]), span))
        visible = triton.load(ref, mask=inside, other=False)
    else:
        row = triton.load(mask_of((zero(), span)), mask=columns < num_keys, other=False)
        visible = row[None] & inside
    logits = jnp.where(visible, logits, MASKED)
    return jnp.where((columns < num_keys)[None], logits, ABSENT), visible


def fold_keys(
    read: Callable[..., Any],
    carry: Any,
    query: Array,
    place: tuple[Any, int],
    tile_keys: int,
    parts: Sequence[KeyValues],
    mask_ref: Ref,
    tables: Sequence[Ref] | None,
    bounds: Sequence[Ref],
) -> Any:
    """Reads all tiles of keys that a tile of queries may see, one after the other.

    Args:
      read: Maps `(carry, keys, load_values, (logits, visible))` to the next carry, where
        `load_values()` gives the tile's values, and the last are those of `logits_of`.
      carry: The first carry.
      query: `[tile queries, head_dim]`.
      place: The tile's first query, and the number of all queries.
      tile_keys: Keys of a tile.
      parts: Refs of keys and values of each part.
      mask_ref: The mask's ref, `[queries or 1, keys]`.
      tables: Each part's table; None for no bias.
      bounds: Each part's `Seen.of_queries` of the tile.
    """
    before = 0
    for number, (part, bound) in enumerate(zip(parts, bounds, strict=True)):
        num_keys = part.keys.shape[0]
        counts = place[1], num_keys, before, mask_ref.shape[0]
        table_of = None if tables is None else lambda index, n=number: tables[n].at[index]

        def step(j: Array, carry: Any, part: Any = part, counts: Any = counts,
                 table_of: Any = table_of) -> Any:  # fmt: skip
            start = j * tile_keys
            load = functools.partial(load_rows, first=start, size=tile_keys, count=counts[1])
            keys = load(part.keys)
            firsts = place[0], start
            tile = logits_of(query, keys, lambda i: mask_ref.at[i], table_of, firsts, counts)
            return read(carry, keys, lambda: load(part.values), tile)

        carry = jax.lax.fori_loop(bound[0], bound[1], step, carry)
        before += num_keys
    return carry
