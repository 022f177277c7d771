"""What objectives share that denoise a canvas after a prefix: settings, weights, losses beside."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp

from diffusion_t5x.interfaces import Corruption, Metrics, Network
from diffusion_t5x.names import check_known
from diffusion_t5x.objectives.attention_patterns import DENOISING_PATTERNS
from diffusion_t5x.objectives.infilling import draw_fixed
from diffusion_t5x.objectives.losses import CrossEntropy
from diffusion_t5x.objectives.next_token import NextToken
from diffusion_t5x.objectives.padding import check_padding, weigh_padding

Array = jax.Array
Noise = TypeVar("Noise", bound=Corruption)


@dataclasses.dataclass(frozen=True)
class CanvasObjective(Generic[Noise]):
    """Settings of objectives that denoise canvases.

    Attributes:
      corruption: the noise.
      padding_weight: loss weight of padding positions; 1 counts them like text, as the paper does.
      padding: how much of the padding after a text counts: 'canvas', all of it (the paper's);
        'tail', the next `tail_length` tokens; 'eos_only', none, so that what a model writes after
        the end of its text means nothing (docs/padding.md).
      tail_length: tokens of the tail; 0 unless `padding` is 'tail'.
      cross_entropy: the loss of a token.
      attention_pattern: 'bidirectional' (the paper's); 'cached_prefix', where the prefix does not
        see the canvas, so that a decoder may cache it; or 'causal_prefix', where moreover no prefix
        token sees a later one, so that a decoder may write a long text block by block.
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
      next_token_prefix: let that loss predict the tokens of the prefix too, but for its first; each
        weighs what a token of the text does. Decoder-only networks.
      prefix_drop_rate: probability that a text is denoised without its prefix, for guidance in
        decoding (Ho and Salimans, arXiv 2207.12598, algorithm 1); the AR loss beside keeps it.
      fixed_rate: probability that all of an example but one random span is fixed: clean in every
        canvas, and without loss, so that a model learns to fill holes (`infilling.draw_fixed`).
        Batches with fixed positions of their own keep those.
      score_draws: canvases of a text (of a block) from which its likelihood is bounded; at least 2,
        for the error. Four times as many halve the error.
    """

    corruption: Noise
    _: dataclasses.KW_ONLY
    padding_weight: float = 1.0
    padding: str = "canvas"
    tail_length: int = 0
    cross_entropy: CrossEntropy = CrossEntropy()
    attention_pattern: str = "bidirectional"
    shift: bool = False
    opening_steps: int = 0
    next_token_weight: float = 0.0
    next_token_prefix: bool = False
    prefix_drop_rate: float = 0.0
    fixed_rate: float = 0.0
    score_draws: int = 16
    packs: ClassVar[bool] = False

    def __post_init__(self):
        name = type(self).__name__
        check_known(self.attention_pattern, DENOISING_PATTERNS, f"{name}.attention_pattern")
        check_padding(self.padding, self.tail_length, self.padding_weight, name)
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
        if self.next_token_prefix and not self.next_token_weight:
            raise ValueError("next_token_prefix = True needs NEXT_TOKEN_WEIGHT above 0.")
        for rate in ("prefix_drop_rate", "fixed_rate"):
            if not 0.0 <= getattr(self, rate) <= 1.0:
                raise ValueError(f"{rate} = {getattr(self, rate)}; expected a probability, 0 to 1.")
        for number in ("padding_weight", "opening_steps", "next_token_weight"):
            if not getattr(self, number) >= 0:
                raise ValueError(f"{number} = {getattr(self, number)}; expected a value >= 0.")

    @property
    def forbidden(self) -> tuple[int, ...]:
        """Tokens that only the corruption writes."""
        return self.corruption.forbidden

    def token_weights(self, targets: Array, weights: Array) -> Array:
        """Weighs padding (token 0): see `padding.weigh_padding`."""
        return weigh_padding(targets, weights, self.padding, self.tail_length, self.padding_weight)

    def _loss_beside(
        self, network: Network, targets: Array, weights: Array, rng: Array
    ) -> tuple[Array, Metrics, Array]:
        """Computes the AR loss beside, its metrics, and the key of what follows; padding is free.

        Without such a loss they are 0, nothing, and the key as it is.
        """
        if not self.next_token_weight:
            return jnp.float32(0.0), {}, rng
        own_rng, rng = jax.random.split(rng)
        weights = weights * (targets != 0)
        network = network.as_causal()
        if self.next_token_prefix:
            hidden, tokens, known = network.read_text(targets, own_rng)
            # Tokens of the prefix weigh what those of the text do.
            before = known * jnp.max(weights, axis=1, keepdims=True)
            weights = jnp.concatenate([before[:, : -targets.shape[1]], weights], axis=1)
            readout = self.cross_entropy(hidden, network.logits, tokens, weights)
            loss, sums = readout.loss_sum, readout.sums(weights)
        else:
            objective = NextToken(cross_entropy=self.cross_entropy)
            loss, _, sums = objective.loss(network, targets, weights, own_rng)
        metrics = {f"{name}/next_token": pair for name, pair in sums.items()}
        return self.next_token_weight * loss, metrics, rng

    def _drop_prefixes(self, network: Network, rng: Array) -> tuple[Network, Array]:
        """Drops some prefixes; returns the network, and the key of what follows."""
        if not self.prefix_drop_rate:
            return network, rng
        drop_rng, rng = jax.random.split(rng)
        chosen = jax.random.bernoulli(drop_rng, self.prefix_drop_rate, (network.batch_size,))
        return network.drop_prefix(chosen), rng

    def _fix(
        self, targets: Array, weights: Array, rng: Array, fixed: Array | None
    ) -> tuple[Array | None, Array, Array]:
        """Returns the fixed positions, given or drawn, weights without them, and the next key."""
        if fixed is not None or not self.fixed_rate:
            return fixed, weights, rng
        fixed_rng, rng = jax.random.split(rng)
        drawn = draw_fixed(fixed_rng, targets, self.fixed_rate)
        return drawn, weights * ~drawn, rng
