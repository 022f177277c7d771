"""A JAX-native training framework that extends T5X with text diffusion."""

from diffusion_t5x import checkout, moved

__version__ = "0.1.0"

moved.install()
checkout.install()
