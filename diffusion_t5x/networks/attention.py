"""Attention: relative position bias, key-value cache, multi-head attention."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import partitioning as nn_partitioning

from diffusion_t5x.networks.config import TransformerConfig
from diffusion_t5x.networks.kernels import flash_attention
from diffusion_t5x.networks.sharding import per_data_shard, shard_count

Array = jax.Array

MASKED = flash_attention.MASKED


def relative_position_bucket(distance: Array, *, num_buckets: int, max_distance: int) -> Array:
    """T5's bucket of a relative position (Raffel et al. 2020, section 2.1).

    Keys after the query get half of the buckets. In either half, half of the buckets hold one
    distance each, the others grow logarithmically up to `max_distance`, beyond which all share
    the last.

    Args:
      distance: key position minus query position, any shape.
      num_buckets: buckets in all.
      max_distance: where the last bucket starts.
    """
    num_buckets //= 2
    offset = jnp.where(distance > 0, num_buckets, 0)
    distance = jnp.abs(distance)
    exact = num_buckets // 2
    ratio = np.log(max_distance / exact)
    # The small term keeps exact powers on the upper side of their bucket's border, as T5 has it.
    growth = jnp.log(distance.astype(jnp.float32) / exact + np.finfo(np.float32).eps) / ratio
    far = exact + (growth * (num_buckets - exact)).astype(jnp.int32)
    return offset + jnp.where(distance < exact, distance, jnp.minimum(far, num_buckets - 1))


class RelativePositionBias(nn.Module):
    """A learned bias per head and distance bucket.

    Attributes:
      config: the network's configuration.
      num_buckets: buckets of distances, both directions together.
    """

    config: TransformerConfig
    num_buckets: int

    @nn.compact
    def __call__(self, query_positions: Array, key_positions: Array, batch_size: int) -> Array:
        """Positions of queries and `[keys]` of keys, int32 -> bias `[parts, heads, queries, keys]`.

        Positions are shared by the whole batch: rows are laid out so that the distance between
        two tokens of a text is the distance of their indices (see `layout.py`). Each data-parallel
        part of the `batch_size` rows has the bias to itself (see `sharding.per_data_shard`). Where each row
        has queries of its own, `[batch, queries]`, so has the bias: `[batch, heads, ...]`.
        """
        config = self.config
        table = nn_partitioning.param_with_axes(
            "rel_embedding",
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            (config.num_heads, self.num_buckets),
            jnp.float32,
            axes=("heads", "relpos_buckets"),
        )
        bucket = relative_position_bucket(
            key_positions - jnp.atleast_2d(query_positions)[..., None],
            num_buckets=self.num_buckets,
            max_distance=config.relative_max_distance,
        )
        if query_positions.ndim == 2:
            return jnp.moveaxis(table[:, bucket], 0, 1).astype(config.dtype)
        tables = per_data_shard(table, ("heads", "relpos_buckets"), batch_size)
        return tables[:, :, bucket[0]].astype(config.dtype)


@flax.struct.dataclass
class LayerCache:
    """Keys and values of one layer, or of all layers with a leading `layers` axis.

    Attributes:
      keys: `[batch, length, heads, head_dim]`.
      values: `[batch, length, heads, head_dim]`.
    """

    keys: Array
    values: Array


class MultiHeadAttention(nn.Module):
    """T5's attention: no biases, no scaling by the head dimension (it is in the initialiser).

    Attributes:
      config: the network's configuration.
    """

    config: TransformerConfig

    def setup(self):
        config = self.config
        self.query = Projection(
            config, config.num_heads, config.head_dim, scale=config.head_dim**-0.5
        )
        self.key = Projection(config, config.num_heads, config.head_dim)
        self.value = Projection(config, config.num_heads, config.head_dim)
        self.out = OutputProjection(config)

    def keys_values(self, x: Array) -> LayerCache:
        """Keys and values of `x [batch, length, embed]`."""
        return LayerCache(self.key(x), self.value(x))

    def __call__(
        self,
        x: Array,
        memories: Sequence[LayerCache],
        mask: Array,
        bias: Array | None,
        tables: Sequence[Array] | None,
        *,
        deterministic: bool,
    ) -> Array:
        """Attends from `x [batch, queries, embed]` to `memories`; returns the shape of `x`.

        Args:
          x: hidden states that ask.
          memories: keys and values, one after the other; those of a prefix that `n` rows of `x`
            share have `batch / n` rows, and row `i` serves rows `i * n ... i * n + n - 1` of `x`.
          mask: bool, broadcasting to `[batch, queries, keys]`; False is not seen. `keys` counts
            those of all memories.
          bias: `[groups, heads, queries, keys]`, added to the attention logits; row `i` has that of
            group `i * groups // batch`.
          tables: the same bias by distance, for each memory (see `flash_attention`); None where
            there is no bias, or rows have positions of their own.
          deterministic: no dropout.
        """
        config = self.config
        query = self.query(x)
        rows = min(memory.keys.shape[0] for memory in memories)
        dropout = None
        if config.dropout_rate and not deterministic:
            dropout = Dropout(config.dropout_rate, self.make_rng("dropout"))
        num_blocks = _num_blocks(rows, config, query.shape[0], mask.shape[-2:])
        attend = functools.partial(_attend_in_blocks, num_blocks, rows, dropout)
        if config.attention_kernel == "fused" and dropout is None:
            attend = functools.partial(flash_attention.attend, attend, tables)
        return self.out(attend(query, memories, mask, bias))


@flax.struct.dataclass
class Dropout:
    """Dropout of attention weights, the same for all queries of a row and head, as T5X has it.

    Attributes:
      rate: share of weights set to 0, static.
      rng: a key.
    """

    rate: float = flax.struct.field(pytree_node=False)
    rng: Array

    def __call__(self, weights: Array) -> Array:
        """`[..., queries, keys]`, the others scaled up."""
        shape = (*weights.shape[:-2], 1, weights.shape[-1])
        kept = jax.random.bernoulli(self.rng, 1.0 - self.rate, shape)
        return jnp.where(kept, weights / (1.0 - self.rate), 0).astype(weights.dtype)


def _num_blocks(
    rows: int, config: TransformerConfig, batch_size: int, query_key: tuple[int, int]
) -> int:
    """Into how many blocks of rows to split, so that few enough attention logits are alive.

    Blocks take an equal share of the rows of each data-parallel part, so that none moves; where it
    cannot be told how many parts there are, rows stay together. So do they where there is one
    query, as its logits are fewer than the numbers of a cache, which blocks would copy.
    """
    if query_key[0] == 1:
        return 1
    parts = shard_count("batch")
    if parts is None or rows % parts:
        return 1
    of_part = rows // parts
    logits = batch_size // parts * config.num_heads * query_key[0] * query_key[1]
    wanted = -(-logits // config.attention_block_logits)
    return next((n for n in range(1, of_part + 1) if of_part % n == 0 and n >= wanted), of_part)


def _attend_in_blocks(
    num_blocks: int,
    rows: int,
    dropout: Dropout | None,
    query: Array,
    memories: Sequence[LayerCache],
    mask: Array,
    bias: Array | None,
) -> Array:
    """`_attend`, one block of `rows` after the other, their weights computed again for gradients.

    Rows that share a memory stay together. Block `i` of `n` takes rows `i`, `i + n`, ...
    """
    if num_blocks == 1:
        return _attend(query, memories, mask, bias, dropout)

    def split(x: Array) -> Array:
        x = x.reshape(rows // num_blocks, num_blocks, -1, *x.shape[1:])
        x = jnp.moveaxis(x, 1, 0)
        return x.reshape(num_blocks, -1, *x.shape[3:])

    def join(x: Array) -> Array:
        x = x.reshape(num_blocks, rows // num_blocks, -1, *x.shape[2:])
        return jnp.moveaxis(x, 0, 1).reshape(query.shape)

    def split_own(x: Array | None) -> Array | None:
        return None if x is None or x.shape[0] < query.shape[0] else split(x)

    rngs = None if dropout is None else jax.random.split(dropout.rng, num_blocks)

    def attend(block: tuple[Any, ...]) -> Array:
        query, memories, own_mask, own_bias, rng = block
        drop = None if dropout is None else dropout.replace(rng=rng)
        its_mask = mask if own_mask is None else own_mask
        return _attend(query, memories, its_mask, bias if own_bias is None else own_bias, drop)

    memories = jax.tree.map(split, list(memories))
    blocks = split(query), memories, split_own(mask), split_own(bias), rngs
    return join(jax.lax.map(jax.checkpoint(attend), blocks))


def _attend(
    query: Array,
    memories: Sequence[LayerCache],
    mask: Array,
    bias: Array | None,
    dropout: Dropout | None,
) -> Array:
    """Softmax attention of `query [batch, queries, heads, head_dim]`; returns its shape.

    Rows of `query` that share a memory are a dimension of their own, `n` in `[rows, heads, n,
    queries, keys]`. Heads come before positions, which makes every product one of matrices.
    """
    rows = min(memory.keys.shape[0] for memory in memories)
    grouped = query.reshape(rows, -1, *query.shape[1:])
    # [rows, heads, n, queries, keys]
    logits = jnp.concatenate([_dot_keys(grouped, m.keys) for m in memories], axis=-1)
    if bias is not None:
        logits = _add_bias(logits, bias)
    mask_rows = 1 if mask.shape[0] == 1 else rows
    mask = mask.reshape(mask_rows, 1, -1, *mask.shape[1:])
    logits = jnp.where(mask, logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    if dropout is not None:
        weights = dropout(weights)
    ends = np.cumsum([m.keys.shape[1] for m in memories])
    parts = jnp.split(weights, ends[:-1], axis=-1)
    mixed = sum(_mix_values(w, m.values) for w, m in zip(parts, memories, strict=True))
    return mixed.reshape(query.shape)


def _add_bias(logits: Array, bias: Array) -> Array:
    """`[rows, heads, n, queries, keys]` plus `[groups, heads, queries, keys]`, `rows * n` rows."""
    rows, _, n, *_ = logits.shape
    groups = bias.shape[0]
    if groups > rows:
        return logits + jnp.moveaxis(bias.reshape(rows, n, *bias.shape[1:]), 1, 2)
    grouped = logits.reshape(groups, rows // groups, *logits.shape[1:])
    return (grouped + bias[:, None, :, None]).reshape(logits.shape)


def _dot_keys(query: Array, keys: Array) -> Array:
    """`[rows, n, queries, heads, head_dim]`, keys of `rows` or `rows * n` rows: `[rows, heads, n,
    queries, keys]` float32."""
    rows, n, length = query.shape[:3]
    if keys.shape[0] == rows:
        query = jnp.moveaxis(query, 3, 1).reshape(rows, query.shape[3], n * length, -1)
        keys = jnp.swapaxes(keys, 1, 2)
        logits = jnp.einsum("bhqd,bhkd->bhqk", query, keys, preferred_element_type=jnp.float32)
        return logits.reshape(*logits.shape[:2], n, length, -1)
    keys = keys.reshape(rows, n, *keys.shape[1:])
    return jnp.einsum("bnqhd,bnkhd->bhnqk", query, keys, preferred_element_type=jnp.float32)


def _mix_values(weights: Array, values: Array) -> Array:
    """`[rows, heads, n, queries, keys]`, values of `rows` or `rows * n` rows: `[rows, n, queries,
    heads, head_dim]`."""
    rows, heads, n, length, _ = weights.shape
    if values.shape[0] == rows:
        weights = weights.reshape(rows, heads, n * length, -1)
        mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, jnp.swapaxes(values, 1, 2))
        return jnp.moveaxis(mixed.reshape(rows, heads, n, length, -1), 1, 3)
    values = values.reshape(rows, n, *values.shape[1:])
    return jnp.einsum("bhnqk,bnkhd->bnqhd", weights, values)


def project(x: Array, kernel: Array) -> Array:
    """`x [batch, length, in]` times `kernel [in, out]`: `[batch, length, out]`.

    As a product of two matrices, of which CPUs compute the gradient twice as fast as of a batch.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


