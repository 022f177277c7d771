"""A JAX-native training framework that extends T5X with text diffusion."""

__version__ = "0.1.0"
