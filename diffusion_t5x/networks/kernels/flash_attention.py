"""Attention with T5's distance bias as one TPU kernel, which keeps no logits in main memory.

A program takes a block of queries and a block of keys, all heads of a row. The softmax is kept up
to date from block to block, in float32, as by Dao et al. 2022 (arXiv 2205.14135). Where queries
follow one another, the bias of a block depends on distances alone, so it comes from one line of
numbers per head, each row of the block one place further than the one before. The bias of queries
from here and there is read as it is.

Heads lie side by side in the last dimension, as the projections leave them. Where several fit into
a register's 128 lanes, each takes its turn with the lanes of the others set to 0: the units of a
TPU that multiply matrices are as wide, so that this costs no more than heads apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from diffusion_t5x.networks.sharding import device_kind, mesh_axes, shard_count

Array = jax.Array
by_platform = jax.lax.platform_dependent

LANES = 128
QUERIES, KEYS = 256, 512  # of a block
MASKED, ABSENT = -1e10, -1e30
VMEM_BYTES = 64 * 2**20


class Partial(NamedTuple):
    """Attention to some of the keys.

    Attributes:
      mixed: `[batch, queries, heads * head_dim]`, values weighted by a softmax over these keys.
      top: `[batch, queries, LANES]` float32, each head's largest logit in a lane of its own.
      total: the same of the sum of exp(logit - top).
    """

    mixed: Array
    top: Array
    total: Array


def applies(query: Array, memories: Sequence[Any]) -> bool:
    """Whether the kernel takes attention of these shapes.

    There must be more than one query, as a single one is better served by reading its keys once.
    The heads of a device must fill registers: several share 128 lanes, or one takes several times
    as many. Rows and heads must be split evenly among devices. And TPUs before v5 cannot shift each
    row of a register by another number of places.
    """
    if device_kind().startswith(("TPU v2", "TPU v3", "TPU v4")):
        return False
    _, queries, num_heads, head_dim = query.shape
    parts, head_parts = shard_count("batch"), shard_count("heads")
    if queries == 1 or parts is None or head_parts is None:
        return False
    rows = min(memory.keys.shape[0] for memory in memories)
    if rows % parts or num_heads % head_parts:
        return False
    heads = num_heads // head_parts
    whole = LANES % head_dim == 0 or head_dim % LANES == 0
    return whole and heads * head_dim % LANES == 0 and heads <= LANES


def attend(
    otherwise: Callable[..., Array],
    tables: Sequence[Array] | None,
    query: Array,
    memories: Sequence[Any],
    mask: Array,
    bias: Array | None,
) -> Array:
    """`flash_attention` on TPUs, where it applies; else `otherwise(query, memories, mask, bias)`.

    Without `tables` the kernel reads `bias`, in which each row has its own. The gradient is that of
    `otherwise`, computed from its arguments: nothing else is kept for it, and none flows to
    `tables`.
    """
    if not applies(query, memories):
        return otherwise(query, memories, mask, bias)

    def elsewhere(query: Array, memories: Any, mask: Array, bias: Any, tables: Any) -> Array:
        del tables
        return otherwise(query, memories, mask, bias)

    def on_tpu(query: Array, memories: Any, mask: Array, bias: Any, tables: Any) -> Array:
        return _on_each_device(query, memories, mask, tables, bias if tables is None else None)

    @jax.custom_vjp
    def attend(*arguments: Any) -> Array:
        return by_platform(*arguments, tpu=on_tpu, default=elsewhere)

    def forward(*arguments: Any) -> tuple[Array, Any]:
        return attend(*arguments), arguments

    def backward(arguments: Any, cotangent: Array) -> tuple[Any, ...]:
        query, memories, mask, bias, _ = arguments
        recomputed = lambda query, memories, bias: otherwise(query, memories, mask, bias)  # noqa: E731
        _, pull = jax.vjp(recomputed, query, memories, bias)
        d_query, d_memories, d_bias = pull(cotangent)
        return d_query, d_memories, None, d_bias, None

    attend.defvjp(forward, backward)
    return attend(query, list(memories), mask, bias, tables)


def _on_each_device(
    query: Array,
    memories: Sequence[Any],
    mask: Array,
    tables: Sequence[Array] | None,
    bias: Array | None,
) -> Array:
    """`flash_attention` of the rows and heads that each device has."""
    if jax.sharding.get_abstract_mesh().size <= 1:
        return flash_attention(query, memories, mask, tables, bias)
    batch, heads = mesh_axes("batch"), mesh_axes("heads")
    of_rows = PartitionSpec(batch, None, heads, None)
    own_mask = PartitionSpec(batch if mask.shape[0] > 1 else None, None, None)
    specs = (
        of_rows,
        jax.tree.map(lambda _: of_rows, memories),
        own_mask,
        jax.tree.map(lambda _: PartitionSpec(heads, None), tables),
        None if bias is None else PartitionSpec(batch, heads, None, None),
    )
    mapped = jax.shard_map(flash_attention, in_specs=specs, out_specs=of_rows, check_vma=False)
    return mapped(query, memories, mask, tables, bias)


def flash_attention(
    query: Array,
    memories: Sequence[Any],
    mask: Array,
    tables: Sequence[Array] | None,
    bias: Array | None,
) -> Array:
    """Softmax attention of `query [batch, queries, heads, head_dim]`; returns its shape.

    Args:
      query: what asks.
      memories: each with `keys` and `values [rows, keys, heads, head_dim]`, one after the other;
        row `i` serves rows `i * n ... i * n + n - 1` of `query`, `n = batch / rows`.
      mask: bool, `[batch or 1, queries or 1, keys]`, the keys of all memories.
      tables: for each memory the bias by distance, `[heads, queries + keys - 1]`: that of the last
        query and the first key, then ever further to the right, up to that of the first query and
        the last key. None without a bias, or with one that distances alone do not tell.
      bias: that one: `[batch, heads, queries, keys]`, the keys of all memories; None without.
    """
    parts, start = [], 0
    for number, memory in enumerate(memories):
        end = start + memory.keys.shape[1]
        parts.append(
            _attend(
                query,
                memory.keys,
                memory.values,
                mask[..., start:end],
                None if tables is None else tables[number],
                None if bias is None else bias[..., start:end],
                jnp.float32 if len(memories) > 1 else query.dtype,
            )
        )
        start = end
    if len(parts) == 1:
        return parts[0].mixed.reshape(query.shape)
    return _merge(parts, query.shape).astype(query.dtype)


def _merge(parts: Sequence[Partial], shape: tuple[int, ...]) -> Array:
    """Attention to the keys of all parts: `shape`, `[batch, queries, heads, head_dim]`."""
    top = functools.reduce(jnp.maximum, [part.top for part in parts])
    weights = [part.total * jnp.exp(part.top - top) for part in parts]
    total = sum(weights)
    shares = [(weight / total)[..., : shape[2], None] for weight in weights]
    return sum(share * part.mixed.reshape(shape) for share, part in zip(shares, parts, strict=True))


def _windows(table: Array, keys: int, blocks: tuple[int, int], sizes: tuple[int, int]) -> Array:
    """What of a table each pair of blocks needs: `[query blocks, key blocks, heads, numbers]`.

    The bias of a block's first query and first key stands at a multiple of `LANES`, since registers
    are moved as wholes more easily.

    Args:
      table: `[heads, queries + keys - 1]`.
      keys: of the memory.
      blocks: how many blocks of queries and of keys.
      sizes: queries and keys of a block.
    """
    queries = table.shape[1] + 1 - keys
    first, numbers = _registers(sizes[0]), sum(map(_registers, sizes))
    distance = jnp.arange(blocks[1]) * sizes[1] - jnp.arange(blocks[0])[:, None] * sizes[0]
    index = distance[..., None] + jnp.arange(numbers) - first + queries - 1
    index = jnp.clip(index, 0, table.shape[1] - 1)
    return jnp.moveaxis(table.astype(jnp.float32)[:, index], 0, 2)


def _registers(size: int) -> int:
    """The next multiple of `LANES`."""
    return -(-size // LANES) * LANES


def _attend(
    query: Array,
    keys: Array,
    values: Array,
    mask: Array,
    table: Array | None,
    bias: Array | None,
    dtype: Any,
) -> Partial:
    """Attention to one memory; see `flash_attention`. `mixed` is of type `dtype`."""
    batch, num_queries, num_heads, head_dim = query.shape
    rows, num_keys = keys.shape[:2]
    width = num_heads * head_dim
    # A block of one key is what the compiler takes for a product with a vector, and fails.
    sizes = min(num_queries, QUERIES), min(num_keys, KEYS) if num_keys > 1 else LANES
    blocks = pl.cdiv(num_queries, sizes[0]), pl.cdiv(num_keys, sizes[1])
    per_row = batch // rows
    arguments = [x.reshape(*x.shape[:2], width) for x in (query, keys, values)]
    arguments.append(mask.astype(jnp.int8))
    own_rows, own_queries = mask.shape[0] > 1, mask.shape[1] > 1
    of_queries = pl.BlockSpec((1, sizes[0], width), lambda b, i, j: (b, i, 0))
    of_keys = pl.BlockSpec((1, sizes[1], width), lambda b, i, j: (b // per_row, j, 0))
    of_mask = pl.BlockSpec(
        (1, sizes[0] if own_queries else 1, sizes[1]),
        lambda b, i, j: (b if own_rows else 0, i if own_queries else 0, j),
    )
    specs = [of_queries, of_keys, of_keys, of_mask]
    read_bias, bias_bytes = None, 0
    if table is not None:
        windows = _windows(table, num_keys, blocks, sizes)
        read_bias, bias_bytes = _bias_by_distance, 4 * batch * windows.size
        arguments.append(windows)
        specs.append(pl.BlockSpec((1, 1, *windows.shape[2:]), lambda b, i, j: (i, j, 0, 0)))
    elif bias is not None:
        read_bias, bias_bytes = _bias_as_it_is, bias.size * bias.dtype.itemsize
        arguments.append(bias)
        specs.append(pl.BlockSpec((1, num_heads, *sizes), lambda b, i, j: (b, 0, i, j)))
    per_head = jax.ShapeDtypeStruct((batch, num_queries, LANES), jnp.float32)
    of_heads = pl.BlockSpec((1, sizes[0], LANES), lambda b, i, j: (b, i, 0))
    results = pl.pallas_call(
        functools.partial(_kernel, head_dim, num_keys, read_bias),
        grid=(batch, *blocks),
        in_specs=specs,
        out_specs=[of_queries, of_heads, of_heads],
        out_shape=[jax.ShapeDtypeStruct(arguments[0].shape, dtype), per_head, per_head],
        scratch_shapes=[pltpu.VMEM((sizes[0], width), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=_cost(
            arguments[:4], num_heads, blocks, jnp.dtype(dtype).itemsize, bias_bytes
        ),
        name="flash_attention",
    )(*arguments)
    return Partial(*results)


def _cost(
    arguments: Sequence[Array],
    num_heads: int,
    blocks: tuple[int, int],
    result_bytes: int,
    bias_bytes: int,
) -> pl.CostEstimate:
    """Of the two products of matrices, and of what moves to and from main memory.

    Keys and values are read again for each block of queries, the mask for each row.
    """
    query, keys, _, mask = arguments
    batch, queries, width = query.shape
    pairs = batch * queries * keys.shape[1]
    moved = query.size * (query.dtype.itemsize + result_bytes)
    moved += 2 * batch * blocks[0] * keys.shape[1] * width * keys.dtype.itemsize
    moved += batch * mask.shape[1] * mask.shape[2] * (1 if mask.shape[1] > 1 else blocks[0])
    moved += bias_bytes
    moved += 2 * 4 * batch * queries * LANES
    return pl.CostEstimate(
        flops=4 * pairs * width, transcendentals=pairs * num_heads, bytes_accessed=moved
    )


def _kernel(
    head_dim: int, num_keys: int, read_bias: Callable[..., Array] | None, *refs: Any
) -> None:
    """One block of queries and one of keys; the blocks of keys come one after the other."""
    query_ref, key_ref, value_ref, mask_ref, *bias_ref, mixed_ref, top_ref, total_ref, sum_ref = (
        refs
    )
    block, last = pl.program_id(2), pl.num_programs(2) - 1
    num_queries, block_keys = query_ref.shape[1], key_ref.shape[1]
    shape = num_queries, block_keys

    @pl.when(block == 0)
    def _() -> None:
        top_ref[...] = jnp.full_like(top_ref, ABSENT)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    visible = jnp.broadcast_to(mask_ref[0].astype(jnp.int32), shape) != 0
    unseen: Any = MASKED
    ragged = num_keys % block_keys != 0
    if ragged:  # What lies beyond the last key is arbitrary.
        there = jax.lax.broadcasted_iota(jnp.int32, shape, 1) < num_keys - block * block_keys
        visible &= there
        unseen = jnp.where(there, MASKED, ABSENT)
    width = max(LANES, head_dim)
    heads = width // head_dim
    lane_head = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1) // head_dim
    head_lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)

    def attend(group: Array, carry: None) -> None:
        lanes = pl.ds(pl.multiple_of(group * width, width), width)
        query, keys, values = (ref[0, :, lanes] for ref in (query_ref, key_ref, value_ref))
        if ragged:
            index = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
            values = jnp.where(index < num_keys - block * block_keys, values, 0)
        for number in range(heads):
            head = group * heads + number
            own = lane_head == number
            logits = _dot(jnp.where(own, query, 0), keys, 1)
            if read_bias is not None:
                logits += read_bias(bias_ref[0], head, shape)
            logits = jnp.where(visible, logits, unseen)
            of_head = head_lane == head
            before = _only(of_head, top_ref[0])
            top = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
            weights = jnp.exp(logits - top)
            scale = jnp.exp(before - top)
            total = _only(of_head, total_ref[0]) * scale + jnp.sum(weights, axis=1, keepdims=True)
            mixed = sum_ref[:, lanes] * scale + _dot(weights.astype(values.dtype), values, 0)
            sum_ref[:, lanes] = jnp.where(own, mixed, sum_ref[:, lanes])
            top_ref[0] = jnp.where(of_head, top, top_ref[0])
            total_ref[0] = jnp.where(of_head, total, total_ref[0])

            @pl.when(block == last)
            def _(own: Array = own, mixed: Array = mixed, total: Array = total) -> None:
                result = (mixed / total).astype(mixed_ref.dtype)
                mixed_ref[0, :, lanes] = jnp.where(own, result, mixed_ref[0, :, lanes])

        return carry

    jax.lax.fori_loop(0, query_ref.shape[2] // width, attend, None)


def _dot(left: Array, right: Array, axis: int) -> Array:
    """The product over `left`'s last axis and `right`'s `axis`, in float32."""
    dimensions = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _only(of_head: Array, values: Array) -> Array:
    """`values [queries, LANES]` of one head: `[queries, 1]`."""
    return jnp.sum(jnp.where(of_head, values, 0), axis=1, keepdims=True)


def _bias_as_it_is(bias_ref: Any, head: Array, shape: tuple[int, int]) -> Array:
    """The bias of one head, `shape`, of a block `[1, heads, queries, keys]`."""
    return bias_ref[0, pl.ds(head, 1)].reshape(shape).astype(jnp.float32)


def _bias_by_distance(window_ref: Any, head: Array, shape: tuple[int, int]) -> Array:
    """The bias of one head, `shape`: its window, each of the block's rows one place further."""
    window = window_ref[0, 0, pl.ds(head, 1), :]
    numbers = window.shape[1]
    rows = jnp.broadcast_to(window, (shape[0], numbers))
    # The bias of the first query begins at number `_registers(queries)`.
    shift = numbers - _registers(shape[0])
    return pltpu.roll(rows, shift, 1, stride=1, stride_axis=0)[:, : shape[1]]
