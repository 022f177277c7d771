"""Attention with T5's position bias as NVIDIA kernels that keep no logits in main memory.

They run through Pallas's Triton backend. Forward as in FlashAttention, backward as in its second
version (Dao 2023, arXiv 2307.08691): a kernel for keys and values, one for queries, and one for the
bias by distance. A tile of logits is computed again in each.

The bias of a tile is gathered from a row of numbers by distance. Its gradient is deterministic:
tiles on the same diagonal hold the same distances, so one instance adds up those of all texts in
place, and what is left to sum in main memory grows with the length, not with its square.

Tiles that no query of theirs sees at the beginning and at the end of a row are skipped, as are half
of them if attention is causal.

cuDNN's attention (`jax.nn.dot_product_attention`) is no substitute: it takes T5's bias and masks
that differ by row only as their sum, `[batch, heads, queries, keys]`, which is as large as the
logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

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

FORWARD, BACKWARD = (128, 64), (64, 64)
WARPS, STAGES = 4, 2  # of an instance, and of the loads ahead of its products
SPLITS = 8  # Groups of texts whose gradients of the bias are added up at the same time.


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


def forward(
    query: Array, key_values: Sequence[KeyValues], mask: Array, tables: Tables
) -> tuple[Array, Array]:
    """Computes softmax attention of `query [batch, queries, heads, head_dim]`.

    Args:
      query: The queries.
      key_values: Parts of the keys and values, in the order of `keys` below. A part has
        `[rows, part_keys, kv_heads, head_dim]`; row `i` serves rows `i * n ... i * n + n - 1` of
        `query`, where `n = batch / rows`.
      mask: `[batch or 1, queries or 1, keys]` bool; keys that are False are not seen.
      tables: For each part the bias by distance (see `toeplitz`), `[heads, queries + part_keys -
        1]`. None for no bias.

    Returns:
      Values of the shape of `query`; and `[batch, heads, queries]` float32, the logarithm of the
      sum of exp(logit).
    """
    batch, queries, heads, head_dim = query.shape
    sizes = _fit(FORWARD, query, key_values)
    tiled = _row_spec(sizes[0], head_dim)
    seen = _seen_tiles(mask, key_values, sizes, queries)
    return pl.pallas_call(
        functools.partial(_forward_kernel, sizes, queries),
        grid=(pl.cdiv(queries, sizes[0]), batch, heads),
        in_specs=[tiled, *_specs(query, key_values, mask, tables), _bound_specs(seen)],
        out_specs=[tiled, _head_spec(sizes[0])],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
        ],
        compiler_params=_params(query),
        name="attention_forward",
    )(query, list(key_values), mask, _float32(tables), [_bounds(s, 2) for s in seen])


def backward(
    query: Array,
    key_values: Sequence[KeyValues],
    mask: Array,
    tables: Tables,
    mixed: Array,
    log_sum_exp: Array,
    d_mixed: Array,
) -> tuple[Array, list[KeyValues], list[Array] | None]:
    """Computes the gradients of `query`, `key_values` and `tables` from that of `mixed`.

    `mixed` and `log_sum_exp` are what `forward` returned for the first four arguments.
    """
    batch, queries, heads, head_dim = query.shape
    delta = jnp.sum(d_mixed.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1)
    delta = jnp.swapaxes(delta, 1, 2)  # [batch, heads, queries]
    sizes = _fit(BACKWARD, query, key_values)
    seen = _seen_tiles(mask, key_values, sizes, queries)
    tables = _float32(tables)
    tiled, per_head = _row_spec(sizes[0], head_dim), _head_spec(sizes[0])
    d_query = pl.pallas_call(
        functools.partial(_query_kernel, sizes, queries),
        grid=(pl.cdiv(queries, sizes[0]), batch, heads),
        in_specs=[
            *(tiled, tiled, per_head, per_head),
            *_specs(query, key_values, mask, tables),
            _bound_specs(seen),
        ],
        out_specs=tiled,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=_params(query),
        name="attention_backward_query",
    )(
        *(query, d_mixed, log_sum_exp, delta, list(key_values), mask, tables),
        [_bounds(s, 2) for s in seen],
    )
    rows = query, d_mixed, log_sum_exp, delta
    d_key_values, d_tables, start = [], [], 0
    for number, part in enumerate(key_values):
        table = None if tables is None else tables[number]
        place = start, mask.shape[-1]
        d_key_values.append(_key_gradients(sizes, place, rows, part, mask, table, seen[number]))
        if table is not None:
            d_tables.append(_table_gradient(place, rows, part, mask, table))
        start += part.keys.shape[1]
    return d_query, d_key_values, None if tables is None else d_tables


def _float32(tables: Tables) -> list[Array] | None:
    return None if tables is None else [table.astype(jnp.float32) for table in tables]


def _params(query: Array) -> triton.CompilerParams:
    wide = query.shape[-1] * query.dtype.itemsize > 256
    return triton.CompilerParams(num_warps=WARPS, num_stages=1 if wide else STAGES)


def _fit(sizes: Sizes, query: Array, key_values: Sequence[KeyValues]) -> Sizes:
    """Shrinks tiles for short texts, and for heads of more than 256 bytes."""
    wide = 2 if query.shape[-1] * query.dtype.itemsize > 256 else 1
    lengths = query.shape[1], max(part.keys.shape[1] for part in key_values)
    fitted = [
        max(16, min(size // wide, pl.next_power_of_2(length)))
        for size, length in zip(sizes, lengths, strict=True)
    ]
    return fitted[0], fitted[1]


def _seen_tiles(
    mask: Array, key_values: Sequence[KeyValues], sizes: Sizes, queries: int
) -> list[Array]:
    """Finds the tiles that matter, `[batch or 1, query tiles, key tiles]` bool for each part.

    A query that sees no key mixes all values alike, so that all of its tiles matter.
    """
    blind = ~jnp.any(mask, axis=-1, keepdims=True)  # [batch or 1, queries or 1, 1]
    tiles, start = [], 0
    for part in key_values:
        keys = part.keys.shape[1]
        seen = mask[..., start : start + keys] | blind
        if mask.shape[1] > 1:
            seen = _any(seen, 1, sizes[0])
        seen = _any(seen, 2, sizes[1])
        tiles.append(jnp.broadcast_to(seen, (len(mask), pl.cdiv(queries, sizes[0]), seen.shape[2])))
        start += keys
    return tiles


def _any(x: Array, axis: int, size: int) -> Array:
    """Reduces groups of `size` neighbours along an axis of a bool array."""
    groups = pl.cdiv(x.shape[axis], size)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, groups * size - x.shape[axis])
    x = jnp.pad(x, padding)
    return x.reshape(*x.shape[:axis], groups, size, *x.shape[axis + 1 :]).any(axis + 1)


def _bounds(seen: Array, axis: int) -> Array:
    """Computes the first tile seen along an axis, and the one after the last: `[..., 2]`."""
    count = seen.shape[axis]
    first = jnp.argmax(seen, axis)
    last = count - jnp.argmax(jnp.flip(seen, axis), axis)
    none = ~jnp.any(seen, axis)
    return jnp.where(none[..., None], 0, jnp.stack([first, last], -1)).astype(jnp.int32)


def _row_spec(size: int, head_dim: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, size, None, head_dim), lambda i, b, h: (b, i, h, 0))


def _head_spec(size: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, size), lambda i, b, h: (b, h, i))


def _bound_specs(seen: Sequence[Array]) -> list[pl.BlockSpec]:
    own = len(seen[0]) > 1
    return [pl.BlockSpec((None, None, 2), lambda i, b, h: (b if own else 0, i, 0)) for _ in seen]


def _specs(
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


def _load(ref: Ref, first: Any, size: int, count: int, *index: Any) -> Array:
    """Reads `size` rows of `[count, head_dim]`, 0 beyond the last; `index` picks leading axes."""
    inside = first + jnp.arange(size) < count
    rows = ref.at[(*index, pl.ds(first, size), slice(None))]
    return triton.load(rows, mask=inside[:, None], other=0)


def _load_row(ref: Ref, first: Any, size: int, count: int, *index: Any) -> Array:
    """Reads `size` numbers of `[count]`, 0 beyond the last; `index` picks leading axes."""
    inside = first + jnp.arange(size) < count
    return triton.load(ref.at[(*index, pl.ds(first, size))], mask=inside, other=0)


def _zero() -> Array:
    """Returns an index that Pallas can interpret, as it cannot Python's."""
    return jnp.zeros((), jnp.int32)


