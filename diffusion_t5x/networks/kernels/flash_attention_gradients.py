"""Gradients of `flash_attention.forward` as one TPU kernel, which keeps no logits either.

Experimental: it has run only as Pallas interprets it, and compiles ahead of time for TPUs; on a TPU
it has never run.

Weights are computed again from the logarithm of their sums, as in FlashAttention (Dao et al. 2022,
arXiv 2205.14135, algorithm 4). A kernel instance takes a tile of keys and a tile of queries, all
heads of a row; logits are `[keys, queries]`, so that what belongs to a query lies along lanes. The
tiles of queries come innermost: gradients of keys and values are summed in fast memory from one to
the next, and those of queries over all tiles of keys, for as many queries as fit: a chunk.

The gradient of a distance's bias is a sum along a diagonal of the logits' gradient. A tile's lower
half of rows is shifted by as many places as it has rows and added to its upper half, until one row
is left.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from diffusion_t5x.networks.kernels import flash_attention
from diffusion_t5x.networks.kernels.flash_attention import LANES, MASKED, VMEM_BYTES, Ref
from diffusion_t5x.networks.kv_cache import KeyValues

Array = jax.Array

SUBLANES = 8  # Height of a register.
QUERIES, KEYS = 256, 512  # Size of a tile; keys are a power of two.
TILE_BYTES, CHUNK_BYTES = 20 * 2**20, 16 * 2**20  # Fast memory for a tile, and a chunk's sums.


class _Tiles(NamedTuple):
    """How one part's queries and keys are split.

    Attributes:
      num_queries: Number of queries.
      num_keys: Number of keys.
      queries: Queries of a tile.
      keys: Keys of a tile.
      chunk: Query tiles of a chunk, which divide `query_tiles`.
    """

    num_queries: int
    num_keys: int
    queries: int
    keys: int
    chunk: int

    @property
    def query_tiles(self) -> int:
        """Number of tiles of queries."""
        return pl.cdiv(self.num_queries, self.queries)

    @property
    def key_tiles(self) -> int:
        """Number of tiles of keys."""
        return pl.cdiv(self.num_keys, self.keys)

    @property
    def chunks(self) -> int:
        """Number of chunks of queries."""
        return self.query_tiles // self.chunk

    @property
    def before(self) -> int:
        """Keys before the last tile."""
        return (self.key_tiles - 1) * self.keys


def _split(num_queries: int, num_keys: int, width: int, itemsize: int) -> _Tiles:
    """Chooses tiles that fit into fast memory for heads of `width` lanes together."""
    # Each is there twice while it is moved: keys, values and their gradients, besides float32 sums;
    # queries, the results' gradients, and their own in float32.
    keys, key_bytes = KEYS, width * (8 * itemsize + 8)
    while keys > LANES and (keys >= 2 * num_keys or keys * key_bytes > TILE_BYTES):
        keys //= 2
    queries = min(QUERIES, flash_attention.registers(num_queries))
    if queries * width * (4 * itemsize + 8) > TILE_BYTES:
        queries = LANES
    count = pl.cdiv(num_queries, queries)
    fits = max(1, CHUNK_BYTES // (4 * width * queries))
    chunk = max(n for n in range(1, min(fits, count) + 1) if count % n == 0)
    return _Tiles(num_queries, num_keys, queries, keys, chunk)


class _Refs(NamedTuple):
    """The arrays that a kernel instance sees."""

    query: Ref
    d_mixed: Ref
    keys: Ref
    values: Ref
    mask: Ref
    log_sum_exp: Ref
    delta: Ref
    window: Ref | None
    d_query: Ref
    d_keys: Ref
    d_values: Ref
    d_table: Ref | None
    query_sum: Ref
    key_sum: Ref
    value_sum: Ref


def backward(
    query: Array,
    key_values: Sequence[KeyValues],
    mask: Array,
    tables: Sequence[Array] | None,
    mixed: Array,
    log_sum_exp: Array,
    d_mixed: Array,
) -> tuple[Array, list[KeyValues], list[Array] | None]:
    """Computes the gradients of `flash_attention.forward` from its arguments and results.

    Args:
      query: As for `forward`, as are `key_values`, `mask` and `tables`.
      key_values: Parts of the keys and values.
      mask: Keys that are seen.
      tables: The bias by distance of each part, or None.
      mixed: The first result of `forward`.
      log_sum_exp: Its second result.
      d_mixed: The gradient of `mixed`.

    Returns:
      The gradients of `query`, `key_values` and `tables`, in shape and type of these; those of
      `tables` are float32.
    """
    product = d_mixed.astype(jnp.float32) * mixed.astype(jnp.float32)
    delta = jnp.swapaxes(jnp.sum(product, axis=-1), 1, 2)  # [batch, heads, queries]
    d_query, d_key_values, d_tables, start = [], [], [], 0
    for number, part in enumerate(key_values):
        end = start + part.keys.shape[1]
        table = None if tables is None else tables[number]
        seen = mask[..., start:end]
        own, d_part, d_table = _backward(
            query, part, seen, table, log_sum_exp, delta, d_mixed, mask.shape[-1]
        )
        d_query.append(own)
        d_key_values.append(d_part)
        d_tables.append(d_table)
        start = end
    d_whole = functools.reduce(jnp.add, d_query).astype(query.dtype)
    return d_whole, d_key_values, None if tables is None else d_tables


def _backward(
    query: Array,
    part: KeyValues,
    mask: Array,
    table: Array | None,
    log_sum_exp: Array,
    delta: Array,
    d_mixed: Array,
    all_keys: int,
) -> tuple[Array, KeyValues, Any]:
    """Runs `backward` on one part of the keys; `all_keys` counts those of all parts."""
    batch, num_queries, num_heads, head_dim = query.shape
    rows, num_keys = part.keys.shape[:2]
    tiles = _split(num_queries, num_keys, num_heads * head_dim, query.dtype.itemsize)

    def as_rows(x: Array) -> Array:
        # The compiler fails on fewer rows in bfloat16 than a register has.
        missing = max(0, SUBLANES - x.shape[1])
        return jnp.pad(x.reshape(*x.shape[:2], -1), ((0, 0), (0, missing), (0, 0)))

    arguments = [as_rows(x) for x in (query, d_mixed, part.keys, part.values)]
    arguments += [mask.astype(jnp.int8), log_sum_exp, delta]
    whole = tiles.chunks * (batch // rows) == 1
    part_sums = jax.ShapeDtypeStruct(
        (tiles.chunks, batch, *arguments[2].shape[1:]), part.keys.dtype if whole else jnp.float32
    )
    dtype = query.dtype if num_keys == all_keys else jnp.float32
    results = [jax.ShapeDtypeStruct(arguments[0].shape, dtype), part_sums, part_sums]
    if table is not None:
        # As in the table from right to left: from the last key and the first query onwards.
        counts, sizes = (tiles.key_tiles, tiles.query_tiles), (tiles.keys, tiles.queries)
        windows = flash_attention.cut_windows(table[:, ::-1], num_queries, counts, sizes)
        arguments.append(windows)
        length = tiles.before + (tiles.query_tiles - 1) * tiles.queries + windows.shape[-1]
        results.append(jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32))
    in_specs, out_specs = _block_specs(tiles, arguments, results)
    sums = [tiles.chunk * tiles.queries, tiles.keys, tiles.keys]
    d_query, d_keys, d_values, *d_table = pl.pallas_call(
        functools.partial(_kernel, head_dim, all_keys, tiles),
        grid=(batch, tiles.chunks, tiles.key_tiles, tiles.chunk),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=results,
        scratch_shapes=[pltpu.VMEM((n, num_heads * head_dim), jnp.float32) for n in sums],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        cost_estimate=_cost(arguments, results, tiles, num_heads),
        name="flash_attention_gradients",
    )(*arguments)

    def summed(x: Array) -> Array:
        if not whole:
            x = jnp.sum(x.reshape(tiles.chunks, rows, -1, *x.shape[2:]), axis=(0, 2))
        return x.reshape(rows, -1, num_heads, head_dim)[:, :num_keys].astype(part.keys.dtype)

    d_query = d_query[:, :num_queries].reshape(query.shape)
    d_part = KeyValues(summed(d_keys), summed(d_values))
    if table is None:
        return d_query, d_part, None
    first = tiles.before + flash_attention.registers(tiles.keys) - num_keys + 1
    by_distance = jnp.sum(d_table[0][..., first : first + table.shape[1]], axis=0)
    return d_query, d_part, by_distance[:, ::-1]


def _block_specs(
    tiles: _Tiles, arguments: Sequence[Array], results: Sequence[jax.ShapeDtypeStruct]
) -> tuple[list[pl.BlockSpec], list[pl.BlockSpec]]:
    """Says which blocks of arguments and results an instance sees.

    The grid is rows, chunks of queries, tiles of keys, and a chunk's tiles of queries.
    """
    query, _, keys, _, mask, log_sum_exp, *_ = arguments
    per_row, num_heads, width = query.shape[0] // keys.shape[0], log_sum_exp.shape[1], keys.shape[2]
    own_rows, own_queries = mask.shape[0] > 1, mask.shape[1] > 1
    last = tiles.key_tiles - 1

    def at(chunk: Any, tile: Any) -> Any:
        return chunk * tiles.chunk + tile

    query_spec = pl.BlockSpec((1, tiles.queries, width), lambda b, c, j, i: (b, at(c, i), 0))
    key_spec = pl.BlockSpec((1, tiles.keys, width), lambda b, c, j, i: (b // per_row, j, 0))
    mask_spec = pl.BlockSpec(
        (1, tiles.queries if own_queries else 1, tiles.keys),
        lambda b, c, j, i: (b if own_rows else 0, at(c, i) if own_queries else 0, j),
    )
    head_spec = pl.BlockSpec((1, num_heads, tiles.queries), lambda b, c, j, i: (b, 0, at(c, i)))
    in_specs = [query_spec, query_spec, key_spec, key_spec, mask_spec, head_spec, head_spec]
    # Until the last tile of keys the block stays at the chunk's first tile, and is not written.
    d_query_spec = pl.BlockSpec(
        (1, tiles.queries, width), lambda b, c, j, i: (b, at(c, jnp.where(j == last, i, 0)), 0)
    )
    d_key_spec = pl.BlockSpec((1, 1, tiles.keys, width), lambda b, c, j, i: (c, b, j, 0))
    out_specs = [d_query_spec, d_key_spec, d_key_spec]
    if len(results) > len(out_specs):
        shape = arguments[-1].shape[2:]
        in_specs.append(pl.BlockSpec((1, 1, *shape), lambda b, c, j, i: (j, at(c, i), 0, 0)))
        out_specs.append(pl.BlockSpec((1, *results[-1].shape[1:]), lambda b, c, j, i: (b, 0, 0)))
    return in_specs, out_specs


def _cost(
    arguments: Sequence[Array],
    results: Sequence[jax.ShapeDtypeStruct],
    tiles: _Tiles,
    num_heads: int,
) -> pl.CostEstimate:
    """Estimates the cost of the five matrix products and of the traffic with main memory.

    Queries are read again for each tile of keys, keys for each chunk, the bias for each row.
    """
    query, d_mixed, keys, values, mask, log_sum_exp, delta, *windows = arguments
    batch, queries, width = query.shape
    pairs = batch * queries * keys.shape[1]
    size = lambda x: x.size * x.dtype.itemsize  # noqa: E731
    moved = sum(map(size, results)) + batch * sum(map(size, windows))
    moved += tiles.key_tiles * sum(map(size, (query, d_mixed, log_sum_exp, delta)))
    moved += tiles.chunks * (batch // keys.shape[0]) * (size(keys) + size(values))
    moved += size(mask) * (batch // mask.shape[0])
    return pl.CostEstimate(
        flops=10 * pairs * width, transcendentals=pairs * num_heads, bytes_accessed=moved
    )


def _kernel(head_dim: int, all_keys: int, tiles: _Tiles, *arrays: Ref) -> None:
    """Processes one tile of keys and one of queries."""
    if len(arrays) < len(_Refs._fields):
        arrays = *arrays[:7], None, *arrays[7:10], None, *arrays[10:]
    refs = _Refs(*arrays)
    chunk, key_tile, in_chunk = (pl.program_id(axis) for axis in (1, 2, 3))
    query_tile = chunk * tiles.chunk + in_chunk
    own_queries = pl.ds(pl.multiple_of(in_chunk * tiles.queries, tiles.queries), tiles.queries)
    _clear(refs, own_queries)
    queries_left = tiles.num_queries - query_tile * tiles.queries
    keys_left = tiles.num_keys - key_tile * tiles.keys
    seen = _read_mask(refs.mask, tiles, queries_left, keys_left)
    width = max(LANES, head_dim)
    heads = width // head_dim
    lane_head = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1) // head_dim
    start = query_tile * tiles.queries - key_tile * tiles.keys + tiles.before

    def differentiate(group: Array, carry: None) -> None:
        lanes = pl.ds(pl.multiple_of(group * width, width), width)
        queries = _present(refs.query[0, :, lanes], queries_left, tiles.num_queries)
        d_mixed = _present(refs.d_mixed[0, :, lanes], queries_left, tiles.num_queries)
        keys = _present(refs.keys[0, :, lanes], keys_left, tiles.num_keys)
        for number in range(heads):
            head = group * heads + number
            own = lane_head == number  # [1, width]
            query, d_own = jnp.where(own, queries, 0), jnp.where(own, d_mixed, 0)
            logits = flash_attention.dot(keys, query, 1)  # [keys, queries]
            if refs.window is not None:
                logits += flash_attention.read_bias(refs.window, head, (tiles.keys, tiles.queries))
            log_sum = refs.log_sum_exp[0, pl.ds(head, 1), :]  # [1, queries]
            # A query that sees nothing mixes all values alike.
            unseen = jnp.where(log_sum < MASKED / 2, -math.log(all_keys), MASKED)
            weights = jnp.exp(jnp.where(seen, logits - log_sum, unseen))
            d_weights = flash_attention.dot(refs.values[0, :, lanes], d_own, 1)
            d_logits = weights * (d_weights - refs.delta[0, pl.ds(head, 1), :])
            d_logits = jnp.where(seen, d_logits, 0)
            cast = d_logits.astype(query.dtype)
            refs.value_sum[:, lanes] += flash_attention.dot(weights.astype(query.dtype), d_own, 0)
            refs.key_sum[:, lanes] += flash_attention.dot(cast, query, 0)
            own_keys = jnp.where(own, keys, 0)
            refs.query_sum[own_queries, lanes] += flash_attention.dot(cast.T, own_keys, 0)
            if refs.d_table is not None:
                by_distance = _sum_diagonals(d_logits)
                columns = pl.ds(pl.multiple_of(start, LANES), by_distance.shape[1])
                refs.d_table[0, pl.ds(head, 1), columns] += by_distance
        return carry

    jax.lax.fori_loop(0, refs.query.shape[2] // width, differentiate, None)

    @pl.when(in_chunk == tiles.chunk - 1)
    def _() -> None:
        refs.d_keys[0, 0] = refs.key_sum[...].astype(refs.d_keys.dtype)
        refs.d_values[0, 0] = refs.value_sum[...].astype(refs.d_values.dtype)

    @pl.when(key_tile == tiles.key_tiles - 1)
    def _() -> None:
        refs.d_query[0] = refs.query_sum[own_queries, :].astype(refs.d_query.dtype)


def _clear(refs: _Refs, own_queries: Any) -> None:
    """Sets the sums to 0 that begin with this instance."""
    chunk, key_tile, in_chunk = (pl.program_id(axis) for axis in (1, 2, 3))

    @pl.when(in_chunk == 0)
    def _() -> None:
        refs.key_sum[...] = jnp.zeros_like(refs.key_sum)
        refs.value_sum[...] = jnp.zeros_like(refs.value_sum)

    @pl.when(key_tile == 0)
    def _() -> None:
        refs.query_sum[own_queries, :] = jnp.zeros(refs.query.shape[1:], jnp.float32)

    d_table = refs.d_table
    if d_table is not None:

        @pl.when((chunk == 0) & (key_tile == 0) & (in_chunk == 0))
        def _() -> None:
            d_table[...] = jnp.zeros_like(d_table)


def _read_mask(mask_ref: Ref, tiles: _Tiles, queries_left: Array, keys_left: Array) -> Array:
    """Returns which of a tile's keys its queries see, `[keys, queries]`; False beyond the last."""
    mask = mask_ref[0].astype(jnp.int32).astype(jnp.float32)
    seen = jnp.broadcast_to(mask, (tiles.queries, tiles.keys)).T != 0
    if tiles.num_queries % tiles.queries:
        seen &= jax.lax.broadcasted_iota(jnp.int32, seen.shape, 1) < queries_left
    if tiles.num_keys % tiles.keys:
        seen &= jax.lax.broadcasted_iota(jnp.int32, seen.shape, 0) < keys_left
    return seen


def _present(rows: Array, left: Array, total: int) -> Array:
    """Sets those of a tile's `rows` to 0 that lie beyond the last: they hold arbitrary memory."""
    if total % rows.shape[0] == 0:
        return rows
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0) < left, rows, 0)


def _sum_diagonals(tile: Array) -> Array:
    """Sums `tile[i, j]` by `j - i`, which is 0 at `registers(rows)`: `[1, width]`.

    Rows are a power of two, columns a multiple of `LANES`.
    """
    before = jnp.zeros((tile.shape[0], flash_attention.registers(tile.shape[0])), tile.dtype)
    tile = jnp.concatenate([before, tile], axis=1)
    while (half := tile.shape[0] // 2) > 0:
        tile = tile[:half] + pltpu.roll(tile[half:], tile.shape[1] - half, 1)
    return tile
