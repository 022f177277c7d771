"""The layers that look at one position at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from flax.linen import partitioning as nn_partitioning
from jax.typing import DTypeLike

from diffusion_t5x.networks.config import TransformerConfig
from diffusion_t5x.networks.low_rank import LowRank
from diffusion_t5x.networks.sharding import device_kind, per_data_shard

Array = jax.Array
HIDDEN_AXES = ("batch", "length", "embed")
TRANSPOSED = "transposed_kernel"  # the name that `prepare_kernels` gives transposed kernels
_OVER_LAST = (((1,), (1,)), ((), ()))  # of a product: contract the last axes of two matrices


def softcap(logits: Array, cap: float | None) -> Array:
    """Bounds logits to (-cap, cap), as Gemma 2 does; None leaves them."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _recomputed(function: Callable[..., Array], config: TransformerConfig) -> Callable[..., Array]:
    """Returns a function that is cheap to compute, for layers that are scanned to compute it again.

    For the gradient they keep what it takes, in the activations' type, and not what it computes
    from that in float32. What single layers keep is the compiler's choice.
    """
    return jax.checkpoint(function, prevent_cse=False) if config.scan_layers else function


class Norm(nn.Module):
    """Normalisation of the last axis, over all of `TransformerConfig.norm`.

    Root-mean-square with a scale and no bias (Zhang and Sennrich 2019), or of the variance, with
    both (Ba et al. 2016).
    """

    config: TransformerConfig
    axis: str = "embed"  # logical axis of the parameters

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kind, shape, axes = self.config.norm, (x.shape[-1],), (self.axis,)
        begin = nn.initializers.zeros if kind == "rms_plus_one" else nn.initializers.ones
        scale = nn_partitioning.param_with_axes("scale", begin, shape, jnp.float32, axes=axes)
        bias = _bias(self.axis, shape[0]) if kind == "layer" else None
        return _recomputed(self._normalize, self.config)(x, scale, bias)

    @nn.nowrap
    def _normalize(self, x: Array, scale: Array, bias: Array | None) -> Array:
        x = x.astype(jnp.float32)
        if bias is not None:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(variance + self.config.norm_epsilon)
        x = x * (1 + scale if self.config.norm == "rms_plus_one" else scale)
        return (x if bias is None else x + bias).astype(self.config.dtype)


def _bias(axis: str, features: int) -> Array:
    """Returns the bias `[features]` of the module that is being called."""
    return nn_partitioning.param_with_axes(
        "bias", nn.initializers.zeros, (features,), jnp.float32, axes=(axis,)
    )


class Dense(nn.Module):
    """A linear map, `[batch, length, in] -> [batch, length, features]`."""

    config: TransformerConfig
    features: int
    axes: tuple[str, str]  # logical axes of the kernel
    distribution: Literal["truncated_normal", "normal"] = "truncated_normal"  # initially
    scale: float = 1.0  # variance of the initial kernel times its input width
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # As a product of two matrices: its gradient takes a CPU half the time of a batched one's.
        flat = x.reshape(-1, x.shape[-1])
        if self.has_variable("params", TRANSPOSED):
            y = jax.lax.dot_general(flat, self.get_variable("params", TRANSPOSED), _OVER_LAST)
        else:
            kernel = nn_partitioning.param_with_axes(
                "kernel",
                nn.initializers.variance_scaling(self.scale, "fan_in", self.distribution),
                (x.shape[-1], self.features),
                jnp.float32,
                axes=self.axes,
            )
            y = flat @ kernel.astype(self.config.dtype)
        if self.use_bias:
            y = y + _bias(self.axes[1], self.features).astype(y.dtype)
        if (low_rank := self.config.low_rank) is not None and low_rank.adapts(self.path):
            y = y + _low_rank_product(flat, low_rank, self.features, self.axes)
        return y.reshape(*x.shape[:-1], -1)


def multiplies_in_bfloat16(config: TransformerConfig) -> bool:
    """Returns whether the product with the vocabulary rounds what it multiplies to bfloat16.

    So do TPUs with all products of float32. NVIDIA GPUs are told to where activations are bfloat16.
    """
    return config.dtype == jnp.bfloat16 and device_kind().startswith("NVIDIA")