def _dot(left: Array, right: Array, axes: tuple[int, int]) -> Array:
    """Multiplies over an axis of each, in float32."""
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _logits(
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
    logits = _dot(query, keys, (1, 1))
    inside = (rows < num_queries)[:, None] & (columns < num_keys)[None]
    if table_of is not None:
        index = columns[None] - rows[:, None] + num_queries - 1
        logits += triton.load(table_of(index), mask=inside, other=0)
    span = pl.ds(before + firsts[1], keys.shape[0])
    if mask_rows > 1:
        ref = mask_of((pl.ds(firsts[0], query.shape[0]), span))
        visible = triton.load(ref, mask=inside, other=False)
    else:
        row = triton.load(mask_of((_zero(), span)), mask=columns < num_keys, other=False)
        visible = row[None] & inside
    logits = jnp.where(visible, logits, MASKED)
    return jnp.where((columns < num_keys)[None], logits, ABSENT), visible


def _forward_kernel(
    sizes: Sizes,
    num_queries: int,
    query_ref: Ref,
    parts: Sequence[Any],
    mask_ref: Ref,
    tables: Any,
    bounds: Sequence[Ref],
    mixed_ref: Ref,
    log_sum_exp_ref: Ref,
) -> None:
    """Attends from one tile of queries of a head to all keys."""
    first = pl.program_id(0) * sizes[0]
    inside = first + jnp.arange(sizes[0]) < num_queries
    query = triton.load(query_ref, mask=inside[:, None], other=0)
    carry = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.full(sizes[0], ABSENT, jnp.float32),
        jnp.zeros(sizes[0], jnp.float32),
    )
    before = 0
    for number, (part, bound) in enumerate(zip(parts, bounds, strict=True)):
        num_keys = part.keys.shape[0]
        counts = num_queries, num_keys, before, mask_ref.shape[0]
        table_of = None if tables is None else lambda index, n=number: tables[n].at[index]

        def step(j: Array, carry: Any, part: Any = part, counts: Any = counts,
                 table_of: Any = table_of) -> Any:  # fmt: skip
            mixed, before_top, total = carry
            start = j * sizes[1]
            keys = _load(part.keys, start, sizes[1], counts[1])
            logits, _ = _logits(
                query, keys, lambda i: mask_ref.at[i], table_of, (first, start), counts
            )
            top = jnp.maximum(before_top, jnp.max(logits, axis=1))
            weights = jnp.exp(logits - top[:, None])
            scale = jnp.exp(before_top - top)
            total = total * scale + jnp.sum(weights, axis=1)
            values = _load(part.values, start, sizes[1], counts[1])
            mixed = mixed * scale[:, None] + _dot(weights.astype(values.dtype), values, (1, 0))
            return mixed, top, total

        carry = jax.lax.fori_loop(bound[0], bound[1], step, carry)
        before += num_keys
    mixed, top, total = carry
    result = (mixed / total[:, None]).astype(mixed_ref.dtype)
    triton.store(mixed_ref, result, mask=inside[:, None])
    triton.store(log_sum_exp_ref, top + jnp.log(total), mask=inside)


