"""Training objectives: next-token prediction and step-unrolled denoising.

An objective says what a network is asked to do with `[prefix; target]`: which attention pattern it
needs, whether several texts may be packed into a row, and the loss. It knows neither the network
nor the data that it is given.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from diffusion_t5x.interfaces import BoundNetwork
from diffusion_t5x.objectives.corruption import UniformCorruption
from diffusion_t5x.objectives.losses import CrossEntropy, TokenReadout
from diffusion_t5x.objectives.text_blocks import count_blocks, count_used, take_block

Array = jax.Array
# name -> (weighted sum, sum of weights), so that sums over batches average exactly.
Metrics = Mapping[str, tuple[Array, Array]]


def _sums(readout: TokenReadout, weights: Array) -> Metrics:
    """Weighted sums of the readout's loss terms over `weights [batch, length]`."""
    weight_sum = jnp.sum(weights)
    cross_entropy = readout.loss - readout.z_loss
    return {
        "cross_entropy": (jnp.sum(cross_entropy * weights), weight_sum),
        "z_loss": (jnp.sum(readout.z_loss * weights), weight_sum),
        "accuracy": (jnp.sum(readout.correct * weights), weight_sum),
    }


def log_likelihood(
    network: BoundNetwork, targets: Array, weights: Array, cross_entropy: CrossEntropy
) -> Array:
    """Sum over positions of weight x log softmax(logits)[target], in one pass: `[batch]`."""
    plain = dataclasses.replace(cross_entropy, label_smoothing=0.0, z_loss=0.0)
    readout = plain(network.forward(targets, None), network.logits, targets, weights)
    return -jnp.sum(readout.loss * weights, axis=-1)


