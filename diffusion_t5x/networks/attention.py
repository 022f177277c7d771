"""Multi-head attention, and T5's relative position bias."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import partitioning as nn_partitioning

from diffusion_t5x.networks.config import TransformerConfig
from diffusion_t5x.networks.kernels import flash_attention, fused_attention
from diffusion_t5x.networks.kernels.gpu_tiles import Seen
from diffusion_t5x.networks.kv_cache import KeyValues
from diffusion_t5x.networks.layers import Dense, Norm, softcap
from diffusion_t5x.networks.rotary import Rotation
from diffusion_t5x.networks.sharding import per_data_shard, shard_count

Array = jax.Array

MASKED = flash_attention.MASKED


def relative_position_bucket(distance: Array, *, num_buckets: int, max_distance: int) -> Array:
    """Computes T5's buckets of relative positions (Raffel et al. 2020, section 2.1).

    Keys after the query get half of the buckets. In either half, half of the buckets hold one
    distance each; the others grow logarithmically up to `max_distance`, beyond which all distances
    share the last.

    Args:
      distance: Key position minus query position, int32 of any shape, which the buckets have, too.
      num_buckets: Number of buckets, both directions together.
      max_distance: Distance at which the last bucket starts.
    """
    num_buckets //= 2
    offset = jnp.where(distance > 0, num_buckets, 0)
    distance = jnp.abs(distance)
    exact = num_buckets // 2
    ratio = np.log(max_distance / exact)
    # The small term keeps exact powers on the upper side of their bucket's border, as in T5.
    growth = jnp.log(distance.astype(jnp.float32) / exact + np.finfo(np.float32).eps) / ratio
    far = exact + (growth * (num_buckets - exact)).astype(jnp.int32)
    return offset + jnp.where(distance < exact, distance, jnp.minimum(far, num_buckets - 1))


class RelativePositionBias(nn.Module):
    """A learned bias per head and distance bucket."""

    config: TransformerConfig
    num_buckets: int  # both directions together

    @nn.compact
    def __call__(self, query_positions: Array, key_positions: Array, batch_size: int) -> Array:
        """Computes the bias of attention logits, `[shards, heads, queries, keys]`.

        All rows share it, since the distance between two tokens of a text is the distance of their
        indices in every row (see `row_layout`); each data-parallel shard has a copy of its own (see
        `sharding.per_data_shard`). Positions are `[queries]` and `[keys]` int32.
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
            key_positions - query_positions[:, None],  # [queries, keys]
            num_buckets=self.num_buckets,
            max_distance=config.relative_max_distance,
        )
        tables = per_data_shard(table, ("heads", "relpos_buckets"), batch_size)
        return tables[:, :, bucket].astype(config.dtype)