def _d_logits(
    tile: tuple[Array, Array],
    values: Array,
    d_mixed: Array,
    log_sum_exp: Array,
    delta: Array,
    all_keys: int,
) -> tuple[Array, Array]:
    """Computes the softmax of a tile, and the gradient of its logits.

    The log-sum-exp of a query that sees nothing is that of one key, since float32 has no room for
    the logarithm of their number beside `MASKED`.
    """
    logits, visible = tile
    share = jnp.where(log_sum_exp < MASKED / 2, 1.0 / all_keys, 1.0)
    weights = jnp.exp(logits - log_sum_exp[:, None]) * share[:, None]
    d_weights = _dot(d_mixed, values, (1, 1))
    return weights, jnp.where(visible, weights * (d_weights - delta[:, None]), 0.0)


def _query_kernel(
    sizes: Sizes,
    num_queries: int,
    query_ref: Ref,
    d_mixed_ref: Ref,
    log_sum_exp_ref: Ref,
    delta_ref: Ref,
    parts: Sequence[Any],
    mask_ref: Ref,
    tables: Any,
    bounds: Sequence[Ref],
    d_query_ref: Ref,
) -> None:
    """Computes the gradient of one tile of queries of a head."""
    first = pl.program_id(0) * sizes[0]
    inside = first + jnp.arange(sizes[0]) < num_queries
    query, d_mixed = (
        triton.load(ref, mask=inside[:, None], other=0) for ref in (query_ref, d_mixed_ref)
    )
    log_sum_exp, delta = (
        triton.load(ref, mask=inside, other=0) for ref in (log_sum_exp_ref, delta_ref)
    )
    all_keys, before = mask_ref.shape[1], 0
    d_query = jnp.zeros(query.shape, jnp.float32)
    for number, (part, bound) in enumerate(zip(parts, bounds, strict=True)):
        num_keys = part.keys.shape[0]
        counts = num_queries, num_keys, before, mask_ref.shape[0]
        table_of = None if tables is None else lambda index, n=number: tables[n].at[index]

        def step(j: Array, d_query: Array, part: Any = part, counts: Any = counts,
                 table_of: Any = table_of) -> Array:  # fmt: skip
            start = j * sizes[1]
            keys = _load(part.keys, start, sizes[1], counts[1])
            values = _load(part.values, start, sizes[1], counts[1])
            tile = _logits(query, keys, lambda i: mask_ref.at[i], table_of, (first, start), counts)
            _, d_logits = _d_logits(tile, values, d_mixed, log_sum_exp, delta, all_keys)
            return d_query + _dot(d_logits.astype(keys.dtype), keys, (1, 0))

        d_query = jax.lax.fori_loop(bound[0], bound[1], step, d_query)
        before += num_keys
    triton.store(d_query_ref, d_query.astype(d_query_ref.dtype), mask=inside[:, None])