def prepare_kernels(params: Any, dtype: DTypeLike) -> Any:
    """Returns parameters whose kernels are ready for many passes without a gradient.

    Kernels are in the activations' type, since a loop over layers would cast its share anew in each
    pass. For NVIDIA GPUs they are transposed as well, `[out, in]`: there XLA computes the product
    with one row in a single pass over such a kernel, but in two over one that is `[in, out]`.
    """
    transposes = device_kind().startswith("NVIDIA")

    def prepare(path: tuple[str, ...], value: Array) -> tuple[tuple[str, ...], Array]:
        if path[-1] not in ("kernel", "low_rank_a", "low_rank_b"):
            return path, value
        value = value.astype(dtype)
        if path[-1] != "kernel" or not transposes:
            return path, value
        return (*path[:-1], TRANSPOSED), jnp.swapaxes(value, -1, -2)

    flat = flax.traverse_util.flatten_dict(params)
    return flax.traverse_util.unflatten_dict(dict(prepare(*item) for item in flat.items()))


def _low_rank_product(x: Array, settings: LowRank, features: int, axes: tuple[str, str]) -> Array:
    """Computes `(alpha / rank) x A B`, `[n, in] -> [n, features]`, of the module that is called.

    `axes` are the logical axes of its kernel.
    """
    param, rank = nn_partitioning.param_with_axes, settings.rank
    begin = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    shape_a, shape_b = (x.shape[-1], rank), (rank, features)
    a = param("low_rank_a", begin, shape_a, jnp.float32, axes=(axes[0], "low_rank"))
    zeros = nn.initializers.zeros
    b = param("low_rank_b", zeros, shape_b, jnp.float32, axes=("low_rank", axes[1]))
    constant = nn.initializers.constant(settings.alpha / rank)
    scale = param("low_rank_scale", constant, (), jnp.float32, axes=())
    return x @ a.astype(x.dtype) @ b.astype(x.dtype) * scale.astype(x.dtype)


class GatedMlp(nn.Module):
    """The feed-forward layer: the product of activated input projections, projected back."""

    config: TransformerConfig
    out_scale: float = 1.0  # variance of the initial output kernel times its input width

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        config = self.config
        inputs = []
        for index, _ in enumerate(config.mlp_activations):
            dense = Dense(config, config.mlp_dim, ("embed", "mlp"), use_bias=config.mlp_bias,
                          name=f"wi_{index}")  # fmt: skip
            inputs.append(dense(x))
        product = _recomputed(self._activated_product, config)(inputs)
        product = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))(product, deterministic)
        product = nn_partitioning.with_sharding_constraint(product, ("batch", "length", "mlp"))
        out = Dense(config, config.embed_dim, ("mlp", "embed"), scale=self.out_scale,
                    use_bias=config.mlp_bias, name="wo")  # fmt: skip
        return out(product)

    @nn.nowrap
    def _activated_product(self, inputs: Sequence[Array]) -> Array:
        names = self.config.mlp_activations
        return functools.reduce(jnp.multiply, map(_activate, names, inputs))


def _activate(name: str, x: Array) -> Array:
    if name == "linear":
        return x
    return jax.nn.gelu(x, approximate=False) if name == "gelu_exact" else getattr(jax.nn, name)(x)


