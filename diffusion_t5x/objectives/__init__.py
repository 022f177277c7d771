"""What is learned: corruption, objectives and losses, as pure functions over arrays."""

from diffusion_t5x.objectives.denoising import NextToken, StepUnrolledDenoising

__all__ = ["NextToken", "StepUnrolledDenoising"]
