"""The loss of tokens, read off logits that never exist for a whole batch, and its normalisation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_t5x.interfaces import Metrics, Network
from diffusion_t5x.names import check_known
from diffusion_t5x.objectives.logits import chunk_length, first_largest, map_chunks, scan_chunks

Array = jax.Array
LossNormalizingFactor = float | str | None
# `(logits [batch, chunk, vocab] float32, targets, *conditions) -> [batch, chunk]`.
TokenLoss = Callable[..., Array]

NORMALIZING_FACTORS = (
    "NUM_REAL_TARGET_TOKENS",
    "NUM_TOTAL_TARGET_TOKENS",
    "AVERAGE_PER_SEQUENCE",
)

RATE_PARTS = 10  # of [0, 1], in which losses are logged


class TokenReadout(NamedTuple):
    """What one pass over the vocabulary says; a gradient flows through `loss_sum` alone.

    All but `loss_sum` are `[batch, length]`.
    """

    loss_sum: Array  # sum of weight times loss over all positions, a scalar
    loss: Array  # cross-entropy with the targets in nats, smoothing and z-loss included
    log_prob: Array  # log softmax(logits)[target]
    z_loss: Array  # the part of `loss` that is z-loss
    tokens: Array  # a draw from softmax(logits / temperature), int32; the argmax at temperature 0
    correct: Array  # True where the argmax is the target

    def sums(self, weights: Array) -> Metrics:
        """Sums cross-entropy, z-loss and accuracy over `weights [batch, length]`."""
        weight_sum = jnp.sum(weights)
        return {
            "cross_entropy": (jnp.sum((self.loss - self.z_loss) * weights), weight_sum),
            "z_loss": (jnp.sum(self.z_loss * weights), weight_sum),
            "accuracy": (jnp.sum(self.correct * weights), weight_sum),
        }


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy read off hidden states, a chunk of positions at a time.

    The gradient of a chunk is computed while its logits exist, and kept instead of them: per pass
    one array like the hidden states, and one like each array that `logits_fn` closes over.

    Attributes:
      label_smoothing: epsilon; the target has probability 1 - epsilon, each other token
        epsilon / (vocab - 1), and the entropy of that distribution is subtracted, so that a
        perfect prediction costs 0, as in T5X.
      z_loss: coefficient of log(Z)^2, Z the softmax normaliser, which keeps logits from drifting.
      block_logits: logits of an example that may exist at once; longer sequences are read in
        chunks of positions.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    block_logits: int = 2**23

    def __post_init__(self):
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(
                f"label_smoothing = {self.label_smoothing}; expected 0 <= label_smoothing < 1."
            )
        if self.block_logits < 1:
            raise ValueError(f"block_logits = {self.block_logits}; expected a positive number.")

    def __call__(
        self,
        hidden: Array,
        logits_fn: Callable[[Array], Array],
        targets: Array,
        weights: Array,
        *,
        rng: Array | None = None,
        temperature: float = 0.0,
        token_loss: TokenLoss | None = None,
        conditions: tuple[Array, ...] = (),
    ) -> TokenReadout:
        """Reads every position of `hidden [batch, length, embed]` once.

        Args:
          logits_fn: maps hidden states `[..., embed]` to logits `[..., vocab]`.
          targets: `[batch, length]` int32.
          weights: `[batch, length]` float32, the weights of `loss_sum`; no gradient flows to them.
          rng: key for the draw of `tokens`; may be None at temperature 0.
          temperature: of the draw.
          token_loss: replaces the cross-entropy and its smoothing in `loss`; z-loss is still added.
            It closes over no array.
          conditions: `[batch, length]` each, what `token_loss` needs besides logits and targets; no
            gradient flows to them.

        Raises:
          ValueError: if `temperature` is positive and there is no `rng`, or negative.
        """
        if temperature < 0 or (temperature > 0 and rng is None):
            raise ValueError(f"temperature = {temperature}; expected >= 0, with an rng if > 0.")
        vocab_size = jax.eval_shape(logits_fn, hidden[:, :1]).shape[-1]
        length = chunk_length(hidden.shape[1], vocab_size, self.block_logits)
        logits_fn, consts = jax.closure_convert(logits_fn, hidden[:, :length])

        def read(hidden: Array, consts: list[Array], chunk: tuple[Any, ...]) -> TokenReadout:
            targets, weights, *conditions, rng = chunk
            logits = logits_fn(hidden, *consts).astype(jnp.float32)
            loss = token_loss(logits, targets, *conditions) if token_loss else None
            return self._read_chunk(logits, targets, weights, rng, temperature, loss)

        inputs = (targets, weights, *conditions, rng)
        return _read_with_gradient(read, length, hidden, consts, inputs)

    def log_likelihood(self, network: Network, targets: Array, weights: Array) -> Array:
        """Sums weight times log softmax(logits)[target] over positions: `[batch]`.

        It takes one pass, in which `network` reads `targets [batch, length]`. Label smoothing and
        z-loss do not count.
        """
        plain = dataclasses.replace(self, label_smoothing=0.0, z_loss=0.0)
        readout = plain(network.forward(targets, None), network.logits, targets, weights)
        return -jnp.sum(readout.loss * weights, axis=-1)

    def _read_chunk(
        self,
        logits: Array,
        targets: Array,
        weights: Array,
        rng: Array | None,
        temperature: float,
        loss: Array | None,
    ) -> TokenReadout:
        """Reads `logits [batch, chunk, vocab]` float32 for `targets [batch, chunk]`.

        `loss [batch, chunk]` replaces cross-entropy; None for that.
        """
        log_z = jax.nn.logsumexp(logits, axis=-1)
        target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        log_prob = target_logit - log_z
        if loss is None:
            loss = log_z - target_logit
            if self.label_smoothing:
                loss += self._smoothing_term(logits, target_logit)
        z_loss = self.z_loss * jnp.square(log_z)
        loss += z_loss
        frozen = jax.lax.stop_gradient(logits)
        below = frozen - jnp.max(frozen, axis=-1, keepdims=True)
        first = first_largest(below, jnp.arange(logits.shape[-1]))
        argmax = jnp.minimum(first, logits.shape[-1] - 1).astype(jnp.int32)
        tokens = argmax
        if temperature > 0:
            assert rng is not None  # checked in __call__
            tokens = jax.random.categorical(rng, frozen / temperature, axis=-1).astype(jnp.int32)
        loss_sum = jnp.sum(loss * weights)
        return TokenReadout(loss_sum, loss, log_prob, z_loss, tokens, argmax == targets)

    def _smoothing_term(self, logits: Array, target_logit: Array) -> Array:
        """Computes what smoothing adds to the plain loss: `[batch, chunk]`."""
        others = logits.shape[-1] - 1
        off_value = self.label_smoothing / others
        confidence = 1.0 - self.label_smoothing
        entropy = -(confidence * np.log(confidence) + others * off_value * np.log(off_value))
        mean_other = (jnp.sum(logits, axis=-1) - target_logit) * off_value
        return self.label_smoothing * target_logit - mean_other - entropy


def by_rate(values: Array, weights: Array, rates: Array) -> tuple[Array, Array]:
    """Sums `values [batch, length]` over `weights` in ten equal parts of the corruption rates.

    Args:
      rates: in [0, 1]; broadcast to the values.

    Returns:
      Weighted sums and sums of weights, `[10]` each.
    """
    part = jnp.clip(jnp.floor(rates * RATE_PARTS), 0, RATE_PARTS - 1)
    inside = weights * (jnp.arange(RATE_PARTS)[:, None, None] == part)  # [10, batch, length]
    return jnp.sum(values * inside, axis=(1, 2)), jnp.sum(inside, axis=(1, 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _read_with_gradient(
    read: Callable[..., TokenReadout],
    chunk_length: int,
    hidden: Array,
    consts: list[Array],
    inputs: tuple[Any, ...],
) -> TokenReadout:
    """Applies `read(hidden, consts, inputs)` to chunks, differentiable in its `loss_sum`."""
    readout = map_chunks(
        lambda chunk: read(chunk[0], consts, chunk[1]), chunk_length, (hidden, inputs)
    )
    return readout._replace(loss_sum=jnp.sum(readout.loss_sum))


def _read_forward(
    read: Callable[..., TokenReadout],
    chunk_length: int,
    hidden: Array,
    consts: list[Array],
    inputs: tuple[Any, ...],
) -> tuple[TokenReadout, Any]:
    """Computes the readout, and the gradients of its `loss_sum`."""

    def loss(hidden: Array, consts: list[Array], inputs: Any) -> tuple[Array, TokenReadout]:
        readout = read(hidden, consts, inputs)
        return readout.loss_sum, readout

    def step(total: list[Array], chunk: Any) -> tuple[list[Array], Any]:
        grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (_, readout), (d_hidden, d_consts) = grad(chunk[0], consts, chunk[1])
        return jax.tree.map(jnp.add, total, d_consts), (readout, d_hidden)

    zeros = jax.tree.map(jnp.zeros_like, consts)
    total, (readout, d_hidden) = scan_chunks(step, zeros, chunk_length, (hidden, inputs))
    readout = readout._replace(loss_sum=jnp.sum(readout.loss_sum))
    return readout, (d_hidden, total)


def _read_backward(
    read: Any, chunk_length: int, residuals: Any, cotangent: TokenReadout
) -> tuple[Any, ...]:
    """Multiplies the kept gradients by that of the result."""
    del read, chunk_length
    scaled = jax.tree.map(lambda x: (x * cotangent.loss_sum).astype(x.dtype), residuals)
    return (*scaled, None)


_read_with_gradient.defvjp(_read_forward, _read_backward)


def normalize_weights(
    factor: LossNormalizingFactor, weights: Array, segment_ids: Array | None = None
) -> tuple[Array, Array]:
    """Normalises a loss as T5X does: `loss = sum(loss * weights) / normalizer`.

    Args:
      factor: None (sum over tokens), a constant to divide by, or one of `NORMALIZING_FACTORS`.
      weights: `[batch, length]` loss weights.
      segment_ids: `[batch, length]` of packed targets; 0 is padding.

    Returns:
      The weights `[batch, length]` and the scalar normalizer to divide the summed loss by.
      'AVERAGE_PER_SEQUENCE' scales the weights of each sequence (of each segment, when packed) to
      sum to 1, and its normalizer is the number of sequences.

    Raises:
      ValueError: if `factor` is an unknown name.
    """
    weights = weights.astype(jnp.float32)
    if factor is None:
        return weights, jnp.float32(1.0)
    if not isinstance(factor, str):
        return weights, jnp.float32(factor)
    name = factor.upper()
    check_known(name, NORMALIZING_FACTORS, "loss_normalizing_factor")
    if name == "NUM_REAL_TARGET_TOKENS":
        return weights, jnp.maximum(jnp.sum(weights), 1e-8)
    if name == "NUM_TOTAL_TARGET_TOKENS":
        return weights, jnp.float32(weights.size)
    if segment_ids is None:
        segment_ids = jnp.ones_like(weights, jnp.int32)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]  # [batch, length, length]
    per_segment = jnp.einsum("bqk,bk->bq", same.astype(jnp.float32), weights)
    weights = weights / jnp.maximum(per_segment, 1e-8)
    return weights, jnp.maximum(jnp.sum(weights), 1e-8)
