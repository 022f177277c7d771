"""What is learned: noise, losses and objectives, pure functions and frozen dataclasses over arrays.

Imports `interfaces` and `names` alone. Imported by networks (attention patterns), decoding, models.
Never enters: flax modules, gin, files, logging, and anything about a particular network.
"""

from diffusion_t5x.objectives.bounds import BoundDenoising
from diffusion_t5x.objectives.denoising import StepUnrolledDenoising
from diffusion_t5x.objectives.next_token import NextToken

__all__ = ["BoundDenoising", "NextToken", "StepUnrolledDenoising"]
