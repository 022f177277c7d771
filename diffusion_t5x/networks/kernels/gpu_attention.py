"""Attention with T5's position bias as NVIDIA kernels that keep no logits in main memory.

They run through Pallas's Triton backend, forward as in FlashAttention (Dao et al. 2022, arXiv
2205.14135). The bias of a tile is gathered from a row of numbers by distance.

Tiles that no query of theirs sees at the beginning and at the end of a row are skipped, as are half
of them if attention is causal.

cuDNN's attention (`jax.nn.dot_product_attention`) is no substitute: it takes T5's bias and masks
that differ by row only as their sum, `[batch, heads, queries, keys]`, which is as large as the
logits; and it compiles only where cuDNN is installed.
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
from diffusion_t5x.networks.kernels.flash_attention import ABSENT
from diffusion_t5x.networks.kernels.gpu_tiles import Array, Ref, Seen, Sizes, Tables
from diffusion_t5x.networks.kv_cache import KeyValues


def forward(
    query: Array, key_values: Sequence[KeyValues], mask: Array, tables: Tables, seen: Seen
) -> tuple[Array, Array]:
    """Computes softmax attention: arguments and results as of `flash_attention.forward`.

    Heads of keys may be fewer, `[rows, part_keys, kv_heads, head_dim]`. `seen` is `gpu_tiles.see`
    of the mask.
    """
    batch, queries, heads, head_dim = query.shape
    longest = max(part.keys.shape[1] for part in key_values)
    sizes = gpu_tiles.fit(gpu_tiles.is_wide(query), queries, longest)
    tiled = gpu_tiles.row_spec(sizes[0], head_dim)
    return pl.pallas_call(
        functools.partial(_forward_kernel, sizes, queries),
        grid=(pl.cdiv(queries, sizes[0]), batch, heads),
        in_specs=[
            tiled,
            *gpu_tiles.specs(query, key_values, mask, tables),
            gpu_tiles.bound_specs(seen.of_queries),
        ],
        out_specs=[tiled, gpu_tiles.head_spec(sizes[0])],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
        ],
        compiler_params=gpu_tiles.compiler_params(query),
        name="attention_forward",
    )(
        query,
        list(key_values),
        mask,
        gpu_tiles.in_float32(tables),
        seen.of_queries,
    )


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

    def read(carry: Any, keys: Array, load_values: Any, tile: tuple[Array, Array]) -> Any:
        del keys
        (mixed, before, total), (logits, _) = carry, tile
        top = jnp.maximum(before, jnp.max(logits, axis=1))
        weights = jnp.exp(logits - top[:, None])
        scale = jnp.exp(before - top)
        total = total * scale + jnp.sum(weights, axis=1)
        values = load_values()
        mixed = mixed * scale[:, None] + gpu_tiles.dot(weights.astype(values.dtype), values, (1, 0))
        return mixed, top, total

    place = first, num_queries
    carry = gpu_tiles.fold_keys(
        read, carry, query, place, sizes[1], parts, mask_ref, tables, bounds
    )
    mixed, top, total = carry
    result = (mixed / total[:, None]).astype(mixed_ref.dtype)
    triton.store(mixed_ref, result, mask=inside[:, None])
    triton.store(log_sum_exp_ref, top + jnp.log(total), mask=inside)
