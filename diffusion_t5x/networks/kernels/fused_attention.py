"""Attention by the kernel of the platform, where there is one, with gradients.

Experimental: see `kernels/__init__.py` for what they have run on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from diffusion_t5x.networks.kernels import (
    flash_attention,
    flash_attention_gradients,
    gpu_attention,
    gpu_attention_gradients,
    gpu_tiles,
)
from diffusion_t5x.networks.kernels.gpu_tiles import Seen
from diffusion_t5x.networks.kv_cache import KeyValues
from diffusion_t5x.networks.sharding import device_kind, mesh_axes, shard_count

Array = jax.Array
Attention: TypeAlias = Callable[[Array, Sequence[KeyValues], Array, Array | None], Array]
Tables: TypeAlias = Sequence[Array] | None
by_platform = jax.lax.platform_dependent


def platforms(query: Array, key_values: Sequence[KeyValues]) -> tuple[str, ...]:
    """Returns the platforms, of 'cuda' and 'tpu', on which a kernel supports these shapes.

    Only one of them may be that of the devices, if these are of one of the two. Kernels need more
    than one query, since a single one reads its keys only once anyway, and rows and heads that are
    split evenly among devices. That of TPUs needs v5 or later, as many heads of keys as of queries,
    and heads of a device that fill registers (see `flash_attention.supports`); that of NVIDIA GPUs
    heads that are 16, 32, 64, 128 or 256 wide.
    """
    shards, head_shards = shard_count("batch"), shard_count("heads")
    if query.shape[1] == 1 or shards is None or head_shards is None:
        return ()
    rows = min(part.keys.shape[0] for part in key_values)
    heads = query.shape[2], key_values[0].keys.shape[2]
    if rows % shards or any(count % head_shards for count in heads):
        return ()
    kind = device_kind()
    found = []
    if not kind.startswith("TPU") and gpu_tiles.supports(query):
        found.append("cuda")
    if not kind.startswith("NVIDIA") and flash_attention.supports(query, key_values):
        found.append("tpu")
    return tuple(found)


def see(query: Any, mask: Array, keys: Sequence[int]) -> Seen | None:
    """Finds out once for several layers what a kernel has to know of their mask; None for nothing.

    Args:
      query: Anything of the shape and type of the queries.
      mask: As of `attend`.
      keys: Number of keys of each part.
    """
    kind = device_kind()
    if kind.startswith("TPU") or query.shape[1] == 1 or not gpu_tiles.supports(query):
        return None
    return gpu_tiles.see(mask, query.shape[1], keys, gpu_tiles.is_wide(query))


def expand(tables: Tables, query: Array) -> Array | None:
    """Expands tables (see `attend`) to the bias `[shards, heads, queries, keys]`."""
    if tables is None:
        return None
    parts = [gpu_tiles.toeplitz(x.astype(query.dtype), query.shape[1]) for x in tables]
    return jnp.concatenate(parts, axis=-1)


def attend(
    otherwise: Attention,
    tables: Tables,
    query: Array,
    key_values: Sequence[KeyValues],
    mask: Array,
    seen: Seen | None,
) -> Array:
    """Runs a kernel where there is one, else `otherwise` with the bias that `tables` stand for.

    The forward pass keeps its result and the log-sum-exp of the logits for the backward pass.

    Args:
      otherwise: Attention by XLA of query, key_values, mask and bias.
      tables: For each part of the keys the bias by distance, `[shards, heads, queries + part_keys -
        1]`, from that of the last query and the first key to that of the first query and the last
        key; shards as in `sharding.per_data_shard`. None for no bias.
      query: `[batch, queries, heads, head_dim]`, the shape of the result.
      key_values: Parts of the keys and values, `[rows, part_keys, kv_heads, head_dim]`.
      mask: `[batch or 1, queries or 1, keys]` bool; keys that are False are not seen.
      seen: What `see` returns for the mask; None to find that out.
    """

    def by_xla(query: Array, key_values: Any, mask: Array, tables: Any) -> Array:
        return otherwise(query, key_values, mask, expand(tables, query))

    supported = platforms(query, key_values)
    if not supported:
        return by_xla(query, key_values, mask, tables)

    if seen is None:
        seen = see(query, mask, [part.keys.shape[1] for part in key_values])

    def by_xla_forward(query: Array, *others: Any) -> tuple[Array, Array]:
        batch, queries, heads, _ = query.shape
        return by_xla(query, *others[:-1]), jnp.zeros((batch, heads, queries), jnp.float32)

    def by_xla_backward(
        query: Array, key_values: Any, mask: Array, tables: Any, seen: Any, *kept: Any
    ) -> Any:
        del seen
        _, pull = jax.vjp(lambda q, k, t: by_xla(q, k, mask, t), query, key_values, tables)
        return pull(kept[-1])

    forwards: dict[str, Any] = {}
    backwards: dict[str, Any] = {}
    if "cuda" in supported:
        forwards["cuda"] = _on_each_device(gpu_attention.forward)
        backwards["cuda"] = _on_each_device(gpu_attention_gradients.backward)
    if "tpu" in supported:
        forwards["tpu"] = _on_each_device(_unseen(flash_attention.forward))
        backwards["tpu"] = _on_each_device(_unseen(flash_attention_gradients.backward))

    @jax.custom_vjp
    def attend(*arguments: Any) -> Array:
        return by_platform(*arguments, **forwards, default=by_xla_forward)[0]

    def forward(*arguments: Any) -> tuple[Array, Any]:
        results = by_platform(*arguments, **forwards, default=by_xla_forward)
        return results[0], (*arguments, *results)

    def backward(kept: Any, d_mixed: Array) -> tuple[Any, ...]:
        arguments = *kept, d_mixed
        d_query, d_key_values, d_tables = by_platform(
            *arguments, **backwards, default=by_xla_backward
        )
        return d_query, d_key_values, None, d_tables, None

    attend.defvjp(forward, backward)
    return attend(query, list(key_values), mask, tables if tables is None else list(tables), seen)


def _on_each_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a forward or a backward pass on each device's rows and heads.

    It gets and returns tables without the axis of shards, `[heads, queries + part_keys - 1]`.
    """

    def run(
        query: Array, key_values: Any, mask: Array, tables: Any, seen: Any, *kept: Array
    ) -> Any:
        own = jax.tree.map(lambda table: table[0], tables)
        results = kernel(query, key_values, mask, own, seen, *kept)
        if not kept:
            return results
        d_query, d_key_values, d_tables = results
        return d_query, d_key_values, jax.tree.map(lambda table: table[None], d_tables)

    def mapped(
        query: Array, key_values: Any, mask: Array, tables: Any, seen: Any, *kept: Array
    ) -> Any:
        arguments = query, key_values, mask, tables, seen, *kept
        if jax.sharding.get_abstract_mesh().size <= 1:
            return run(*arguments)
        batch, heads = mesh_axes("batch"), mesh_axes("heads")
        row, per_head = PartitionSpec(batch, None, heads), PartitionSpec(batch, heads)
        parts = jax.tree.map(lambda _: row, key_values)
        table_specs = jax.tree.map(lambda _: per_head, tables)
        mask_spec = PartitionSpec(batch if len(mask) > 1 else None)
        seen_specs = jax.tree.map(lambda _: mask_spec, seen)
        in_specs = row, parts, mask_spec, table_specs, seen_specs
        return jax.shard_map(
            run,
            in_specs=(*in_specs, *((row, per_head, row) if kept else ())),
            out_specs=(row, parts, table_specs) if kept else (row, per_head),
            check_vma=False,
        )(*arguments)

    return mapped


def _unseen(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Drops the argument that only one platform's kernels read."""
    return lambda query, key_values, mask, tables, seen, *kept: kernel(
        query, key_values, mask, tables, *kept
    )