class Projection(nn.Module):
    """`[batch, length, embed] -> [batch, length, heads, head_dim]`.

    Attributes:
      config: the network's configuration.
      heads: number of heads.
      head_dim: width of a head.
      scale: factor on the standard deviation of the initial weights.
    """

    config: TransformerConfig
    heads: int
    head_dim: int
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = nn_partitioning.param_with_axes(
            "kernel",
            nn.initializers.variance_scaling(self.scale**2, "fan_in", "normal"),
            (x.shape[-1], self.heads * self.head_dim),
            jnp.float32,
            axes=("embed", "joined_kv"),
        )
        y = project(x, kernel.astype(self.config.dtype))
        y = y.reshape(*x.shape[:2], self.heads, self.head_dim)
        return nn_partitioning.with_sharding_constraint(y, ("batch", "length", "heads", "kv"))


class OutputProjection(nn.Module):
    """`[batch, length, heads, head_dim] -> [batch, length, embed]`.

    Attributes:
      config: the network's configuration.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(*x.shape[:2], -1)
        kernel = nn_partitioning.param_with_axes(
            "kernel",
            nn.initializers.variance_scaling(1.0, "fan_in", "normal"),
            (x.shape[-1], self.config.embed_dim),
            jnp.float32,
            axes=("joined_kv", "embed"),
        )
        return project(x, kernel.astype(self.config.dtype))


def repeat_rows(tree: Any, repeats: int, batch_axis: int = 0) -> Any:
    """Repeats each row of every array `repeats` times in place; scalars pass through."""
    return jax.tree.map(
        lambda x: jnp.repeat(x, repeats, axis=batch_axis) if jnp.ndim(x) else x, tree
    )