def _key_gradients(
    sizes: Sizes,
    place: tuple[int, int],
    rows: tuple[Array, Array, Array, Array],
    part: KeyValues,
    mask: Array,
    table: Array | None,
    seen: Array,
) -> KeyValues:
    """Computes the gradients of a part's keys and values.

    Args:
      sizes: Those of tiles.
      place: Number of keys before the part, and of all keys.
      rows: Queries, gradient of `mixed`, log-sum-exp and delta.
      part: Keys and values.
      mask: As of `forward`.
      table: That of the part.
      seen: `_seen_tiles` of the part.
    """
    query = rows[0]
    batch, queries, heads, head_dim = query.shape
    num_rows, keys, kv_heads, _ = part.keys.shape
    per_row, group = batch // num_rows, heads // kv_heads
    own = per_row if len(mask) > 1 else 1
    query_spec = pl.BlockSpec((per_row, queries, group, head_dim), lambda j, r, h: (r, 0, h, 0))
    per_head = pl.BlockSpec((per_row, group, queries), lambda j, r, h: (r, h, 0))
    key_spec = pl.BlockSpec((None, sizes[1], None, head_dim), lambda j, r, h: (r, j, h, 0))
    pick = (lambda r: r) if len(mask) > 1 else (lambda r: 0)
    table_spec = None
    if table is not None:
        table_spec = pl.BlockSpec((group, table.shape[1]), lambda j, r, h: (h, 0))
    shape = jax.ShapeDtypeStruct(part.keys.shape, part.keys.dtype)
    d_keys, d_values = pl.pallas_call(
        functools.partial(_key_kernel, sizes, place, keys),
        grid=(pl.cdiv(keys, sizes[1]), num_rows, kv_heads),
        in_specs=[
            *(query_spec, query_spec, per_head, per_head, key_spec, key_spec),
            pl.BlockSpec((own, *mask.shape[1:]), lambda j, r, h: (pick(r), 0, 0)),
            table_spec,
            pl.BlockSpec((own, None, 2), lambda j, r, h: (pick(r), j, 0)),
        ],
        out_specs=[key_spec, key_spec],
        out_shape=[shape, shape],
        compiler_params=_params(query),
        name="attention_backward_keys",
    )(*rows, part.keys, part.values, mask, table, _bounds(seen, 1))
    return KeyValues(d_keys, d_values)