def _check_pattern(pattern: str, known: tuple[str, ...], objective: str) -> None:
    """Refuses an attention pattern under which an objective has no meaning."""
    if pattern not in known:
        near = difflib.get_close_matches(str(pattern), known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"attention_pattern = {pattern!r}; {objective} needs one of {', '.join(known)}; "
            f"did you mean {near!r}?"
        )


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Autoregressive prediction of the target given the prefix (a prefix LM).

    Attributes:
      attention_pattern: 'causal' (the paper's AR decoder) or 'prefix_bidirectional', where prefix
        tokens see the whole prefix.
      cross_entropy: the token loss.
    """

    attention_pattern: str = "causal"
    cross_entropy: CrossEntropy = CrossEntropy()
    packs: ClassVar[bool] = True

    def __post_init__(self):
        _check_pattern(
            self.attention_pattern, ("causal", "prefix_bidirectional"), "next-token prediction"
        )

    def token_weights(self, targets: Array, weights: Array) -> Array:
        """The loss weights `[batch, length]` of the batch, unchanged."""
        del targets
        return weights

    def loss(
        self, network: BoundNetwork, targets: Array, weights: Array, rng: Array
    ) -> tuple[Array, Array, Metrics]:
        """Sum of weighted token losses, sum of weights, and metrics as pairs of sums.

        Args:
          network: the network, bound.
          targets: `[batch, length]` int32.
          weights: `[batch, length]` float32.
          rng: for dropout.
        """
        hidden = network.forward(targets, rng)
        readout = self.cross_entropy(hidden, network.logits, targets, weights)
        return readout.loss_sum, jnp.sum(weights), _sums(readout, weights)

    def score(self, network: BoundNetwork, targets: Array, weights: Array) -> Array:
        """Log-likelihood of the targets, in nats: `[batch]`."""
        return log_likelihood(network, targets, weights, self.cross_entropy)


@dataclasses.dataclass(frozen=True)
class StepUnrolledDenoising:
    """SUNDAE's objective as AR2Diff trains it: denoise, then denoise one's own output.

    The target is corrupted and denoised, which gives L1; tokens drawn from those logits are the
    next canvas, whose denoising gives L2; no gradient flows through the draw. The paper sums
    L1 + L2 and unrolls at temperature 0; SUNDAE averages and unrolls at 1 (arXiv 2401.17181,
    section 3; arXiv 2112.06749, equation 4).

    Attributes:
      corruption: makes the first canvas.
      num_unrolls: denoising passes after the first; 1 in both papers.
      unroll_temperature: temperature of the draw; 0 is the argmax.
      reduction: 'sum' or 'mean' over the passes.
      padding_weight: loss weight of padding positions; 1 counts them like text, as the paper does.
      cross_entropy: the token loss.
      attention_pattern: 'bidirectional' (the paper's), 'cached_prefix', where the prefix does not
        see the canvas, so that a decoder may keep the prefix's keys and values, or
        'causal_prefix', where moreover no prefix token sees a later one, so that a decoder may
        write a long text block by block.
      block_length: tokens of the canvas, where texts are to be written block by block; 0 for whole
        texts. Each step then trains on one random block of each text, after the prefix and the
        blocks before it.
    """

    corruption: UniformCorruption
    num_unrolls: int = 1
    unroll_temperature: float = 0.0
    reduction: str = "sum"
    padding_weight: float = 1.0
    cross_entropy: CrossEntropy = CrossEntropy()
    attention_pattern: str = "bidirectional"
    block_length: int = 0
    packs: ClassVar[bool] = False

    def __post_init__(self):
        _check_pattern(
            self.attention_pattern,
            ("bidirectional", "cached_prefix", "causal_prefix"),
            "denoising",
        )
        if self.reduction not in ("sum", "mean"):
            raise ValueError(f"reduction = {self.reduction!r}; expected 'sum' or 'mean'.")
        if self.block_length and self.attention_pattern != "causal_prefix":
            raise ValueError(
                f"block_length = {self.block_length} with attention_pattern = "
                f"{self.attention_pattern!r}; blocks need 'causal_prefix'."
            )
        for name in ("num_unrolls", "unroll_temperature", "padding_weight", "block_length"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}; expected a value >= 0.")

    def token_weights(self, targets: Array, weights: Array) -> Array:
        """Loss weights `[batch, length]` with padding (token 0) scaled by `padding_weight`.

        Blocks after the one in which a text ends have none: no decoder writes them.
        """
        weights = weights * jnp.where(targets == 0, self.padding_weight, 1.0)
        if self.block_length:
            used = count_used(targets, self.block_length) * self.block_length
            weights *= jnp.arange(targets.shape[1]) < used[:, None]
        return weights

    def _block(
        self, network: BoundNetwork, targets: Array, weights: Array, block: Array
    ) -> tuple[BoundNetwork, Array, Array]:
        """The network after the blocks before `block [batch]`, and that block."""
        before = (count_blocks(targets.shape[1], self.block_length) - 1) * self.block_length
        network = network.extend(targets[:, :before], block * self.block_length)
        targets, weights = (take_block(x, block, self.block_length) for x in (targets, weights))
        return network, targets, weights

    def loss(
        self, network: BoundNetwork, targets: Array, weights: Array, rng: Array
    ) -> tuple[Array, Array, Metrics]:
        """Sum of weighted token losses over all passes, sum of weights, metrics as pairs of sums.

        Args:
          network: the network, bound.
          targets: `[batch, length]` int32, clean.
          weights: `[batch, length]` float32.
          rng: for the block, the rate, the corruption, the draws and dropout.
        """
        if self.block_length:
            block_rng, rng = jax.random.split(rng)
            used = count_used(targets, self.block_length)
            block = jax.random.randint(block_rng, used.shape, 0, used)
            # As many times as there are blocks, the loss is that of the text, in expectation.
            network, targets, weights = self._block(
                network, targets, weights * used[:, None], block
            )
        rate_rng, corrupt_rng, passes_rng = jax.random.split(rng, 3)
        rate = self.corruption.sample_rate(rate_rng, targets.shape[0])
        canvas = self.corruption.corrupt(corrupt_rng, targets, rate)
        total = jnp.float32(0.0)
        metrics: dict[str, tuple[Array, Array]] = {}
        for unroll in range(self.num_unrolls + 1):
            passes_rng, dropout_rng, draw_rng = jax.random.split(passes_rng, 3)
            readout = self.cross_entropy(
                network.forward(canvas, dropout_rng),
                network.logits,
                targets,
                weights,
                rng=draw_rng,
                temperature=self.unroll_temperature,
            )
            total += readout.loss_sum
            for name, sums in _sums(readout, weights).items():
                metrics[f"{name}/unroll_{unroll}"] = sums
            canvas = jax.lax.stop_gradient(readout.tokens)
        if self.reduction == "mean":
            total /= self.num_unrolls + 1
        return total, jnp.sum(weights), metrics

    def score(self, network: BoundNetwork, targets: Array, weights: Array) -> Array:
        """Model score of given targets: minus their cross-entropy under the logits that the
        targets themselves, as canvas, lead to (arXiv 2401.17181, section 3): `[batch]`.

        With blocks, the sum of theirs.
        """
        if not self.block_length:
            return log_likelihood(network, targets, weights, self.cross_entropy)

        def score(number: Array) -> Array:
            block = jnp.full(targets.shape[0], number)
            return log_likelihood(
                *self._block(network, targets, weights, block), self.cross_entropy
            )

        numbers = jnp.arange(count_blocks(targets.shape[1], self.block_length))
        return jnp.sum(jax.lax.map(score, numbers), axis=0)
