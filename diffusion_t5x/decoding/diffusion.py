"""The paper's sampler: denoise random canvases in parallel, keep the one the model scores best."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_t5x.bound_network import BoundNetwork
from diffusion_t5x.corruption import UniformCorruption
from diffusion_t5x.decoding.rerank import Decoded, best_last
from diffusion_t5x.losses import CrossEntropy

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DiffusionDecoder:
    """Samples every position of a random canvas anew, `num_steps` times (arXiv 2401.17181, §3).

    Attributes:
      corruption: draws the first canvas.
      num_steps: denoising steps, each one pass over the whole canvas.
      num_samples: canvases per example, denoised side by side.
      temperature: of the draw at each step; 0 is the argmax.
      block_logits: logits per canvas that may be alive at once (see `losses.CrossEntropy`).
    """

    corruption: UniformCorruption
    num_steps: int = 10
    num_samples: int = 8
    temperature: float = 0.2
    block_logits: int = 2**22

    def __post_init__(self):
        for name in ("num_steps", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; expected at least 1.")
        if self.temperature < 0:
            raise ValueError(f"temperature = {self.temperature}; expected a value >= 0.")

    def decode(
        self, network: BoundNetwork, length: int, rng: Array, return_trajectory: bool = False
    ) -> Decoded:
        """Decodes one text per prefix, all steps in one compiled loop.

        A sample's score is minus the cross-entropy, summed over the canvas, between the tokens
        that the last step read and the logits that it returned.

        Args:
          network: the network, bound to `batch` prefixes.
          length: of the canvas, in tokens.
          rng: for the canvas and every draw.
          return_trajectory: keep the canvas of every step.
        """
        canvas_rng, steps_rng = jax.random.split(rng)
        rows = network.batch_size * self.num_samples
        repeated = network.repeat(self.num_samples)
        read = CrossEntropy(block_logits=self.block_logits)

        def step(carry: tuple[Array, Array], step_rng: Array):
            canvas, _ = carry
            readout = read(
                repeated.forward(canvas, None),
                repeated.logits,
                canvas,
                rng=step_rng,
                temperature=self.temperature,
            )
            score = -jnp.sum(readout.loss, axis=-1)
            return (readout.tokens, score), readout.tokens if return_trajectory else None

        canvas = self.corruption.sample_canvas(canvas_rng, (rows, length))
        init = (canvas, jnp.zeros((rows,), jnp.float32))
        (tokens, scores), steps = jax.lax.scan(
            step, init, jax.random.split(steps_rng, self.num_steps)
        )
        by_sample = (network.batch_size, self.num_samples)
        scores, tokens = scores.reshape(by_sample), tokens.reshape(*by_sample, length)
        if not return_trajectory:
            scores, tokens = best_last(scores, tokens)
            return Decoded(tokens, scores)
        trajectory = jnp.moveaxis(jnp.concatenate([canvas[None], steps]), 0, 1)
        trajectory = trajectory.reshape(*by_sample, self.num_steps + 1, length)
        scores, tokens, trajectory = best_last(scores, tokens, trajectory)
        return Decoded(tokens, scores, trajectory)