def _key_kernel(
    sizes: Sizes,
    place: tuple[int, int],
    num_keys: int,
    query_ref: Ref,
    d_mixed_ref: Ref,
    log_sum_exp_ref: Ref,
    delta_ref: Ref,
    key_ref: Ref,
    value_ref: Ref,
    mask_ref: Ref,
    table_ref: Ref | None,
    bound_ref: Ref,
    d_key_ref: Ref,
    d_value_ref: Ref,
) -> None:
    """Computes the gradients of one tile of keys and values, summed over all that attend to it."""
    per_row, num_queries, group, _ = query_ref.shape
    start = pl.program_id(0) * sizes[1]
    inside = start + jnp.arange(sizes[1]) < num_keys
    keys, values = (triton.load(ref, mask=inside[:, None], other=0) for ref in (key_ref, value_ref))
    counts = num_queries, num_keys, place[0], mask_ref.shape[1]

    def of_head(number: Any, carry: Any) -> Any:
        row, head = jax.lax.div(number, group), jax.lax.rem(number, group)
        mask_row = row if mask_ref.shape[0] > 1 else _zero()
        table_of = None if table_ref is None else lambda i: table_ref.at[head, i]

        def step(i: Array, carry: Any) -> Any:
            d_keys, d_values = carry
            first = i * sizes[0]
            here = pl.ds(first, sizes[0])
            present = first + jnp.arange(sizes[0]) < num_queries
            query, d_mixed = (
                triton.load(ref.at[row, here, head], mask=present[:, None], other=0)
                for ref in (query_ref, d_mixed_ref)
            )
            log_sum_exp, delta = (
                _load_row(ref, first, sizes[0], num_queries, row, head)
                for ref in (log_sum_exp_ref, delta_ref)
            )
            mask_of = lambda index: mask_ref.at[(mask_row, *index)]  # noqa: E731
            tile = _logits(query, keys, mask_of, table_of, (first, start), counts)
            weights, d_logits = _d_logits(tile, values, d_mixed, log_sum_exp, delta, place[1])
            d_values += _dot(weights.astype(d_mixed.dtype), d_mixed, (0, 0))
            d_keys += _dot(d_logits.astype(query.dtype), query, (0, 0))
            return d_keys, d_values

        bounds = bound_ref[mask_row, 0], bound_ref[mask_row, 1]
        return jax.lax.fori_loop(*bounds, step, carry)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    count = per_row * group
    carry = zeros, zeros
    carry = of_head(_zero(), carry) if count == 1 else jax.lax.fori_loop(0, count, of_head, carry)
    for ref, gradient in zip((d_key_ref, d_value_ref), carry, strict=True):
        triton.store(ref, gradient.astype(ref.dtype), mask=inside[:, None])


