"""Layers and stacks of T5 1.1's kind, shared by both architectures."""

from __future__ import annotations

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.linen import partitioning as nn_partitioning

from diffusion_t5x.networks.attention import (
    LayerCache,
    MultiHeadAttention,
    RelativePositionBias,
    project,
)
from diffusion_t5x.networks.config import REMAT_POLICIES, TransformerConfig
from diffusion_t5x.networks.sharding import per_data_shard

Array = jax.Array
HIDDEN_AXES = ("batch", "length", "embed")


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a scale and no bias (Zhang and Sennrich 2019).

    Attributes:
      config: the network's configuration.
      epsilon: added to the mean square.
    """

    config: TransformerConfig
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = nn_partitioning.param_with_axes(
            "scale", nn.initializers.ones, (x.shape[-1],), jnp.float32, axes=("embed",)
        )
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale).astype(self.config.dtype)


class Dense(nn.Module):
    """A linear map without bias, `[batch, length, in] -> [batch, length, features]`.

    Attributes:
      config: the network's configuration.
      features: output width.
      axes: logical axes of the kernel.
    """

    config: TransformerConfig
    features: int
    axes: tuple[str, str]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = nn_partitioning.param_with_axes(
            "kernel",
            nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
            (x.shape[-1], self.features),
            jnp.float32,
            axes=self.axes,
        )
        return project(x, kernel.astype(self.config.dtype))


class GatedMlp(nn.Module):
    """Feed-forward block: the product of the activated input projections, projected back.

    Attributes:
      config: the network's configuration.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        config = self.config
        product = None
        for index, name in enumerate(config.mlp_activations):
            y = Dense(config, config.mlp_dim, ("embed", "mlp"), name=f"wi_{index}")(x)
            y = y if name == "linear" else getattr(jax.nn, name)(y)
            product = y if product is None else product * y
        product = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))(product, deterministic)
        product = nn_partitioning.with_sharding_constraint(product, ("batch", "length", "mlp"))
        return Dense(config, config.embed_dim, ("mlp", "embed"), name="wo")(product)


class TokenEmbedding(nn.Module):
    """Tokens to vectors, and hidden states to logits over the vocabulary.

    Attributes:
      config: the network's configuration.
    """

    config: TransformerConfig

    def setup(self):
        config = self.config
        shape = (config.vocab_size, config.embed_dim)
        self.embedding = nn_partitioning.param_with_axes(
            "embedding", nn.initializers.normal(1.0), shape, jnp.float32, axes=("vocab", "embed")
        )
        if not config.tied_logits:
            self.logits_kernel = nn_partitioning.param_with_axes(
                "logits_kernel",
                nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
                shape[::-1],
                jnp.float32,
                axes=("embed", "vocab"),
            )
        self.dropout = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))

    def __call__(self, tokens: Array, deterministic: bool) -> Array:
        """`tokens [batch, length] -> [batch, length, embed]`."""
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.config.dtype)
        x = self.dropout(x, deterministic=deterministic)
        return nn_partitioning.with_sharding_constraint(x, HIDDEN_AXES)

    def output_weights(self, batch_size: int) -> Array:
        """What `logits` multiplies by, for each data-parallel part of `batch_size` rows.

        Returns:
          `[parts, vocab, embed]` of tied logits, else `[parts, embed, vocab]`.
        """
        if self.config.tied_logits:
            return per_data_shard(self.embedding, ("vocab", "embed"), batch_size)
        return per_data_shard(self.logits_kernel, ("embed", "vocab"), batch_size)

    def logits(self, hidden: Array, weights: Array | None = None) -> Array:
        """`hidden [batch, ..., embed] -> [batch, ..., vocab]`, float32.

        Args:
          hidden: of a stack.
          weights: `output_weights`, for what reads logits more than once.
        """
        if weights is None:
            weights = self.output_weights(hidden.shape[0])
        tied = self.config.tied_logits
        flat = hidden.astype(jnp.float32).reshape(weights.shape[0], -1, hidden.shape[-1])
        if tied:
            flat = flat / jnp.sqrt(self.config.embed_dim)
        logits = jnp.einsum("pne,pve->pnv" if tied else "pne,pev->pnv", flat, weights)
        return logits.reshape(*hidden.shape[:-1], -1)


