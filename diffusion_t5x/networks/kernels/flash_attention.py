"""Attention with T5's position bias as one TPU kernel that keeps no logits in main memory.

Experimental: it has run only as Pallas interprets it, and compiles ahead of time for TPUs; on a TPU
it has never run.

A kernel instance takes a tile of queries and a tile of keys, all heads of a row. The softmax is
updated from tile to tile in float32, as in FlashAttention (Dao et al. 2022, arXiv 2205.14135). The
bias of a tile depends on distances alone: it is expanded from one table row per head, shifted by
one place for each query.

Heads lie side by side in the last dimension, as the projections leave them. If several share a
register's 128 lanes, each is computed with the lanes of the others set to 0; since a TPU's matrix
units are 128 lanes wide, this costs no more than separate heads.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from diffusion_t5x.networks.kv_cache import KeyValues
from diffusion_t5x.networks.sharding import device_kind, shard_count

Array = jax.Array
Ref: TypeAlias = Any  # An array in a TPU's fast memory, inside the kernel.

LANES = 128  # Width of a register.
QUERIES, KEYS = 256, 512  # Size of a tile.
MASKED, ABSENT = -1e10, -1e30  # Logits of keys that are not seen, and beyond the last key.
VMEM_BYTES = 64 * 2**20


class Partial(NamedTuple):
    """Attention to a part of the keys, which `_merge` combines with other parts.

    Attributes:
      mixed: `[batch, queries, heads * head_dim]`, values weighted by a softmax over these keys.
      top: `[batch, queries, LANES]` float32, the largest logit of head `i` in lane `i`.
      total: `[batch, queries, LANES]` float32, the sum of exp(logit - top) of each head.
    """

    mixed: Array
    top: Array
    total: Array


def supports(query: Array, key_values: Sequence[KeyValues]) -> bool:
    """Returns True if the kernel supports these heads on these devices.

    It needs as many heads of keys as of queries. The heads of a device must fill registers: several
    share 128 lanes, or one takes a multiple of them. TPUs before v5 are not supported, since they
    cannot shift each row of a register by a different number of places.
    """
    _, _, num_heads, head_dim = query.shape
    grouped = key_values[0].keys.shape[2] != num_heads
    if grouped or device_kind().startswith(("TPU v2", "TPU v3", "TPU v4")):
        return False
    heads = num_heads // (shard_count("heads") or 1)
    whole = LANES % head_dim == 0 or head_dim % LANES == 0
    return whole and heads * head_dim % LANES == 0 and heads <= LANES


def forward(
    query: Array,
    key_values: Sequence[KeyValues],
    mask: Array,
    tables: Sequence[Array] | None,
) -> tuple[Array, Array]:
    """Computes softmax attention of `query [batch, queries, heads, head_dim]`.

    Args:
      query: The queries.
      key_values: Parts of the keys and values, in the order of `keys` below. A part has
        `[rows, part_keys, heads, head_dim]`; row `i` serves rows `i * n ... i * n + n - 1` of
        `query`, where `n = batch / rows`.
      mask: `[batch or 1, queries or 1, keys]` bool; keys that are False are not seen.
      tables: For each part the bias by distance, `[heads, queries + part_keys - 1]`, from that of
        the last query and the first key to that of the first query and the last key. None for no
        bias.

    Returns:
      The mixed values, of the shape and type of `query`; and `[batch, heads, queries]` float32, the
      logarithm of each query's sum of exp(logit) over all keys.
    """
    parts, start = [], 0
    for number, part in enumerate(key_values):
        end = start + part.keys.shape[1]
        parts.append(
            _attend(
                query,
                part,
                mask[..., start:end],
                None if tables is None else tables[number],
                jnp.float32 if len(key_values) > 1 else query.dtype,
            )
        )
        start = end
    whole = _merge(parts, query.shape) if len(parts) > 1 else parts[0]
    log_sum_exp = (whole.top + jnp.log(whole.total))[..., : query.shape[2]]
    return whole.mixed.reshape(query.shape).astype(query.dtype), jnp.swapaxes(log_sum_exp, 1, 2)


def _merge(parts: Sequence[Partial], shape: tuple[int, ...]) -> Partial:
    """Combines parts; `mixed` becomes `shape`, which is `[batch, queries, heads, head_dim]`."""
    top = functools.reduce(jnp.maximum, [part.top for part in parts])
    weights = [part.total * jnp.exp(part.top - top) for part in parts]
    total = functools.reduce(jnp.add, weights)
    shares = [(weight / total)[..., : shape[2], None] for weight in weights]  # [b, q, heads, 1]
    mixed = [share * part.mixed.reshape(shape) for share, part in zip(shares, parts, strict=True)]
    return Partial(functools.reduce(jnp.add, mixed), top, total)


def cut_windows(table: Array, keys: int, tiles: tuple[int, int], sizes: tuple[int, int]) -> Array:
    """Cuts out the part of a table that each tile needs: `[query tiles, key tiles, heads, width]`.

    The bias of a tile's first query and first key stands at a multiple of `LANES`, since whole
    registers are moved more easily.

    Args:
      table: `[heads, queries + keys - 1]`.
      keys: Number of keys.
      tiles: Numbers of query tiles and of key tiles.
      sizes: Queries and keys of a tile.
    """
    queries = table.shape[1] + 1 - keys
    first, width = registers(sizes[0]), sum(map(registers, sizes))
    # Distance from each tile's first query to its first key: [query tiles, key tiles].
    distance = jnp.arange(tiles[1]) * sizes[1] - jnp.arange(tiles[0])[:, None] * sizes[0]
    index = distance[..., None] + jnp.arange(width) - first + queries - 1  # [.., .., width]
    index = jnp.clip(index, 0, table.shape[1] - 1)
    return jnp.moveaxis(table.astype(jnp.float32)[:, index], 0, 2)


def registers(size: int) -> int:
    """Rounds up to a multiple of `LANES`."""
    return -(-size // LANES) * LANES


def _attend(
    query: Array,
    part: KeyValues,
    mask: Array,
    table: Array | None,
    dtype: DTypeLike,
) -> Partial:
    """Runs `forward` on one part of the keys; `mixed` has type `dtype`."""
    batch, num_queries, num_heads, head_dim = query.shape
    rows, num_keys = part.keys.shape[:2]
    width = num_heads * head_dim
    # The compiler takes a tile of one key for a matrix-vector product, and fails.
    sizes = min(num_queries, QUERIES), min(num_keys, KEYS) if num_keys > 1 else LANES
    tiles = pl.cdiv(num_queries, sizes[0]), pl.cdiv(num_keys, sizes[1])
    per_row = batch // rows
    arguments = [x.reshape(*x.shape[:2], width) for x in (query, part.keys, part.values)]
    arguments.append(mask.astype(jnp.int8))
    own_rows, own_queries = mask.shape[0] > 1, mask.shape[1] > 1
    query_spec = pl.BlockSpec((1, sizes[0], width), lambda b, i, j: (b, i, 0))
    key_spec = pl.BlockSpec((1, sizes[1], width), lambda b, i, j: (b // per_row, j, 0))
    mask_spec = pl.BlockSpec(
        (1, sizes[0] if own_queries else 1, sizes[1]),
        lambda b, i, j: (b if own_rows else 0, i if own_queries else 0, j),
    )
    specs = [query_spec, key_spec, key_spec, mask_spec]
    bias_bytes = 0
    if table is not None:
        windows = cut_windows(table, num_keys, tiles, sizes)
        bias_bytes = 4 * batch * windows.size
        arguments.append(windows)
        specs.append(pl.BlockSpec((1, 1, *windows.shape[2:]), lambda b, i, j: (i, j, 0, 0)))
    per_head = jax.ShapeDtypeStruct((batch, num_queries, LANES), jnp.float32)
    head_spec = pl.BlockSpec((1, sizes[0], LANES), lambda b, i, j: (b, i, 0))
    results = pl.pallas_call(
        functools.partial(_kernel, head_dim, num_keys, table is not None),
        grid=(batch, *tiles),
        in_specs=specs,
        out_specs=[query_spec, head_spec, head_spec],
        out_shape=[jax.ShapeDtypeStruct(arguments[0].shape, dtype), per_head, per_head],
        scratch_shapes=[pltpu.VMEM((sizes[0], width), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=_cost(arguments[:4], num_heads, tiles, jnp.dtype(dtype).itemsize, bias_bytes),
        name="flash_attention",
    )(*arguments)
    return Partial(*results)


def _cost(
    arguments: Sequence[Array],
    num_heads: int,
    tiles: tuple[int, int],
    result_bytes: int,
    bias_bytes: int,
) -> pl.CostEstimate:
    """Estimates the cost of the two matrix products and of the traffic with main memory.

    Keys and values are read again for each tile of queries, the mask for each row.
    """
    query, keys, _, mask = arguments
    batch, queries, width = query.shape
    pairs = batch * queries * keys.shape[1]
    moved = query.size * (query.dtype.itemsize + result_bytes)
    moved += 2 * batch * tiles[0] * keys.shape[1] * width * keys.dtype.itemsize
    moved += batch * mask.shape[1] * mask.shape[2] * (1 if mask.shape[1] > 1 else tiles[0])
    moved += bias_bytes + 2 * 4 * batch * queries * LANES
    return pl.CostEstimate(
        flops=4 * pairs * width, transcendentals=pairs * num_heads, bytes_accessed=moved
    )


def _kernel(head_dim: int, num_keys: int, has_bias: bool, *refs: Ref) -> None:
    """Processes one tile of queries and one of keys; a row's tiles of keys come in order."""
    query_ref, key_ref, value_ref, mask_ref, *bias_ref, mixed_ref, top_ref, total_ref, sum_ref = (
        refs
    )
    tile, last = pl.program_id(2), pl.num_programs(2) - 1
    num_queries, tile_keys = query_ref.shape[1], key_ref.shape[1]
    shape = num_queries, tile_keys

    @pl.when(tile == 0)
    def _() -> None:
        top_ref[...] = jnp.full_like(top_ref, ABSENT)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    visible = jnp.broadcast_to(mask_ref[0].astype(jnp.int32), shape) != 0
    unseen: float | Array = MASKED
    ragged = num_keys % tile_keys != 0
    if ragged:  # Memory beyond the last key is arbitrary.
        in_range = jax.lax.broadcasted_iota(jnp.int32, shape, 1) < num_keys - tile * tile_keys
        visible &= in_range
        unseen = jnp.where(in_range, MASKED, ABSENT)
    width = max(LANES, head_dim)
    heads = width // head_dim
    lane_head = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1) // head_dim
    head_lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)

    def attend(group: Array, carry: None) -> None:
        lanes = pl.ds(pl.multiple_of(group * width, width), width)
        query, keys, values = (ref[0, :, lanes] for ref in (query_ref, key_ref, value_ref))
        if ragged:
            index = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
            values = jnp.where(index < num_keys - tile * tile_keys, values, 0)
        for number in range(heads):
            head = group * heads + number
            own = lane_head == number  # [1, width]
            logits = dot(jnp.where(own, query, 0), keys, 1)  # [queries, keys]
            if has_bias:
                logits += read_bias(bias_ref[0], head, shape)
            logits = jnp.where(visible, logits, unseen)
            own_lane = head_lane == head  # [1, LANES]
            before = _only(own_lane, top_ref[0])  # [queries, 1]
            top = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
            weights = jnp.exp(logits - top)
            scale = jnp.exp(before - top)
            total = _only(own_lane, total_ref[0]) * scale + jnp.sum(weights, axis=1, keepdims=True)
            mixed = sum_ref[:, lanes] * scale + dot(weights.astype(values.dtype), values, 0)
            sum_ref[:, lanes] = jnp.where(own, mixed, sum_ref[:, lanes])
            top_ref[0] = jnp.where(own_lane, top, top_ref[0])
            total_ref[0] = jnp.where(own_lane, total, total_ref[0])

            @pl.when(tile == last)
            def _(own: Array = own, mixed: Array = mixed, total: Array = total) -> None:
                result = (mixed / total).astype(mixed_ref.dtype)
                mixed_ref[0, :, lanes] = jnp.where(own, result, mixed_ref[0, :, lanes])

        return carry

    jax.lax.fori_loop(0, query_ref.shape[2] // width, attend, None)


def dot(left: Array, right: Array, axis: int) -> Array:
    """Multiplies over `left`'s last axis and `right`'s `axis`, in float32."""
    dimensions = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _only(own_lane: Array, values: Array) -> Array:
    """Picks one head's lane of `values [queries, LANES]`: `[queries, 1]`."""
    return jnp.sum(jnp.where(own_lane, values, 0), axis=1, keepdims=True)


def read_bias(window_ref: Ref, head: Array, shape: tuple[int, int]) -> Array:
    """Expands one head's window to the bias of a tile, `shape`: each row is shifted by one more."""
    window = window_ref[0, 0, pl.ds(head, 1), :]  # [1, width]
    width = window.shape[1]
    rows = jnp.broadcast_to(window, (shape[0], width))
    # The bias of the first query begins at `registers(queries)`.
    shift = width - registers(shape[0])
    return pltpu.roll(rows, shift, 1, stride=1, stride_axis=0)[:, : shape[1]]