def _table_gradient(
    place: tuple[int, int],
    rows: tuple[Array, Array, Array, Array],
    part: KeyValues,
    mask: Array,
    table: Array,
) -> Array:
    """Computes the gradient of a part's bias by distance; arguments as of `_key_gradients`.

    An instance adds up the logits' gradients of square tiles on one diagonal of a head, `[size,
    size]`, over queries and over the rows of its split.
    """
    query = rows[0]
    batch, queries, heads, head_dim = query.shape
    num_rows, keys, kv_heads, _ = part.keys.shape
    group, size = heads // kv_heads, min(_fit(BACKWARD, query, [part]))
    tiles = pl.cdiv(queries, size), pl.cdiv(keys, size)
    diagonals = sum(tiles) - 1
    splits = next(n for n in range(min(SPLITS, batch), 0, -1) if batch % n == 0)
    seen = jnp.any(mask[..., place[0] : place[0] + keys], axis=0)[None]  # [1, queries or 1, keys]
    if mask.shape[1] > 1:
        seen = _any(seen, 1, size)
    seen = jnp.broadcast_to(_any(seen, 2, size)[0], tiles)
    # Tile of keys of each diagonal and tile of queries.
    column = jnp.arange(diagonals)[:, None] - (tiles[0] - 1) + jnp.arange(tiles[0])
    seen = seen[jnp.arange(tiles[0]), jnp.clip(column, 0, tiles[1] - 1)]
    bounds = _bounds(seen & (column >= 0) & (column < tiles[1]), 1)  # [diagonals, 2]
    share = batch // splits
    query_spec = pl.BlockSpec((share, queries, None, head_dim), lambda d, s, h: (s, 0, h, 0))
    per_head = pl.BlockSpec((share, None, queries), lambda d, s, h: (s, h, 0))
    key_spec = pl.BlockSpec((num_rows, keys, None, head_dim), lambda d, s, h: (0, 0, h // group, 0))
    sums = pl.pallas_call(
        functools.partial(_table_kernel, size, place, batch // num_rows),
        grid=(diagonals, splits, heads),
        in_specs=[
            *(query_spec, query_spec, per_head, per_head, key_spec, key_spec),
            pl.BlockSpec(mask.shape, lambda d, s, h: (0, 0, 0)),
            pl.BlockSpec((None, table.shape[1]), lambda d, s, h: (h, 0)),
            pl.BlockSpec((None, 2), lambda d, s, h: (d, 0)),
        ],
        out_specs=pl.BlockSpec((None, None, None, size, size), lambda d, s, h: (s, h, d, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((splits, heads, diagonals, size, size), jnp.float32),
        compiler_params=_params(query),
        name="attention_backward_bias",
    )(*rows, part.keys, part.values, mask, table, bounds)
    sums = sums.sum(0)

    def expanded(table: Array) -> Array:  # [heads, diagonals, size, size]
        padded = jnp.pad(table, ((0, 0), (tiles[0] * size - queries, tiles[1] * size - keys)))
        windows = [padded[:, d * size : (d + 2) * size - 1] for d in range(diagonals)]
        return toeplitz(jnp.stack(windows, 1), size)

    return jax.linear_transpose(expanded, table)(sums)[0]


def _table_kernel(
    size: int,
    place: tuple[int, int],
    per_row: int,
    query_ref: Ref,
    d_mixed_ref: Ref,
    log_sum_exp_ref: Ref,
    delta_ref: Ref,
    key_ref: Ref,
    value_ref: Ref,
    mask_ref: Ref,
    table_ref: Ref,
    bound_ref: Ref,
    sum_ref: Ref,
) -> None:
    """Adds up the gradients of logits in the tiles of one diagonal."""
    share, num_queries, _ = query_ref.shape
    num_keys = key_ref.shape[1]
    offset = pl.program_id(0) - (pl.cdiv(num_queries, size) - 1)
    counts = num_queries, num_keys, place[0], mask_ref.shape[1]
    low, high = bound_ref[0], bound_ref[1]
    first_row = pl.program_id(1) * share

    def step(number: Array, total: Array) -> Array:
        row = jax.lax.div(number, high - low)
        tile = low + number - row * (high - low)
        batch_row = first_row + row
        first, start = tile * size, (tile + offset) * size
        query, d_mixed = (
            _load(ref, first, size, num_queries, row) for ref in (query_ref, d_mixed_ref)
        )
        keys, values = (
            _load(ref, start, size, num_keys, jax.lax.div(batch_row, per_row))
            for ref in (key_ref, value_ref)
        )
        log_sum_exp, delta = (
            _load_row(ref, first, size, num_queries, row) for ref in (log_sum_exp_ref, delta_ref)
        )
        mask_row = batch_row if mask_ref.shape[0] > 1 else _zero()
        mask_of = lambda index: mask_ref.at[(mask_row, *index)]  # noqa: E731
        table_of = lambda index: table_ref.at[index]  # noqa: E731
        tile = _logits(query, keys, mask_of, table_of, (first, start), counts)
        return total + _d_logits(tile, values, d_mixed, log_sum_exp, delta, place[1])[1]

    zeros = jnp.zeros((size, size), jnp.float32)
    sum_ref[...] = jax.lax.fori_loop(0, share * (high - low), step, zeros)
