"""The gradients of `gpu_attention` as NVIDIA kernels that keep no logits in main memory.

As in the second version of FlashAttention (Dao 2023, arXiv 2307.08691), each tile of logits is
computed again: by a kernel for queries, one for keys and values, and one for the bias by distance.

Gradients of the bias are deterministic. Tiles on the same diagonal hold the same distances, so one
instance adds up those of many texts in place, and what is left to sum in main memory grows with the
length, not with its square.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from diffusion_t5x.networks.kernels import gpu_tiles
from diffusion_t5x.networks.kernels.flash_attention import MASKED
from diffusion_t5x.networks.kernels.gpu_tiles import Array, Ref, Rows, Seen, Sizes, Tables
from diffusion_t5x.networks.kv_cache import KeyValues

SPLITS = 8  # Groups of texts whose gradients of the bias are added up at the same time.


def backward(
    query: Array,
    key_values: Sequence[KeyValues],
    mask: Array,
    tables: Tables,
    seen: Seen,
    mixed: Array,
    log_sum_exp: Array,
    d_mixed: Array,
) -> tuple[Array, list[KeyValues], list[Array] | None]:
    """Computes the gradients of `query`, `key_values` and `tables` from that of `mixed`.

    `mixed` and `log_sum_exp` are what `gpu_attention.forward` returned for the arguments before.
    """
    batch, queries, heads, head_dim = query.shape
    delta = jnp.sum(d_mixed.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1)
    delta = jnp.swapaxes(delta, 1, 2)  # [batch, heads, queries]
    longest = max(part.keys.shape[1] for part in key_values)
    sizes = gpu_tiles.fit(gpu_tiles.is_wide(query), queries, longest)
    tables = gpu_tiles.in_float32(tables)
    rows = Rows(query, d_mixed, log_sum_exp, delta)
    tiled, per_head = gpu_tiles.row_spec(sizes[0], head_dim), gpu_tiles.head_spec(sizes[0])
    d_query = pl.pallas_call(
        functools.partial(_query_kernel, sizes, queries),
        grid=(pl.cdiv(queries, sizes[0]), batch, heads),
        in_specs=[
            Rows(tiled, tiled, per_head, per_head),
            *gpu_tiles.specs(query, key_values, mask, tables),
            gpu_tiles.bound_specs(seen.of_queries),
        ],
        out_specs=tiled,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=gpu_tiles.compiler_params(query),
        name="attention_backward_query",
    )(
        *(rows, list(key_values), mask, tables),
        seen.of_queries,
    )
    d_key_values, d_tables, start = [], [], 0
    for number, part in enumerate(key_values):
        table = None if tables is None else tables[number]
        place = start, mask.shape[-1]
        d_key_values.append(
            _key_gradients(sizes, place, rows, part, mask, table, seen.of_keys[number])
        )
        if table is not None:
            d_tables.append(
                _table_gradient(place, rows, part, mask, table, seen.of_diagonals[number])
            )
        start += part.keys.shape[1]
    return d_query, d_key_values, None if tables is None else d_tables


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
    d_weights = gpu_tiles.dot(d_mixed, values, (1, 1))
    return weights, jnp.where(visible, weights * (d_weights - delta[:, None]), 0.0)


def _query_kernel(
    sizes: Sizes,
    num_queries: int,
    rows: Rows,
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
        triton.load(ref, mask=inside[:, None], other=0) for ref in (rows.query, rows.d_mixed)
    )
    log_sum_exp, delta = (
        triton.load(ref, mask=inside, other=0) for ref in (rows.log_sum_exp, rows.delta)
    )
    all_keys = mask_ref.shape[1]

    def read(d_query: Array, keys: Array, load_values: Any, tile: tuple[Array, Array]) -> Array:
        _, d_logits = _d_logits(tile, load_values(), d_mixed, log_sum_exp, delta, all_keys)
        return d_query + gpu_tiles.dot(d_logits.astype(keys.dtype), keys, (1, 0))

    d_query = gpu_tiles.fold_keys(
        read, jnp.zeros(query.shape, jnp.float32), query, (first, num_queries), sizes[1],
        parts, mask_ref, tables, bounds,
    )  # fmt: skip
    triton.store(d_query_ref, d_query.astype(d_query_ref.dtype), mask=inside[:, None])


def _key_gradients(
    sizes: Sizes,
    place: tuple[int, int],
    rows: Rows,
    part: Any,
    mask: Array,
    table: Array | None,
    bounds: Array,
) -> KeyValues:
    """Computes the gradients of a part's keys and values.

    Args:
      sizes: Those of tiles.
      place: Number of keys before the part, and of all keys.
      rows: Those of all queries.
      part: Keys and values.
      mask: As of `forward`.
      table: That of the part.
      bounds: `Seen.of_keys` of the part.
    """
    query = rows.query
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
            Rows(query_spec, query_spec, per_head, per_head),
            KeyValues(key_spec, key_spec),  # type: ignore[arg-type]
            pl.BlockSpec((own, *mask.shape[1:]), lambda j, r, h: (pick(r), 0, 0)),
            table_spec,
            pl.BlockSpec((own, None, 2), lambda j, r, h: (pick(r), j, 0)),
        ],
        out_specs=[key_spec, key_spec],
        out_shape=[shape, shape],
        compiler_params=gpu_tiles.compiler_params(query),
        name="attention_backward_keys",
    )(rows, part, mask, table, bounds)
    return KeyValues(d_keys, d_values)


def _key_kernel(
    sizes: Sizes,
    place: tuple[int, int],
    num_keys: int,
    rows: Rows,
    part: Any,
    mask_ref: Ref,
    table_ref: Ref | None,
    bound_ref: Ref,
    d_key_ref: Ref,
    d_value_ref: Ref,
) -> None:
    """Computes the gradients of one tile of keys and values, summed over all that attend to it."""
    per_row, num_queries, group, _ = rows.query.shape
    start = pl.program_id(0) * sizes[1]
    inside = start + jnp.arange(sizes[1]) < num_keys
    keys, values = (
        triton.load(ref, mask=inside[:, None], other=0) for ref in (part.keys, part.values)
    )
    counts = num_queries, num_keys, place[0], mask_ref.shape[1]

    def of_head(number: Any, carry: Any) -> Any:
        row, head = jax.lax.div(number, group), jax.lax.rem(number, group)
        mask_row = row if mask_ref.shape[0] > 1 else gpu_tiles.zero()
        table_of = None if table_ref is None else lambda i: table_ref.at[head, i]

        def step(i: Array, carry: Any) -> Any:
            d_keys, d_values = carry
            first = i * sizes[0]
            here = pl.ds(first, sizes[0])
            present = first + jnp.arange(sizes[0]) < num_queries
            query, d_mixed = (
                triton.load(ref.at[row, here, head], mask=present[:, None], other=0)
                for ref in (rows.query, rows.d_mixed)
            )
            log_sum_exp, delta = (
                gpu_tiles.load_row(ref, first, sizes[0], num_queries, row, head)
                for ref in (rows.log_sum_exp, rows.delta)
            )
            mask_of = lambda index: mask_ref.at[(mask_row, *index)]  # noqa: E731
            tile = gpu_tiles.logits_of(query, keys, mask_of, table_of, (first, start), counts)
            weights, d_logits = _d_logits(tile, values, d_mixed, log_sum_exp, delta, place[1])
            d_values += gpu_tiles.dot(weights.astype(d_mixed.dtype), d_mixed, (0, 0))
            d_keys += gpu_tiles.dot(d_logits.astype(query.dtype), query, (0, 0))
            return d_keys, d_values

        bounds = bound_ref[mask_row, 0], bound_ref[mask_row, 1]
        return jax.lax.fori_loop(*bounds, step, carry)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    count = per_row * group
    carry = zeros, zeros
    carry = (
        of_head(gpu_tiles.zero(), carry)
        if count == 1
        else jax.lax.fori_loop(0, count, of_head, carry)
    )
    for ref, gradient in zip((d_key_ref, d_value_ref), carry, strict=True):
        triton.store(ref, gradient.astype(ref.dtype), mask=inside[:, None])


def _table_gradient(
    place: tuple[int, int],
    rows: Rows,
    part: Any,
    mask: Array,
    table: Array,
    bounds: Array,
) -> Array:
    """Computes the gradient of a part's bias by distance; arguments as of `_key_gradients`.

    Its `bounds` are `Seen.of_diagonals`.

    An instance adds up the logits' gradients of square tiles on one diagonal of a head, `[size,
    size]`, over queries and over the rows of its split.
    """
    query = rows.query
    batch, queries, heads, head_dim = query.shape
    num_rows, keys, kv_heads, _ = part.keys.shape
    group = heads // kv_heads
    size = min(gpu_tiles.fit(gpu_tiles.is_wide(query), queries, keys))
    tiles = pl.cdiv(queries, size), pl.cdiv(keys, size)
    diagonals = sum(tiles) - 1
    splits = next(n for n in range(min(SPLITS, batch), 0, -1) if batch % n == 0)
    share = batch // splits
    query_spec = pl.BlockSpec((share, queries, None, head_dim), lambda d, s, h: (s, 0, h, 0))
    per_head = pl.BlockSpec((share, None, queries), lambda d, s, h: (s, h, 0))
    key_spec = pl.BlockSpec((num_rows, keys, None, head_dim), lambda d, s, h: (0, 0, h // group, 0))
    sums = pl.pallas_call(
        functools.partial(_table_kernel, size, place, batch // num_rows),
        grid=(diagonals, splits, heads),
        in_specs=[
            Rows(query_spec, query_spec, per_head, per_head),
            KeyValues(key_spec, key_spec),  # type: ignore[arg-type]
            pl.BlockSpec(mask.shape, lambda d, s, h: (0, 0, 0)),
            pl.BlockSpec((None, table.shape[1]), lambda d, s, h: (h, 0)),
            pl.BlockSpec((None, 2), lambda d, s, h: (d, 0)),
        ],
        out_specs=pl.BlockSpec((None, None, None, size, size), lambda d, s, h: (s, h, d, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((splits, heads, diagonals, size, size), jnp.float32),
        compiler_params=gpu_tiles.compiler_params(query),
        name="attention_backward_bias",
    )(rows, part, mask, table, gpu_tiles.union(bounds))
    sums = sums.sum(0)

    def expanded(table: Array) -> Array:  # [heads, diagonals, size, size]
        padded = jnp.pad(table, ((0, 0), (tiles[0] * size - queries, tiles[1] * size - keys)))
        windows = [padded[:, d * size : (d + 2) * size - 1] for d in range(diagonals)]
        return gpu_tiles.toeplitz(jnp.stack(windows, 1), size)

    return jax.linear_transpose(expanded, table)(sums)[0]


def _table_kernel(
    size: int,
    place: tuple[int, int],
    per_row: int,
    rows: Rows,
    part: Any,
    mask_ref: Ref,
    table_ref: Ref,
    bound_ref: Ref,
    sum_ref: Ref,
) -> None:
    """Adds up the gradients of logits in the tiles of one diagonal."""
    share, num_queries, _ = rows.query.shape
    num_keys = part.keys.shape[1]
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
            gpu_tiles.load_rows(ref, first, size, num_queries, row)
            for ref in (rows.query, rows.d_mixed)
        )
        keys, values = (
            gpu_tiles.load_rows(ref, start, size, num_keys, jax.lax.div(batch_row, per_row))
            for ref in (part.keys, part.values)
        )
        log_sum_exp, delta = (
            gpu_tiles.load_row(ref, first, size, num_queries, row)
            for ref in (rows.log_sum_exp, rows.delta)
        )
        mask_row = batch_row if mask_ref.shape[0] > 1 else gpu_tiles.zero()
        mask_of = lambda index: mask_ref.at[(mask_row, *index)]  # noqa: E731
        table_of = lambda index: table_ref.at[index]  # noqa: E731
        tile = gpu_tiles.logits_of(query, keys, mask_of, table_of, (first, start), counts)
        return total + _d_logits(tile, values, d_mixed, log_sum_exp, delta, place[1])[1]

    zeros = jnp.zeros((size, size), jnp.float32)
    sum_ref[...] = jax.lax.fori_loop(0, share * (high - low), step, zeros)
