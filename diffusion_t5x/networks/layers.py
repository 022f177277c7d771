"""The layers of T5 1.1 that look at one position at a time."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import partitioning as nn_partitioning

from diffusion_t5x.networks.config import TransformerConfig
from diffusion_t5x.networks.sharding import per_data_shard

Array = jax.Array
HIDDEN_AXES = ("batch", "length", "embed")


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a scale and no bias (Zhang and Sennrich 2019)."""

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
    """A linear map without bias, `[batch, length, in] -> [batch, length, features]`."""

    config: TransformerConfig
    features: int
    axes: tuple[str, str]  # logical axes of the kernel
    distribution: Literal["truncated_normal", "normal"] = "truncated_normal"  # initially
    scale: float = 1.0  # variance of the initial kernel times its input width

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = nn_partitioning.param_with_axes(
            "kernel",
            nn.initializers.variance_scaling(self.scale, "fan_in", self.distribution),
            (x.shape[-1], self.features),
            jnp.float32,
            axes=self.axes,
        )
        # As a product of two matrices: its gradient takes a CPU half the time of a batched one's.
        y = x.reshape(-1, x.shape[-1]) @ kernel.astype(self.config.dtype)
        return y.reshape(*x.shape[:-1], -1)


class GatedMlp(nn.Module):
    """The feed-forward layer: the product of activated input projections, projected back."""

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
    """The map from tokens to vectors, and from hidden states to logits over the vocabulary."""

    config: TransformerConfig

    def setup(self) -> None:
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
        """Embeds `tokens [batch, length]` as `[batch, length, embed]`."""
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.config.dtype)
        x = self.dropout(x, deterministic=deterministic)
        return nn_partitioning.with_sharding_constraint(x, HIDDEN_AXES)

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
        tied = self.config.tied_logits
        shards = weights.shape[0]
        flat = hidden.astype(jnp.float32).reshape(shards, -1, hidden.shape[-1])  # [p, n, e]
        if tied:
            flat = flat / jnp.sqrt(self.config.embed_dim)
        logits = jnp.einsum("pne,pve->pnv" if tied else "pne,pev->pnv", flat, weights)
        return logits.reshape(*hidden.shape[:-1], -1)