class MultiHeadAttention(nn.Module):
    """Attention with the biases, norms and scale of the configuration; T5 has none of them."""

    config: TransformerConfig

    def setup(self) -> None:
        config = self.config
        # Instead of the logits, T5 scales the initial kernel of the query.
        scale = 1.0 / config.head_dim if config.attention_scale is None else 1.0

        def project(heads: int, scale: float = 1.0) -> Dense:
            width, axes = heads * config.head_dim, ("embed", "joined_kv")
            return Dense(config, width, axes, "normal", scale, use_bias=config.qkv_bias)

        self.query = project(config.num_heads, scale)
        self.key = project(config.kv_heads)
        self.value = project(config.kv_heads)
        axes = ("joined_kv", "embed")
        self.out = Dense(config, config.embed_dim, axes, "normal", use_bias=config.out_bias)
        if config.qk_norm:
            self.query_norm = Norm(config, "kv")
            self.key_norm = Norm(config, "kv")

    def _split_heads(self, x: Array, heads: int) -> Array:
        """Reshapes `[batch, length, heads * head_dim]` to `[batch, length, heads, head_dim]`."""
        x = x.reshape(*x.shape[:2], heads, self.config.head_dim)
        # Devices that share a head of keys and values hold it whole.
        axis = None if heads % (shard_count("heads") or 1) else "heads"
        return nn_partitioning.with_sharding_constraint(x, ("batch", "length", axis, "kv"))

    def keys_values(self, x: Array, rotation: Rotation | None) -> KeyValues:
        """Computes the keys and values of `x [batch, length, embed]`; `rotation` turns keys."""
        keys, values = (
            self._split_heads(y, self.config.kv_heads) for y in (self.key(x), self.value(x))
        )
        keys = self.key_norm(keys) if self.config.qk_norm else keys
        return KeyValues(keys if rotation is None else rotation(keys).astype(keys.dtype), values)

    def _queries(self, x: Array, rotation: Rotation | None) -> Array:
        """Computes the queries of `x [batch, length, embed]`, turned, and scaled."""
        config = self.config
        query = self._split_heads(self.query(x), config.num_heads)
        query = self.query_norm(query) if config.qk_norm else query
        query = query if rotation is None else rotation(query)
        if config.attention_scale is not None:
            query = query.astype(jnp.float32) * config.attention_scale
        return query.astype(config.dtype)

    def __call__(
        self,
        x: Array,
        key_values: Sequence[KeyValues],
        mask: Array,
        bias: Array | None = None,
        tables: Sequence[Array] | None = None,
        seen: Seen | None = None,
        rotation: Rotation | None = None,
        *,
        deterministic: bool,
    ) -> Array:
        """Attends from `x [batch, queries, embed]` to keys and values; returns the shape of `x`.

        Args:
          key_values: Keys and values, in the order of `keys` below. Those of prefixes that `n` rows
            of `x` share have `batch / n` rows, and row `i` serves rows `i * n ... i * n + n - 1`.
          mask: Bool, broadcasting to `[batch, queries, keys]`; keys that are False are not seen.
          bias: `[shards, heads, queries, keys]`, added to the attention logits; row `i` uses that
            of shard `i * shards // batch`. None for no bias, and for `tables`.
          tables: For `attention_kernel = 'fused'` the bias by distance instead (see
            `fused_attention.attend`); None for no bias.
          seen: For it, what `fused_attention.see` returns for the mask; None to find that out.
          rotation: Turns the queries; None for no rotary positions.
        """
        config = self.config
        query = self._queries(x, rotation)
        rows = min(part.keys.shape[0] for part in key_values)
        dropout = None
        if config.dropout_rate and not deterministic:
            dropout = Dropout(config.dropout_rate, self.make_rng("dropout"))
        # The mask may have one row for all queries.
        batch_size, queries = query.shape[:2]
        chunks = _num_chunks(rows, config, batch_size, queries, mask.shape[-1])
        cap = config.attention_softcap
        attend = functools.partial(_attend_in_chunks, chunks, rows, dropout, cap=cap)
        if config.attention_kernel == "xla":
            mixed = attend(query, key_values, mask, bias)
        elif dropout is None and cap is None:
            mixed = fused_attention.attend(attend, tables, query, key_values, mask, seen)
        else:
            mixed = attend(query, key_values, mask, fused_attention.expand(tables, query))
        return self.out(mixed.reshape(*mixed.shape[:2], -1))


class Dropout(flax.struct.PyTreeNode):
    """Dropout of attention weights, the same for all queries of a row and head, as in T5X."""

    rate: float = flax.struct.field(pytree_node=False)  # share of weights that are set to 0
    rng: Array  # selects them

    def __call__(self, weights: Array) -> Array:
        """Drops some of `weights [..., queries, keys]` and scales up the others."""
        shape = (*weights.shape[:-2], 1, weights.shape[-1])
        kept = jax.random.bernoulli(self.rng, 1.0 - self.rate, shape)
        return jnp.where(kept, weights / (1.0 - self.rate), 0).astype(weights.dtype)


