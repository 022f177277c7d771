"""Next-token prediction: the autoregressive objective."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from diffusion_t5x.interfaces import Metrics, Network, Score
from diffusion_t5x.names import check_known
from diffusion_t5x.objectives.attention_patterns import AUTOREGRESSIVE_PATTERNS
from diffusion_t5x.objectives.losses import CrossEntropy

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Prediction of each target token from the prefix and the tokens before it (a prefix LM).

    Attributes:
      attention_pattern: 'causal' (the paper's AR decoder) or 'prefix_bidirectional', where prefix
        tokens see the whole prefix.
      cross_entropy: the loss of a token.
    """

    attention_pattern: str = "causal"
    cross_entropy: CrossEntropy = CrossEntropy()
    packs: ClassVar[bool] = True
    forbidden: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self):
        check_known(self.attention_pattern, AUTOREGRESSIVE_PATTERNS, "NextToken.attention_pattern")

    def token_weights(self, targets: Array, weights: Array) -> Array:
        """Returns the batch's weights unchanged."""
        del targets
        return weights

    def loss(
        self,
        network: Network,
        targets: Array,
        weights: Array,
        rng: Array,
        fixed: Array | None = None,
    ) -> tuple[Array, Array, Metrics]:
        """Computes the cross-entropy of the targets in one pass; `rng` is for dropout alone."""
        del fixed  # clean anyway, and of weight 0
        hidden = network.forward(targets, rng)
        readout = self.cross_entropy(hidden, network.logits, targets, weights)
        return readout.loss_sum, jnp.sum(weights), readout.sums(weights)

    def score(self, network: Network, targets: Array, weights: Array, rng: Array) -> Score:
        """Computes the log-likelihood of the targets, exactly and without `rng`."""
        del rng
        exact = self.cross_entropy.log_likelihood(network, targets, weights)
        return Score(exact, jnp.zeros_like(exact))