@flax.struct.dataclass
class Attended:
    """What the layers of one call see besides their input.

    Attributes:
      mask: `[batch or 1, queries, keys]` bool, for self-attention.
      bias: `[groups, heads, queries, keys]`; None where each layer has its own.
      tables: the bias by distance, for each memory (see `flash_attention`); None where it is not.
      positions: of queries `[queries]` or `[batch, queries]`, and of keys `[keys]`, int32.
      encoded: `[batch, encoder_length, embed]`, or None without cross-attention or where the
        cache already holds its keys and values.
      encoded_mask: `[batch, 1, encoder_length]` bool, or None.
      index: where in the cache this call's keys and values go (see `Memory.extended`).
    """

    mask: Array
    bias: Array | None
    tables: list[Array] | None
    positions: tuple[Array, Array]
    encoded: Array | None = None
    encoded_mask: Array | None = None
    index: Array | None = None


@flax.struct.dataclass
class Memory:
    """Keys and values that a layer keeps between calls.

    Attributes:
      own: of the layer's own stack, or None.
      encoded: of the encoder's output, or None.
      canvas: of a canvas of which some positions are read again, or None.
    """

    own: LayerCache | None
    encoded: LayerCache | None = None
    canvas: LayerCache | None = None

    def extended(self, new: LayerCache, index: Array | None) -> list[LayerCache]:
        """What to attend to, where `new` goes to `index`, or follows if that is None.

        The last of it holds `new`. `index` is a scalar for what a cache has room for, or
        `[rows, positions]` of the canvas.
        """
        if self.canvas is not None:
            rows = jnp.arange(index.shape[0])[:, None]
            new = jax.tree.map(lambda kept, x: kept.at[rows, index].set(x), self.canvas, new)
        elif index is not None:
            write = jax.lax.dynamic_update_slice_in_dim
            return [jax.tree.map(lambda kept, x: write(kept, x, index, axis=1), self.own, new)]
        return [new] if self.own is None else [self.own, new]


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention where there is an encoder, and feed-forward, pre-norm.

    Attributes:
      config: the network's configuration.
      num_buckets: of distances.
      cross_attention: whether to attend to an encoder's output.
      deterministic: no dropout.
      keep_memory: return keys and values for a cache.
    """

    config: TransformerConfig
    num_buckets: int
    cross_attention: bool
    deterministic: bool
    keep_memory: bool

    @nn.compact
    def __call__(
        self, x: Array, memory: Memory | None, attended: Attended
    ) -> tuple[Array, Memory | None]:
        """One layer.

        Args:
          x: `[batch, length, embed]`.
          memory: a cache to attend to, which this call's keys and values extend; None to attend
            to `x` alone.
          attended: masks, bias and encoder output.

        Returns:
          Hidden states of `x`'s shape, and the keys and values attended to, if kept.
        """
        config, deterministic = self.config, self.deterministic
        dropout = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))
        attention = MultiHeadAttention(config, name="self_attention")
        y = RMSNorm(config, name="pre_self_attention_layer_norm")(x)
        memories = [attention.keys_values(y)]
        if memory is not None:
            memories = memory.extended(memories[0], attended.index)
        bias, tables = attended.bias, attended.tables
        if bias is None:
            of_distance = RelativePositionBias(config, self.num_buckets, name="relpos_bias")
            bias, tables = _position_bias(
                of_distance, *attended.positions, attended.index, x.shape[0]
            )
        y = attention(y, memories, attended.mask, bias, tables, deterministic=deterministic)
        x = x + dropout(y, deterministic=deterministic)
        encoded = None
        if self.cross_attention:
            cross = MultiHeadAttention(config, name="encoder_decoder_attention")
            y = RMSNorm(config, name="pre_cross_attention_layer_norm")(x)
            encoded = memory.encoded if memory else cross.keys_values(attended.encoded)
            y = cross(y, [encoded], attended.encoded_mask, None, None, deterministic=deterministic)
            x = x + dropout(y, deterministic=deterministic)
        y = RMSNorm(config, name="pre_mlp_layer_norm")(x)
        y = GatedMlp(config, name="mlp")(y, deterministic)
        x = x + dropout(y, deterministic=deterministic)
        x = nn_partitioning.with_sharding_constraint(x, HIDDEN_AXES)
        return x, Memory(memories[-1], encoded) if self.keep_memory else None


def _position_bias(
    bias: RelativePositionBias, queries: Array, keys: Array, index: Array | None, batch_size: int
) -> tuple[Array, list[Array] | None]:
    """The bias `[groups, heads, queries, keys]`, and what `flash_attention` needs of it.

    That are tables for each memory, `[heads, queries + keys - 1]`: keys that are cached, unless
    this call writes into them, and those of the call itself. None where rows have positions of
    their own.
    """
    dense = bias(queries, keys, batch_size)
    if bias.config.attention_kernel == "xla" or queries.ndim > 1:
        return dense, None
    cached = 0 if index is not None else len(keys) - len(queries)
    tables = []
    for start, end in ((0, cached), (cached, len(keys))):
        if start < end:
            distances = jnp.arange(end - start + len(queries) - 1)
            tables.append(bias(queries[-1:], keys[start] + distances, 1)[0, :, 0])
    return dense, tables


class Stack(nn.Module):
    """Layers, their relative position bias, and a final norm.

    Attributes:
      config: the network's configuration.
      num_layers: how many layers.
      num_buckets: of relative distances.
      cross_attention: whether layers attend to an encoder's output.
    """

    config: TransformerConfig
    num_layers: int
    num_buckets: int
    cross_attention: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array,
        *,
        deterministic: bool,
        query_positions: Array,
        key_positions: Array,
        encoded: Array | None = None,
        encoded_mask: Array | None = None,
        memory: list[Memory] | Memory | None = None,
        index: Array | None = None,
        keep_memory: bool = False,
    ) -> tuple[Array, list[Memory] | Memory | None]:
        """Runs the stack.

        Args:
          x: `[batch, length, embed]`.
          mask: `[batch or 1, length, keys]` bool.
          deterministic: no dropout.
          query_positions: `[length]` or `[batch, length]` int32.
          key_positions: `[keys]` int32; those of a memory follow one another.
          encoded: `[batch, encoder_length, embed]`.
          encoded_mask: `[batch, 1 or length, encoder_length]` bool.
          memory: the layers' caches; a list, or stacked where layers are scanned.
          index: where in the caches to write to (see `Memory.extended`); None to leave them as
            they are.
          keep_memory: return the layers' keys and values.

        Returns:
          `[batch, length, embed]` and the keys and values, or None.
        """
        config = self.config
        positions = query_positions, key_positions
        bias = tables = None
        if not config.relative_bias_per_layer:
            of_distance = RelativePositionBias(config, self.num_buckets, name="relpos_bias")
            bias, tables = _position_bias(of_distance, *positions, index, x.shape[0])
        attended = Attended(mask, bias, tables, positions, encoded, encoded_mask, index)
        layer = TransformerLayer
        if config.remat != "none":
            layer = nn_partitioning.remat(
                layer, policy=REMAT_POLICIES[config.remat], prevent_cse=not config.scan_layers
            )
        make = functools.partial(
            layer,
            config=config,
            num_buckets=self.num_buckets,
            cross_attention=self.cross_attention,
            deterministic=deterministic,
            keep_memory=keep_memory,
        )
        if config.scan_layers:
            scanned = nn_partitioning.scan_with_axes(
                lambda layer, x, memory, attended: layer(x, memory, attended),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast),
                length=self.num_layers,
                axis_name="layers",
            )
            x, memory = scanned(make(name="layers"), x, memory, attended)
        else:
            kept = []
            for number in range(self.num_layers):
                own = None if memory is None else memory[number]
                x, own = make(name=f"layers_{number}")(x, own, attended)
                kept.append(own)
            memory = kept if keep_memory else None
        x = RMSNorm(config, name="final_layer_norm")(x)
        x = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))(x, deterministic)
        return x, memory