def _num_chunks(
    rows: int, config: TransformerConfig, batch_size: int, queries: int, keys: int
) -> int:
    """Computes the number of row chunks that bounds the attention logits held at a time.

    Each chunk takes an equal share of the rows of each data-parallel shard, so that no row moves to
    another device; if the number of shards is unknown, rows are not split. Neither are they for a
    single query: its logits are fewer than the elements of the cache, which chunks would copy.
    """
    if queries == 1:
        return 1
    shards = shard_count("batch")
    if shards is None or rows % shards:
        return 1
    shard_rows = rows // shards
    logits = batch_size // shards * config.num_heads * queries * keys
    wanted = -(-logits // config.attention_block_logits)
    return next(
        (n for n in range(1, shard_rows + 1) if shard_rows % n == 0 and n >= wanted), shard_rows
    )


def _attend_in_chunks(
    chunks: int,
    rows: int,
    dropout: Dropout | None,
    query: Array,
    key_values: Sequence[KeyValues],
    mask: Array,
    bias: Array | None,
    cap: float | None = None,
) -> Array:
    """Runs `_attend` over row chunks, one after the other, and recomputes weights for gradients.

    Rows that share keys and values stay together. Chunk `i` of `n` takes rows `i`, `i + n`, ...
    """
    if chunks == 1:
        return _attend(query, key_values, mask, bias, dropout, cap)

    def split(x: Array) -> Array:
        x = x.reshape(rows // chunks, chunks, -1, *x.shape[1:])  # [rows / chunks, chunks, n, ...]
        x = jnp.moveaxis(x, 1, 0)  # [chunks, rows / chunks, n, ...]
        return x.reshape(chunks, -1, *x.shape[3:])  # [chunks, rows * n / chunks, ...]

    def join(x: Array) -> Array:
        x = x.reshape(chunks, rows // chunks, -1, *x.shape[2:])  # [chunks, rows / chunks, n, ...]
        return jnp.moveaxis(x, 0, 1).reshape(query.shape)  # [batch, ...]

    def attend(chunk: tuple[Array, list[KeyValues], Array | None, Array | None]) -> Array:
        query, key_values, own_mask, rng = chunk
        drop = None if dropout is None else dropout.replace(rng=rng)
        return _attend(query, key_values, mask if own_mask is None else own_mask, bias, drop, cap)

    rngs = None if dropout is None else jax.random.split(dropout.rng, chunks)
    own_mask = None if mask.shape[0] < query.shape[0] else split(mask)
    arguments = split(query), jax.tree.map(split, list(key_values)), own_mask, rngs
    return join(jax.lax.map(jax.checkpoint(attend), arguments))


def _attend(
    query: Array,
    key_values: Sequence[KeyValues],
    mask: Array,
    bias: Array | None,
    dropout: Dropout | None,
    cap: float | None = None,
) -> Array:
    """Computes softmax attention of `query [batch, queries, heads, head_dim]`; keeps its shape.

    Rows of `query` that share keys and values are an axis of their own, `n` in `[rows, heads, n,
    queries, keys]`. Heads come before positions, which turns every product into one of matrices.
    Of more heads of queries than of keys, neighbours share keys, as if they were more queries.
    """
    rows = min(part.keys.shape[0] for part in key_values)
    grouped = query.reshape(rows, -1, *query.shape[1:])  # [rows, n, queries, heads, head_dim]
    logits = jnp.concatenate([_dot_keys(grouped, part.keys) for part in key_values], axis=-1)
    if bias is not None:
        logits = _add_bias(logits, bias)
    logits = softcap(logits, cap)
    mask_rows = 1 if mask.shape[0] == 1 else rows
    mask = mask.reshape(mask_rows, 1, -1, *mask.shape[1:])  # [rows or 1, 1, n or 1, queries, keys]
    logits = jnp.where(mask, logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    if dropout is not None:
        weights = dropout(weights)
    ends = np.cumsum([part.keys.shape[1] for part in key_values])
    shares = jnp.split(weights, ends[:-1], axis=-1)
    mixed = [_mix_values(w, part.values) for w, part in zip(shares, key_values, strict=True)]
    return functools.reduce(jnp.add, mixed).reshape(query.shape)


def _add_bias(logits: Array, bias: Array) -> Array:
    """Adds `[shards, heads, queries, keys]` to `[rows, heads, n, queries, keys]`."""
    shards = bias.shape[0]
    grouped = logits.reshape(shards, -1, *logits.shape[1:])  # [shards, rows / shards, heads, ...]
    return (grouped + bias[:, None, :, None]).reshape(logits.shape)


def _dot_keys(query: Array, keys: Array) -> Array:
    """Computes attention logits `[rows, heads, n, queries, keys]` float32.

    The query is `[rows, n, queries, heads, head_dim]`, keys `[rows or rows * n, keys, kv, ...]`.
    """
    rows, n, length, heads, _ = query.shape
    if keys.shape[0] == rows:
        query = jnp.moveaxis(query, 3, 1)  # [rows, heads, n, queries, head_dim]
        query = query.reshape(rows, keys.shape[2], -1, query.shape[-1])  # [rows, kv, ..., head_dim]
        keys = jnp.swapaxes(keys, 1, 2)  # [rows, kv, keys, head_dim]
        logits = jnp.einsum("bhqd,bhkd->bhqk", query, keys, preferred_element_type=jnp.float32)
        return logits.reshape(rows, heads, n, length, -1)
    keys = keys.reshape(rows, n, *keys.shape[1:])  # [rows, n, keys, kv, head_dim]
    query = query.reshape(rows, n, length, keys.shape[3], -1, query.shape[-1])
    logits = jnp.einsum("bnqhgd,bnkhd->bhgnqk", query, keys, preferred_element_type=jnp.float32)
    return logits.reshape(rows, heads, n, length, -1)


def _mix_values(weights: Array, values: Array) -> Array:
    """Computes the weighted sums of values, `[rows, n, queries, heads, head_dim]`.

    Weights are `[rows, heads, n, queries, keys]`, values `[rows or rows * n, keys, kv, ...]`.
    """
    rows, heads, n, length, _ = weights.shape
    if values.shape[0] == rows:
        weights = weights.reshape(rows, values.shape[2], -1, weights.shape[-1])
        values = jnp.swapaxes(values, 1, 2)  # [rows, kv, keys, head_dim]
        mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, values)
        return jnp.moveaxis(mixed.reshape(rows, heads, n, length, -1), 1, 3)
    values = values.reshape(rows, n, *values.shape[1:])  # [rows, n, keys, kv, head_dim]
    weights = weights.reshape(rows, values.shape[3], -1, *weights.shape[2:])
    mixed = jnp.einsum("bhgnqk,bnkhd->bnqhgd", weights, values)
    return mixed.reshape(rows, n, length, heads, -1)