class SelfConditioning(nn.Module):
    """What is added to a canvas for the prediction of the pass before; 0 for 0, and at first.

    DiffusionGemma's has the same norm and gates, but also normalises the sum, which a network that
    was trained without would not know.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, conditioning: Array, deterministic: bool) -> Array:
        """Maps mean embeddings `[batch, length, embed]` to what is added to those of tokens."""
        norm = "rms" if self.config.norm == "layer" else self.config.norm
        config = dataclasses.replace(self.config, mlp_bias=False, norm=norm)
        x = Norm(config, name="pre_norm")(conditioning)
        return GatedMlp(config, out_scale=0.0, name="mlp")(x, deterministic)


class TokenEmbedding(nn.Module):
    """The map from tokens to vectors, and from hidden states to logits over the vocabulary."""

    config: TransformerConfig

    def setup(self) -> None:
        config = self.config
        shape = (config.vocab_size, config.embed_dim)
        std = 1.0  # With T5's scale of logits, and without it such that logits begin as large.
        if config.tied_logits and config.logits_scale is not None:
            std = 1.0 / (config.logits_scale * config.embed_dim**0.5)
        self.embedding = nn_partitioning.param_with_axes(
            "embedding", nn.initializers.normal(std), shape, jnp.float32, axes=("vocab", "embed")
        )
        if config.extra_tokens:
            self.extra_embedding = nn_partitioning.param_with_axes(
                "extra_embedding",
                nn.initializers.normal(std),
                (config.extra_tokens, config.embed_dim),
                jnp.float32,
                axes=("abspos_buckets", "embed"),  # few rows, on every device
            )
        if config.positions == "learned":
            self.position_embedding = nn_partitioning.param_with_axes(
                "position_embedding",
                nn.initializers.normal(std),
                (config.max_positions, config.embed_dim),
                jnp.float32,
                axes=("abspos_buckets", "embed"),
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

    def __call__(
        self, tokens: Array, deterministic: bool, text_index: Array | None = None
    ) -> Array:
        """Embeds `tokens [batch, length]` as `[batch, length, embed]`.

        `text_index`, of the shape of `tokens`, is their place in their own text, which 'learned'
        positions need. Only places that are cut off later are beyond the table (`bind` checks it).
        """
        config = self.config
        x = self._look_up(tokens).astype(config.dtype)
        if config.embedding_scale != 1.0:
            x = x * config.embedding_scale
        if config.positions == "learned":
            assert text_index is not None
            positions = jnp.take(self.position_embedding, text_index, axis=0, mode="clip")
            x = x + positions.astype(config.dtype)
        x = self.dropout(x, deterministic=deterministic)
        return nn_partitioning.with_sharding_constraint(x, HIDDEN_AXES)

    def _look_up(self, tokens: Array) -> Array:
        if not (extra := self.config.extra_tokens):
            return jnp.take(self.embedding, tokens, axis=0)
        of_text = jnp.take(self.embedding, jnp.minimum(tokens, self.config.vocab_size - 1), axis=0)
        index = tokens - self.config.vocab_size
        added = jnp.take(self.extra_embedding, jnp.clip(index, 0, extra - 1), axis=0)
        return jnp.where((index < 0)[..., None], of_text, added)

    def output_weights(self, batch_size: int) -> Array:
        """Returns the matrix of `logits` for each data-parallel shard of `batch_size` rows.

        It is `[shards, vocab, embed]` with tied logits, else `[shards, embed, vocab]`.
        """
        if self.config.tied_logits:
            return per_data_shard(self.embedding, ("vocab", "embed"), batch_size)
        return per_data_shard(self.logits_kernel, ("embed", "vocab"), batch_size)

    def logits(self, hidden: Array, weights: Array | None = None) -> Array:
        """Computes logits `[batch, ..., vocab]` float32 of `hidden [batch, ..., embed]`.

        Callers that compute logits several times give the result of `output_weights`.
        """
        if weights is None:
            weights = self.output_weights(hidden.shape[0])
        config = self.config
        tied, scale = config.tied_logits, config.logits_scale
        shards = weights.shape[0]
        flat = hidden.astype(jnp.float32).reshape(shards, -1, hidden.shape[-1])  # [p, n, e]
        if tied and scale is None:
            flat = flat / jnp.sqrt(config.embed_dim)
        elif scale is not None and scale != 1.0:
            flat = flat * scale
        precision = None
        if multiplies_in_bfloat16(config) and weights.dtype == jnp.float32:
            precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32
        logits = jnp.einsum(
            "pne,pve->pnv" if tied else "pne,pev->pnv",
            flat.astype(weights.dtype),
            weights,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        logits = softcap(logits, config.logits_softcap)
        return logits.reshape(*hidden.shape[:-1], -1)

    def expect(self, probabilities: Array, weights: Array) -> Array:
        """Averages the embeddings of tokens by `probabilities [batch, ..., vocab]` float32.

        The result is `[batch, ..., embed]`. `weights` are those of `output_weights`; no gradient
        needs to flow to the embedding.
        """
        config = self.config
        table = weights if config.tied_logits else self.embedding[None]  # [shards, vocab, embed]
        flat = probabilities.reshape(table.shape[0], -1, table.shape[1]).astype(table.dtype)
        mean = jnp.einsum("pnv,pve->pne", flat, table, preferred_element_type=jnp.float32)
        mean = (mean * config.embedding_scale).astype(config.dtype)
        return mean.reshape(*probabilities.shape[:-1], -1)
