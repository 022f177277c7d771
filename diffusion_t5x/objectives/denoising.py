"""Step-unrolled denoising: SUNDAE's objective as AR2Diff trains it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_t5x.interfaces import Corruption, Metrics, Network, Score
from diffusion_t5x.names import check_known
from diffusion_t5x.objectives.canvas_objective import CanvasObjective
from diffusion_t5x.objectives.infilling import keep_fixed
from diffusion_t5x.objectives.likelihood import any_order_bound
from diffusion_t5x.objectives.losses import by_rate
from diffusion_t5x.objectives.self_conditioning import draw_conditioning, self_condition
from diffusion_t5x.objectives.text_blocks import count_blocks, count_used_blocks, take_block

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class StepUnrolledDenoising(CanvasObjective[Corruption]):
    """Denoises a corrupted target, then denoises the model's own output.

    The canvas is the corrupted target; its denoising gives the loss L1. Tokens drawn from those
    logits, at all positions and whatever the noise, are the next canvas, whose denoising gives L2;
    no gradient flows through the draw. With mask noise no mask is left in that canvas. The paper
    sums L1 + L2 and draws at temperature 0 (arXiv 2401.17181, section 4.1); SUNDAE averages
    and draws at temperature 1 (arXiv 2112.06749, equation 4).

    A network with self-conditioning gets in each later pass, for a random half of the texts, what
    the pass before predicted; without unrolls, what a pass without gradient does.

    Attributes, besides those of `CanvasObjective`:
      num_unrolls: denoising passes after the first; 1 in both papers.
      unroll_temperature: temperature of the draw; 0 is the argmax.
      reduction: 'sum' or 'mean' over the passes.
      loss_passes: 'all', or 'last' for the loss of the last pass alone; those before it then have
        no gradient.
      block_length: tokens of a canvas for texts that are written block by block; 0 for whole texts.
        Each step then trains on one random block of each text, after the prefix and the blocks
        before it.
      all_blocks: train on all blocks of each text instead, side by side in one pass after one
        reading of the clean text (BD3-LM, arXiv 2503.09573, section 3.1). Each block has a noise
        level of its own, and the expected gradient is the same.
    """

    _: dataclasses.KW_ONLY
    num_unrolls: int = 1
    unroll_temperature: float = 0.0
    reduction: str = "sum"
    loss_passes: str = "all"
    block_length: int = 0
    all_blocks: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_known(self.reduction, ("sum", "mean"), "StepUnrolledDenoising.reduction")
        check_known(self.loss_passes, ("all", "last"), "StepUnrolledDenoising.loss_passes")
        if self.block_length and self.attention_pattern != "causal_prefix":
            raise ValueError(
                f"block_length = {self.block_length} with attention_pattern = "
                f"{self.attention_pattern!r}; blocks need 'causal_prefix'."
            )
        if self.all_blocks and not self.block_length:
            raise ValueError("all_blocks = True needs a block_length; set BLOCK_LENGTH.")
        for name in ("num_unrolls", "unroll_temperature", "block_length"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}; expected a value >= 0.")

    def token_weights(self, targets: Array, weights: Array) -> Array:
        """Weighs padding (token 0): see `padding.weigh_padding`.

        Blocks after the one in which a text ends get weight 0: no decoder writes them.
        """
        weights = super().token_weights(targets, weights)
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
        beside, sums, rng = self._loss_beside(network, targets, weights, rng)
        metrics = dict(sums)
        network, rng = self._drop_prefixes(network, rng)
        network, targets, weights, fixed, blocks, rng = self._arrange(
            network, targets, weights, fixed, rng
        )
        fixed, weights, rng = self._fix(targets, weights, rng, fixed)
        times_rng, corrupt_rng, passes_rng, prefix_rng = jax.random.split(rng, 4)
        if self.all_blocks:
            network = network.cache_blocks(targets, self.block_length, prefix_rng)
        elif (self.num_unrolls or network.self_conditioning) and network.caches_prefix:
            network = network.cache_prefix(prefix_rng)  # all passes share one reading of it
        rows, length = targets.shape[0] * blocks, targets.shape[1] // blocks
        times = self.corruption.sample_times(times_rng, rows, length)
        if blocks > 1:
            times = jnp.broadcast_to(times, (rows, length)).reshape(targets.shape)
        canvas, _ = self.corruption.corrupt(corrupt_rng, targets, times)
        canvas = keep_fixed(canvas, targets, fixed)
        conditioning: tuple[Array | None, ...] = ()  # of the first pass none, if there is a second
        if network.self_conditioning:
            passes_rng, chosen_rng = jax.random.split(passes_rng)
            if not self.num_unrolls:
                conditioning = (self_condition(network, canvas, chosen_rng),)
        total, plain = jnp.float32(0.0), jnp.zeros(targets.shape)
        counted = 1 if self.loss_passes == "last" else self.num_unrolls + 1
        for unroll in range(self.num_unrolls + 1):
            passes_rng, dropout_rng, draw_rng = jax.random.split(passes_rng, 3)
            hidden = network.forward(canvas, dropout_rng, *conditioning)
            readout = self.cross_entropy(
                hidden,
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
            if network.self_conditioning and unroll < self.num_unrolls:
                conditioning = (draw_conditioning(network, hidden, chosen_rng),)
        rates = self.corruption.rate(times)
        metrics["cross_entropy/by_rate"] = by_rate(plain, weights, rates)
        if self.reduction == "mean":
            total /= counted
        return total + beside, jnp.sum(weights), metrics

    def _arrange(
        self, network: Network, targets: Array, weights: Array, fixed: Array | None, rng: Array
    ) -> tuple[Network, Array, Array, Array | None, int, Array]:
        """Takes a block of each text, or all; the last but one is how many, the last a key."""
        if self.all_blocks:
            blocks = count_blocks(targets.shape[1], self.block_length)
            padding = [(0, 0), (0, blocks * self.block_length - targets.shape[1])]
            fixed = None if fixed is None else jnp.pad(fixed, padding)
            return network, jnp.pad(targets, padding), jnp.pad(weights, padding), fixed, blocks, rng
        if self.block_length:
            block_rng, rng = jax.random.split(rng)
            used = count_used_blocks(targets, self.block_length)
            block = jax.random.randint(block_rng, used.shape, 0, used)
            # Weighted by the number of blocks, the loss of one is that of the text in expectation.
            taken = self._take_block(network, targets, weights * used[:, None], block)
            fixed = None if fixed is None else take_block(fixed, block, self.block_length)
            return (*taken, fixed, 1, rng)
        return network, targets, weights, fixed, 1, rng

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
