"""The names that gin files bind, as in T5X: `trainer.Trainer` and `trainer.train`."""

from diffusion_t5x.training.loop import train
from diffusion_t5x.training.train_step import Trainer

__all__ = ["Trainer", "train"]
