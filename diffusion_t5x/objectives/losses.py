"""Token losses that never hold the logits of a whole batch, and T5X's ways to normalise them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_t5x.objectives.logits import first_largest

Array = jax.Array
LossNormalizingFactor = float | str | None
# Where a batch has fewer rows, more positions of each are read at once: a product with few
# positions takes as long as reading the vocabulary's embedding does.
FEWEST_ROWS = 16

NORMALIZING_FACTORS = (
    "NUM_REAL_TARGET_TOKENS",
    "NUM_TOTAL_TARGET_TOKENS",
    "AVERAGE_PER_SEQUENCE",
)


class TokenReadout(NamedTuple):
    """What one pass over the vocabulary says; a gradient flows through `loss_sum` alone.

    Attributes:
      loss_sum: sum of weight x loss over all positions, a scalar.
      loss: cross-entropy with the targets, in nats, smoothing and z-loss included:
        `[batch, length]`, as all that follow.
      z_loss: the part of `loss` that is z-loss.
      tokens: a draw from softmax(logits / temperature), int32; the argmax at temperature 0.
      correct: whether the argmax is the target, bool.
    """

    loss_sum: Array
    loss: Array
    z_loss: Array
    tokens: Array
    correct: Array


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy read off hidden states, a block of positions at a time.

    The gradient of a block is computed while its logits are there, and kept instead of them: per
    pass one array like the hidden states, and one like each array that `logits_fn` closes over.

    Attributes:
      label_smoothing: epsilon; the target gets 1 - epsilon, each other token
        epsilon / (vocab - 1), and the entropy of that distribution is subtracted, so that a
        perfect prediction costs 0, as in T5X.
      z_loss: coefficient of log(Z)^2, Z the softmax normaliser, which keeps logits from drifting.
      block_logits: logits per example that may be alive at once; longer sequences are read in
        blocks of positions.
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
    ) -> TokenReadout:
        """Reads every position once.

        Args:
          hidden: `[batch, length, embed]`.
          logits_fn: `hidden [..., embed] -> logits [..., vocab]`.
          targets: `[batch, length]` int32.
          weights: `[batch, length]` float32, of `loss_sum`; no gradient flows to them.
          rng: for the draw of `tokens`; may be None at temperature 0.
          temperature: of the draw.

        Raises:
          ValueError: if `temperature` is positive and there is no `rng`, or negative.
        """
        if temperature < 0 or (temperature > 0 and rng is None):
            raise ValueError(f"temperature = {temperature}; expected >= 0, with an rng if > 0.")
        vocab_size = jax.eval_shape(logits_fn, hidden[:, :1]).shape[-1]
        block_length = _block_length(hidden.shape[1], vocab_size, self.block_logits)
        logits_fn, consts = jax.closure_convert(logits_fn, hidden[:, :block_length])

        def read(hidden: Array, consts: list[Array], block: tuple[Any, ...]) -> TokenReadout:
            targets, weights, rng = block
            logits = logits_fn(hidden, *consts).astype(jnp.float32)
            return self._read_block(logits, targets, weights, rng, temperature)

        return _read_with_gradient(read, block_length, hidden, consts, (targets, weights, rng))

    def _read_block(
        self, logits: Array, targets: Array, weights: Array, rng: Array | None, temperature: float
    ) -> TokenReadout:
        """`logits [batch, block, vocab]` float32, `targets [batch, block]`."""
        log_z = jax.nn.logsumexp(logits, axis=-1)
        target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
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
            tokens = jax.random.categorical(rng, frozen / temperature, axis=-1).astype(jnp.int32)
        return TokenReadout(jnp.sum(loss * weights), loss, z_loss, tokens, argmax == targets)

    def _smoothing_term(self, logits: Array, target_logit: Array) -> Array:
        """What smoothing adds to the plain loss: `[batch, block]`."""
        others = logits.shape[-1] - 1
        off_value = self.label_smoothing / others
        confidence = 1.0 - self.label_smoothing
        entropy = -(confidence * np.log(confidence) + others * off_value * np.log(off_value))
        mean_other = (jnp.sum(logits, axis=-1) - target_logit) * off_value
        return self.label_smoothing * target_logit - mean_other - entropy


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _read_with_gradient(
    read: Callable[..., TokenReadout],
    block_length: int,
    hidden: Array,
    consts: list[Array],
    inputs: tuple[Any, ...],
) -> TokenReadout:
    """`read(hidden, consts, inputs)` in blocks of positions, differentiable in its `loss_sum`."""
    readout = _map_blocks(
        lambda block: read(block[0], consts, block[1]), block_length, (hidden, inputs)
    )
    return readout._replace(loss_sum=jnp.sum(readout.loss_sum))


def _read_forward(
    read: Callable[..., TokenReadout],
    block_length: int,
    hidden: Array,
    consts: list[Array],
    inputs: tuple[Any, ...],
) -> tuple[TokenReadout, Any]:
    """The readout, and the gradients of its `loss_sum`."""

    def loss(hidden: Array, consts: list[Array], inputs: Any) -> tuple[Array, TokenReadout]:
        readout = read(hidden, consts, inputs)
        return readout.loss_sum, readout

    def step(total: list[Array], block: Any) -> tuple[list[Array], Any]:
        grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (_, readout), (d_hidden, d_consts) = grad(block[0], consts, block[1])
        return jax.tree.map(jnp.add, total, d_consts), (readout, d_hidden)

    zeros = jax.tree.map(jnp.zeros_like, consts)
    total, (readout, d_hidden) = _scan_blocks(step, zeros, block_length, (hidden, inputs))
    readout = readout._replace(loss_sum=jnp.sum(readout.loss_sum))
    return readout, (d_hidden, total)


def _read_backward(
    read: Any, block_length: int, residuals: Any, cotangent: TokenReadout
) -> tuple[Any, ...]:
    """The kept gradients times that of the result."""
    del read, block_length
    scaled = jax.tree.map(lambda x: (x * cotangent.loss_sum).astype(x.dtype), residuals)
    return (*scaled, None)


_read_with_gradient.defvjp(_read_forward, _read_backward)


def read_in_blocks(
    read: Callable[[Array, Array, Array | None], Any],
    hidden: Array,
    logits_fn: Callable[[Array], Array],
    tokens: Array,
    rng: Array | None,
    block_logits: int,
) -> Any:
    """What `read` says of every position, never holding the logits of long sequences at once.

    Args:
      read: `(logits [batch, block, vocab] float32, tokens [batch, block], rng)` to a tree of
        `[batch, block]`.
      hidden: `[batch, length, embed]`.
      logits_fn: `hidden [..., embed] -> logits [..., vocab]`.
      tokens: `[batch, length]` int32, handed to `read` with their positions.
      rng: split among the blocks; may be None.
      block_logits: logits per row that may be alive at once, or as many in all as `FEWEST_ROWS`
        rows may have; where `length` needs more, blocks of positions are read one after the other.
    """
    vocab_size = jax.eval_shape(logits_fn, hidden[:, :1]).shape[-1]

    def read_block(block: Any) -> Any:
        hidden, (tokens, rng) = block
        return read(logits_fn(hidden).astype(jnp.float32), tokens, rng)

    block_logits *= max(1, FEWEST_ROWS // tokens.shape[0])
    block_length = _block_length(tokens.shape[1], vocab_size, block_logits)
    return _map_blocks(read_block, block_length, (hidden, (tokens, rng)))


def _block_length(length: int, vocab_size: int, block_logits: int) -> int:
    """Positions per block, at least one; as many blocks as needed, of nearly the same length."""
    most = max(1, block_logits // vocab_size)
    return -(-length // -(-length // most))


def _map_blocks(read: Callable[[Any], Any], block_length: int, blocks: Any) -> Any:
    """`read` of each block of positions, joined; see `_scan_blocks`."""
    _, results = _scan_blocks(lambda _, block: ((), read(block)), (), block_length, blocks)
    return results


def _scan_blocks(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, block_length: int, blocks: Any
) -> tuple[Any, Any]:
    """`jax.lax.scan` over blocks of positions.

    Args:
      step: `(carry, block) -> (carry, result)`.
      carry: what `step` begins with.
      block_length: positions per block.
      blocks: `(hidden [batch, length, embed], (*[batch, length], rng))`, all cut alike but for the
        key, which is split among the blocks or None.

    Returns:
      The last carry, and the results with their positions joined to `[batch, length, ...]`.
      Scalars are stacked.
    """
    hidden, (*arrays, rng) = blocks
    length = hidden.shape[1]
    if block_length == length:
        return step(carry, blocks)
    num_blocks = -(-length // block_length)
    cut = functools.partial(_split_length, num_blocks=num_blocks, block_length=block_length)
    rngs = None if rng is None else jax.random.split(rng, num_blocks)
    carry, results = jax.lax.scan(step, carry, (cut(hidden), (*map(cut, arrays), rngs)))
    return carry, jax.tree.map(lambda x: _join_length(x, length) if x.ndim > 1 else x, results)


def _split_length(x: Array, num_blocks: int, block_length: int) -> Array:
    """`[batch, length, ...] -> [num_blocks, batch, block_length, ...]`, zero-padded at the end."""
    padding = num_blocks * block_length - x.shape[1]
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], num_blocks, block_length, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def _join_length(x: Array, length: int) -> Array:
    """`[num_blocks, batch, block_length, ...] -> [batch, length, ...]`, the padding dropped."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def normalize_weights(
    factor: LossNormalizingFactor, weights: Array, segment_ids: Array | None = None
) -> tuple[Array, Array]:
    """T5X's loss normalisation: `loss = sum(loss * weights) / normalizer`.

    Args:
      factor: None (sum over tokens), a constant to divide by, or one of `NORMALIZING_FACTORS`.
      weights: `[batch, length]` loss weights.
      segment_ids: `[batch, length]`, of packed targets; 0 is padding.

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
    if name == "NUM_REAL_TARGET_TOKENS":
        return weights, jnp.maximum(jnp.sum(weights), 1e-8)
    if name == "NUM_TOTAL_TARGET_TOKENS":
        return weights, jnp.float32(weights.size)
    if name == "AVERAGE_PER_SEQUENCE":
        if segment_ids is None:
            segment_ids = jnp.ones_like(weights, jnp.int32)
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        per_segment = jnp.einsum("bqk,bk->bq", same.astype(jnp.float32), weights)
        weights = weights / jnp.maximum(per_segment, 1e-8)
        return weights, jnp.maximum(jnp.sum(weights), 1e-8)
    near = difflib.get_close_matches(name, NORMALIZING_FACTORS, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"loss_normalizing_factor = {factor!r} is unknown; did you mean {near!r}? "
        f"Known: None, a number, {', '.join(NORMALIZING_FACTORS)}."
    )
