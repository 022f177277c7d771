"""Stacks of transformer layers, with self-attention, cross-attention and a key-value cache."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import partitioning as nn_partitioning

from diffusion_t5x.networks.attention import MultiHeadAttention, RelativePositionBias
from diffusion_t5x.networks.config import REMAT_POLICIES, TransformerConfig
from diffusion_t5x.networks.kernels import fused_attention
from diffusion_t5x.networks.kernels.gpu_tiles import Seen
from diffusion_t5x.networks.kv_cache import KeyValues, KVCache, PerLayer
from diffusion_t5x.networks.layers import HIDDEN_AXES, GatedMlp, Norm
from diffusion_t5x.networks.rotary import frequencies, rotation

Array = jax.Array


class Attended(flax.struct.PyTreeNode):
    """What all layers of a stack attend to in one call, besides their input and a cache."""

    mask: Array  # [batch or 1, queries, keys] bool, of self-attention; cached keys come first
    query_positions: Array  # [queries] int32
    key_positions: Array  # [keys] int32
    # Scalar int32, where in the cache this call's keys and values are written; None to append them
    # for this call only.
    index: Array | None = None
    # [batch, encoder_length, embed], the encoder's output; None if the cache holds its keys and
    # values, or without cross-attention.
    encoded: Array | None = None
    encoded_mask: Array | None = None  # [batch, 1 or queries, encoder_length] bool, likewise
    # The position bias that all layers share, `[shards, heads, queries, keys]` or by distance (see
    # `_position_bias`); None if each layer has its own, or there is none. The stack fills them in.
    bias: Array | None = None
    tables: list[Array] | None = None
    seen: Seen | None = None  # what `fused_attention.see` finds in `mask`, if all layers share that


class LayerKind(flax.struct.PyTreeNode):
    """In what layers differ besides their parameters; with a leading `layers` axis, of all."""

    number: Array | np.ndarray  # scalar int32, from 0 on
    frequencies: Array | np.ndarray | None  # [head_dim / 2] float32, of rotary positions
    window: Array | np.ndarray | None  # scalar int32; keys as far or farther are not seen


def layer_kinds(config: TransformerConfig, num_layers: int) -> LayerKind:
    """Returns the kinds of layers that `sliding_window` and `sliding_period` make of a stack."""
    period = config.sliding_period or num_layers + 1
    sliding = [(number + 1) % period != 0 for number in range(num_layers)]
    turned = window = None
    if config.positions == "rotary":
        turned = np.stack([frequencies(config, sliding=x) for x in sliding])
    if config.sliding_window is not None:
        window = np.where(sliding, config.sliding_window, np.iinfo(np.int32).max).astype(np.int32)
    return LayerKind(np.arange(num_layers, dtype=np.int32), turned, window)


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention if there is an encoder, and feed-forward, pre-norm."""

    config: TransformerConfig
    num_buckets: int
    deterministic: bool
    keep_key_values: bool  # return the keys and values that were attended to

    @nn.compact
    def __call__(
        self,
        x: Array,
        cached: KeyValues | None,
        encoded: KeyValues | None,
        kind: LayerKind,
        attended: Attended,
    ) -> tuple[Array, tuple[KeyValues | None, KeyValues | None]]:
        """Applies the layer to `x [batch, length, embed]`.

        Args:
          cached: Cached keys and values of earlier tokens, to attend to; None for `x` alone.
          encoded: Cached keys and values of the encoder's output; None to compute them.
          kind: Which keys this layer sees, and how it turns them.

        Returns:
          Hidden states of the shape of `x`; and if they are kept, the keys and values with those of
          `x` among them, and those of the encoder's output.
        """
        config, deterministic = self.config, self.deterministic
        dropout = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))
        queries, keys = attended.query_positions, attended.key_positions
        turn = None if kind.frequencies is None else rotation(queries, kind.frequencies)
        mask = attended.mask
        if kind.window is not None:
            mask = mask & (jnp.abs(queries[:, None] - keys) < kind.window)
        attention = MultiHeadAttention(config, name="self_attention")
        y = Norm(config, name="pre_self_attention_layer_norm")(x)
        new = attention.keys_values(y, turn)
        key_values, kept = _write(new, cached, attended.index, kind.number)
        bias, tables = attended.bias, attended.tables
        if config.relative_bias_per_layer:
            bias_of = RelativePositionBias(config, self.num_buckets, name="relpos_bias")
            bias, tables = _position_bias(bias_of, attended, x.shape[0])
        biases = bias, tables, attended.seen
        y = attention(y, key_values, mask, *biases, turn, deterministic=deterministic)
        if config.post_norms:
            y = Norm(config, name="post_self_attention_layer_norm")(y)
        x = x + dropout(y, deterministic=deterministic)
        if attended.encoded_mask is not None:
            cross = MultiHeadAttention(config, name="encoder_decoder_attention")
            y = Norm(config, name="pre_cross_attention_layer_norm")(x)
            if encoded is None:
                assert attended.encoded is not None
                encoded = cross.keys_values(attended.encoded, None)
            y = cross(y, [encoded], attended.encoded_mask, deterministic=deterministic)
            x = x + dropout(y, deterministic=deterministic)
        y = Norm(config, name="pre_mlp_layer_norm")(x)
        y = GatedMlp(config, name="mlp")(y, deterministic)
        if config.post_norms:
            y = Norm(config, name="post_mlp_layer_norm")(y)
        x = x + dropout(y, deterministic=deterministic)
        x = nn_partitioning.with_sharding_constraint(x, HIDDEN_AXES)
        return x, (kept, encoded) if self.keep_key_values else (None, None)


