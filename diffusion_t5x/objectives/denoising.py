"""Step-unrolled denoising: SUNDAE's objective as AR2Diff trains it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from diffusion_t5x.interfaces import Corruption, Metrics, Network, Score
from diffusion_t5x.names import check_known
from diffusion_t5x.objectives.attention_patterns import DENOISING_PATTERNS
from diffusion_t5x.objectives.infilling import draw_fixed, keep_fixed
from diffusion_t5x.objectives.likelihood import any_order_bound
from diffusion_t5x.objectives.losses import CrossEntropy, by_rate
from diffusion_t5x.objectives.next_token import NextToken
from diffusion_t5x.objectives.padding import check_padding, weigh_padding
from diffusion_t5x.objectives.text_blocks import count_blocks, count_used_blocks, take_block

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class StepUnrolledDenoising:
    """Denoises a corrupted target, then denoises the model's own output.

    The canvas is the corrupted target; its denoising gives the loss L1. Tokens drawn from those
    logits, at all positions and whatever the noise, are the next canvas, whose denoising gives L2;
    no gradient flows through the draw. With mask noise no mask is left in that canvas. The paper
    sums L1 + L2 and draws at temperature 0 (arXiv 2401.17181, section 4.1); SUNDAE averages
    and draws at temperature 1 (arXiv 2112.06749, equation 4).

    Attributes:
      corruption: the noise of the first canvas.
      num_unrolls: denoising passes after the first; 1 in both papers.
      unroll_temperature: temperature of the draw; 0 is the argmax.
      reduction: 'sum' or 'mean' over the passes.
      loss_passes: 'all', or 'last' for the loss of the last pass alone; those before it then have
        no gradient.
      padding_weight: loss weight of padding positions; 1 counts them like text, as the paper does.
      padding: how much of the padding after a text counts: 'canvas', all of it (the paper's);
        'tail', the next `tail_length` tokens; 'eos_only', none, so that what a model writes after
        the end of its text means nothing (docs/padding.md).
      tail_length: tokens of the tail; 0 unless `padding` is 'tail'.
      cross_entropy: the loss of a token.
      attention_pattern: 'bidirectional' (the paper's); 'cached_prefix', where the prefix does not
        see the canvas, so that a decoder may cache it; or 'causal_prefix', where moreover no prefix
        token sees a later one, so that a decoder may write a long text block by block.
      block_length: tokens of a canvas for texts that are written block by block; 0 for whole texts.
        Each step then trains on one random block of each text, after the prefix and the blocks
        before it.
      shift: predict a canvas position from the hidden state of the position before it, the first
        from the last prefix token's, as AR models do and what is adapted from them may keep doing
        (DiffuLLaMA, arXiv 2410.17891, section 3; Dream, arXiv 2508.15487). Decoder-only networks.
      opening_steps: steps in which attention opens from causal to `attention_pattern`; 0 for open
        from the start. At step `i` of a run, from 0, each query sees each later key with
        probability min(1, (i + 1) / opening_steps), drawn once per step for all rows, layers and
        passes (DiffuLLaMA, arXiv 2410.17891, section 3). Evaluation and decoding see the open mask.
        Every run with this setting begins causal: set it for adaptation, not for what follows.
      next_token_weight: weight of the AR loss of the clean targets, read by the same network under
        causal attention, which is trained beside; 0 for none. Each token of text then weighs that
        much, compared with one denoising pass. The fine-tuning of DiffusionGemma in TRL
        (`sft_diffusion_gemma.py`) adds such a loss with weight 1, of the prefix as well.
      fixed_rate: probability that all of an example but one random span is fixed: clean in every
        canvas, and without loss, so that a model learns to fill holes (`infilling.draw_fixed`).
        Batches with fixed positions of their own keep those.
      score_draws: canvases of a text (of a block) from which its likelihood is bounded; at least 2,
        for the error. Four times as many halve the error.
    """

    corruption: Corruption
    num_unrolls: int = 1
    unroll_temperature: float = 0.0
    reduction: str = "sum"
    loss_passes: str = "all"
    padding_weight: float = 1.0
    padding: str = "canvas"
    tail_length: int = 0
    cross_entropy: CrossEntropy = CrossEntropy()
    attention_pattern: str = "bidirectional"
    block_length: int = 0
    shift: bool = False
    opening_steps: int = 0
    next_token_weight: float = 0.0
    fixed_rate: float = 0.0
    score_draws: int = 16
    packs: ClassVar[bool] = False

    def __post_init__(self):
        check_known(
            self.attention_pattern, DENOISING_PATTERNS, "StepUnrolledDenoising.attention_pattern"
        )
        check_known(self.reduction, ("sum", "mean"), "StepUnrolledDenoising.reduction")
        check_padding(self.padding, self.tail_length, self.padding_weight, "StepUnrolledDenoising")
        check_known(self.loss_passes, ("all", "last"), "StepUnrolledDenoising.loss_passes")
        if self.block_length and self.attention_pattern != "causal_prefix":
            raise ValueError(
                f"block_length = {self.block_length} with attention_pattern = "
                f"{self.attention_pattern!r}; blocks need 'causal_prefix'."
            )
        if not isinstance(self.opening_steps, int) or not isinstance(self.shift, bool):
            raise ValueError(
                f"opening_steps = {self.opening_steps!r}, shift = {self.shift!r}; expected a whole "
                "number of steps, and True or False."
            )
        if not isinstance(self.score_draws, int) or self.score_draws < 2:
            raise ValueError(
                f"score_draws = {self.score_draws!r}; expected a whole number of at least 2: the "
                "error of a score is that of several draws (SCORE_DRAWS)."
            )
        if not 0.0 <= self.fixed_rate <= 1.0:
            raise ValueError(f"fixed_rate = {self.fixed_rate}; expected a probability in [0, 1].")
        for name in (
            "num_unrolls",
            "unroll_temperature",
            "padding_weight",
            "block_length",
            "opening_steps",
            "next_token_weight",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}; expected a value >= 0.")

    @property
    def forbidden(self) -> tuple[int, ...]:
        """Tokens that only the corruption writes."""
        return self.corruption.forbidden

    def token_weights(self, targets: Array, weights: Array) -> Array:
        """Weighs padding (token 0): see `padding.weigh_padding`.

        Blocks after the one in which a text ends get weight 0: no decoder writes them.
        """
        weights = weigh_padding(
            targets, weights, self.padding, self.tail_length, self.padding_weight
        )
        if self.block_length:
            used = count_used_blocks(targets, self.block_length) * self.block_length
            weights *= jnp.arange(targets.shape[1]) < used[:, None]  # [batch, length]
        return weights

    def loss(
        self,
        network: Network,
        targets: Array,
        weights: Array,
        rng: Array,
        fixed: Array | None = None,
    ) -> tuple[Array, Array, Metrics]:
        """Computes the loss of the passes, with metrics of each; the class says how.

        'cross_entropy/by_rate' is that of the passes with a loss, by the first canvas's rate.
        """
        next_token = jnp.float32(0.0)
        metrics: dict[str, tuple[Array, Array]] = {}
        if self.next_token_weight:
            next_token_rng, rng = jax.random.split(rng)
            next_token, _, sums = NextToken(cross_entropy=self.cross_entropy).loss(
                network.as_causal(), targets, weights * (targets != 0), next_token_rng
            )
            metrics |= {f"{name}/next_token": pair for name, pair in sums.items()}
        if self.block_length:
            block_rng, rng = jax.random.split(rng)
            used = count_used_blocks(targets, self.block_length)
            block = jax.random.randint(block_rng, used.shape, 0, used)
            # Weighted by the number of blocks, the loss of one is that of the text in expectation.
            network, targets, weights = self._take_block(
                network, targets, weights * used[:, None], block
            )
            fixed = None if fixed is None else take_block(fixed, block, self.block_length)
        if fixed is None and self.fixed_rate:
            fixed_rng, rng = jax.random.split(rng)
            fixed = draw_fixed(fixed_rng, targets, self.fixed_rate)
            weights *= ~fixed
        times_rng, corrupt_rng, passes_rng = jax.random.split(rng, 3)
        times = self.corruption.sample_times(times_rng, *targets.shape)
        canvas, _ = self.corruption.corrupt(corrupt_rng, targets, times)
        canvas = keep_fixed(canvas, targets, fixed)
        total, plain = jnp.float32(0.0), jnp.zeros(targets.shape)
        counted = 1 if self.loss_passes == "last" else self.num_unrolls + 1
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
            if unroll > self.num_unrolls - counted:
                total += readout.loss_sum
                plain += (readout.loss - readout.z_loss) / counted
            for name, pair in readout.sums(weights).items():
                metrics[f"{name}/unroll_{unroll}"] = pair
            canvas = keep_fixed(jax.lax.stop_gradient(readout.tokens), targets, fixed)
        rates = self.corruption.rate(times)
        metrics["cross_entropy/by_rate"] = by_rate(plain, weights, rates)
        if self.reduction == "mean":
            total /= counted
        return total + self.next_token_weight * next_token, jnp.sum(weights), metrics

    def score(self, network: Network, targets: Array, weights: Array, rng: Array) -> Score:
        """Bounds the log-likelihood: see `likelihood.any_order_bound`.

        That of a text in blocks is the sum of its blocks' bounds.
        """
        if not self.block_length:
            return any_order_bound(
                network, self.corruption, targets, weights, rng, self.score_draws
            )

        def score_block(number: Array) -> Score:
            block = jnp.full(targets.shape[0], number)
            taken = self._take_block(network, targets, weights, block)
            block_rng = jax.random.fold_in(rng, number)
            return any_order_bound(
                taken[0], self.corruption, *taken[1:], block_rng, self.score_draws
            )

        numbers = jnp.arange(count_blocks(targets.shape[1], self.block_length))
        scores = jax.lax.map(score_block, numbers)
        error = jnp.sqrt(jnp.sum(jnp.square(scores.error), axis=0))
        return Score(jnp.sum(scores.log_likelihood, axis=0), error)

    def _take_block(
        self, network: Network, targets: Array, weights: Array, block: Array
    ) -> tuple[Network, Array, Array]:
        """Takes `block [batch]` of each text, and the network whose prefixes end before it."""
        before = (count_blocks(targets.shape[1], self.block_length) - 1) * self.block_length
        network = network.extend_prefix(targets[:, :before], block * self.block_length)
        targets, weights = (take_block(x, block, self.block_length) for x in (targets, weights))
        return network, targets, weights
