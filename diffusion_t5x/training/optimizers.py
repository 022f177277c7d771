"""Optax optimisers at unit learning rate, and T5X's learning rate schedules.

The trainer multiplies an optimiser's updates by the schedule's learning rate, so that the two are
bound apart, as in T5X.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.Array | int], jax.Array]


def adafactor(
    decay_rate: float = 0.8,
    decay_offset: int = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: float = 1.0,
    momentum: float | None = None,
    min_dim_size_to_factor: int = 128,
) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern 2018) with T5's defaults; arguments as `optax.adafactor`'s."""
    return optax.adafactor(
        learning_rate=None,
        decay_rate=decay_rate,
        decay_offset=decay_offset,
        multiply_by_parameter_scale=multiply_by_parameter_scale,
        clipping_threshold=clipping_threshold,
        momentum=momentum,
        min_dim_size_to_factor=min_dim_size_to_factor,
    )


def adamw(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019); arguments as `optax.adamw`'s.

    Weight decay is multiplied by the learning rate, as all of the update is.
    """
    return optax.adamw(learning_rate=1.0, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)


def create_learning_rate_scheduler(
    factors: str = "constant * linear_warmup * rsqrt_decay",
    base_learning_rate: float = 0.5,
    warmup_steps: int = 1000,
    decay_factor: float = 0.5,
    steps_per_decay: int = 20_000,
    steps_per_cycle: int = 100_000,
    step_offset: int = 0,
    min_learning_rate: float = 1e-8,
) -> Schedule:
    """A product of named factors, with T5X's names and meanings.

    Args:
      factors: names joined by '*'. 'constant': the base learning rate; 'linear_warmup': from 0 to
        1 over the warm-up; 'linear_decay': the base learning rate, after a linear warm-up to it
        falling by `decay_factor` of it at each step, so that it takes the place of the two before;
        'rsqrt_decay': 1 / sqrt of the step, and of `warmup_steps` before it;
        'rsqrt_normalized_decay': the same, starting at 1; 'decay_every': `decay_factor` at every
        `steps_per_decay`; 'cosine_decay': from 1 to 0 over one cycle after the warm-up, again and
        again.
      base_learning_rate: of 'constant' and 'linear_decay'.
      warmup_steps: steps of warm-up.
      decay_factor: of 'decay_every', and the slope of 'linear_decay'.
      steps_per_decay: of 'decay_every'.
      steps_per_cycle: of 'cosine_decay'.
      step_offset: steps that count as not taken, e.g. those of pretraining.
      min_learning_rate: the least there is.

    Raises:
      ValueError: if a factor is unknown.
    """

    def after_warmup(step: jax.Array | int) -> Any:
        return (step - warmup_steps) / max(steps_per_cycle, 1.0)

    known: dict[str, Callable[[jax.Array | int], Any]] = {
        "constant": lambda step: base_learning_rate,
        "linear_warmup": lambda step: jnp.minimum(1.0, step / max(warmup_steps, 1)),
        "linear_decay": lambda step: (
            base_learning_rate
            * jnp.minimum(step / max(warmup_steps, 1), 1.0 + decay_factor * (warmup_steps - step))
        ),
        "rsqrt_decay": lambda step: jax.lax.rsqrt(jnp.maximum(step, max(warmup_steps, 1.0))),
        "rsqrt_normalized_decay": lambda step: (
            jnp.sqrt(max(warmup_steps, 1.0))
            * jax.lax.rsqrt(jnp.maximum(step, max(warmup_steps, 1.0)))
        ),
        "decay_every": lambda step: decay_factor ** (step // steps_per_decay),
        "cosine_decay": lambda step: jnp.maximum(
            0.0, 0.5 * (1.0 + jnp.cos(jnp.pi * (jnp.maximum(after_warmup(step), 0.0) % 1.0)))
        ),
    }
    names = [name.strip() for name in factors.split("*")]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"factors = {factors!r} has {name!r}; did you mean {near!r}? "
                f"Known: {', '.join(known)}."
            )

    def schedule(step: jax.Array | int) -> jax.Array:
        step = jnp.maximum(0.0, jnp.asarray(step, jnp.float32) - step_offset)
        rate = jnp.float32(1.0)
        for name in names:
            rate *= known[name](step)
        return jnp.maximum(rate, min_learning_rate)

    return schedule