def _write(
    new: KeyValues, cached: KeyValues | None, index: Array | None, number: Array | np.ndarray
) -> tuple[list[KeyValues], KeyValues]:
    """Returns the keys and values to attend to, and those to keep (see `Attended`).

    What is written into may be the cache of all layers, with a leading `layers` axis, of which this
    is layer `number`: it is kept whole, so that a loop over layers updates it in place.
    """
    if index is None:
        return ([new] if cached is None else [cached, new]), new

    def write(old: Array, x: Array) -> Array:
        zeros = [0] * (x.ndim - 2)
        if old.ndim == x.ndim:
            return jax.lax.dynamic_update_slice(old, x, (0, index, *zeros))
        return jax.lax.dynamic_update_slice(old, x[None], (number, 0, index, *zeros))

    kept = jax.tree.map(write, cached, new)
    if kept.keys.ndim == new.keys.ndim:
        return [kept], kept
    return [jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, 0, False), kept)], kept


def _position_bias(
    bias_of: RelativePositionBias, attended: Attended, batch_size: int
) -> tuple[Array | None, list[Array] | None]:
    """Computes the position bias, or the tables that `fused_attention` takes in its place.

    Returns:
      The bias `[shards, heads, queries, keys]`, or None; and None, or one table `[shards, heads,
      queries + keys - 1]` for cached keys, unless this call writes into the cache, and one for the
      call's own keys.
    """
    queries, keys = attended.query_positions, attended.key_positions
    if bias_of.config.attention_kernel == "xla":
        return bias_of(queries, keys, batch_size), None
    tables, start = [], 0
    for count in _part_lengths(attended):
        # From the last query and the first key to the first query and the last key.
        distances = jnp.arange(count + len(queries) - 1)
        table = bias_of(queries[-1:], keys[start] + distances, batch_size)[:, :, 0]
        tables.append(table.astype(jnp.float32))  # in which gradients of layers are added up
        start += count
    return None, tables


def _part_lengths(attended: Attended) -> list[int]:
    """Returns the number of cached keys, if they are apart from the call's own, and of those."""
    queries, keys = len(attended.query_positions), len(attended.key_positions)
    return [keys] if attended.index is not None or keys == queries else [keys - queries, queries]


class Stack(nn.Module):
    """Transformer layers, the position bias that they may share, and a final norm."""

    config: TransformerConfig
    num_layers: int
    num_buckets: int

    @nn.compact
    def __call__(
        self,
        x: Array,
        attended: Attended,
        *,
        deterministic: bool,
        cache: KVCache | None = None,
        keep_key_values: bool = False,
    ) -> tuple[Array, PerLayer, PerLayer]:
        """Applies all layers to `x [batch, length, embed]`, which attend to `cache` as well.

        Returns:
          Hidden states of the shape of `x`; and if they are kept, the keys and values of each layer
          with those of `x` among them, and those of the encoder's output.
        """
        config = self.config
        if config.positions == "relative_bias" and not config.relative_bias_per_layer:
            bias_of = RelativePositionBias(config, self.num_buckets, name="relpos_bias")
            bias, tables = _position_bias(bias_of, attended, x.shape[0])
            attended = attended.replace(bias=bias, tables=tables)
        if config.attention_kernel == "fused" and config.sliding_window is None:
            shape = (*x.shape[:2], config.num_heads, config.head_dim)
            query = jax.ShapeDtypeStruct(shape, config.dtype)
            found = fused_attention.see(query, attended.mask, _part_lengths(attended))
            attended = attended.replace(seen=found)
        layer = TransformerLayer
        if config.remat != "none":
            layer = nn_partitioning.remat(
                layer, policy=REMAT_POLICIES[config.remat], prevent_cse=not config.scan_layers
            )
        make = functools.partial(
            layer,
            config=config,
            num_buckets=self.num_buckets,
            deterministic=deterministic,
            keep_key_values=keep_key_values,
        )
        kinds = layer_kinds(config, self.num_layers)
        past = (None, None) if cache is None else (cache.key_values, cache.encoded)
        if config.scan_layers:
            # What layers write into is carried on, and updated in place; else each gets its own.
            written = None
            if attended.index is not None:
                written, past = past[0], (None, past[1])

            def apply(layer: nn.Module, carry: Any, past: Any, kind: Any, attended: Any) -> Any:
                (x, written), (own, encoded) = carry, past
                writes = written is not None
                x, (kept, encoded) = layer(x, written if writes else own, encoded, kind, attended)
                return (x, kept if writes else None), (None if writes else kept, encoded)

            scanned = nn_partitioning.scan_with_axes(
                apply,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, 0, nn.broadcast),
                length=self.num_layers,
                axis_name="layers",
            )
            (x, written), (key_values, encoded) = scanned(
                make(name="layers"), (x, written), past, kinds, attended
            )
            key_values = key_values if written is None else written
        else:
            kept = []
            for number in range(self.num_layers):
                own, own_encoded = (
                    part[number] if isinstance(part, list) else None for part in past
                )
                kind = jax.tree.map(lambda of_layers, n=number: of_layers[n], kinds)
                layer_of = make(name=f"layers_{number}")
                x, new = layer_of(x, own, own_encoded, kind, attended)
                kept.append(new)
            key_values, encoded = map(list, zip(*kept, strict=True))
        x = Norm(config, name="final_layer_norm")(x)
        x = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))(x, deterministic)
        return x, key_values, encoded
