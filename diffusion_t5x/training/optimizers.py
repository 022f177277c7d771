"""Optax optimisers at unit learning rate, and T5X's learning rate schedules.

The trainer multiplies an optimiser's updates by the schedule's learning rate, so that the two are
bound separately, as in T5X. The optimisers are functions of their own, not optax's, so that gin can
bind their arguments by name and T5's defaults are written in one place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffusion_t5x.names import did_you_mean

Schedule = Callable[[jax.Array | int], jax.Array]


def adafactor(
    decay_rate: float = 0.8,
    decay_offset: int = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: float = 1.0,
    momentum: float | None = None,
    min_dim_size_to_factor: int = 128,
) -> optax.GradientTransformation:
    """Returns Adafactor (Shazeer and Stern 2018) with T5's defaults; see `optax.adafactor`.

    Each layer is clipped and scaled by itself, also where layers are stacked.
    """
    steps = [
        optax.scale_by_factored_rms(
            decay_rate=decay_rate,
            step_offset=decay_offset,
            min_dim_size_to_factor=min_dim_size_to_factor,
        ),
    ]
    if clipping_threshold is not None:
        steps.append(_per_layer(optax.clip_by_block_rms(clipping_threshold)))
    if multiply_by_parameter_scale:
        steps.append(_per_layer(optax.scale_by_param_block_rms()))
    if momentum is not None:
        steps.append(optax.ema(momentum, debias=False, accumulator_dtype=jnp.float32))
    return optax.chain(*steps, optax.scale(-1))


def _per_layer(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """Has a transformation without state see the layers of stacked parameters one by one.

    So a network learns the same whether its layers are stacked or apart, as with T5X's Adafactor.
    """

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        def of_leaf(path: Any, update: jax.Array, param: jax.Array) -> jax.Array:
            def one(update: jax.Array, param: jax.Array) -> jax.Array:
                return transformation.update(update, state, param)[0]

            stacked = jax.tree_util.DictKey("layers") in path
            return (jax.vmap(one) if stacked else one)(update, param)

        return jax.tree_util.tree_map_with_path(of_leaf, updates, params), state

    return optax.GradientTransformation(transformation.init, update)


def adamw(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Returns AdamW (Loshchilov and Hutter 2019); see `optax.adamw`.

    Weight decay is multiplied by the learning rate, as is the rest of the update.
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
    """Returns a schedule that is a product of named factors, with T5X's names and meanings.

    With `s` the step less `step_offset` and `w = warmup_steps`, the known `factors` are:
      'constant': `base_learning_rate`.
      'linear_warmup': `min(1, s / w)`.
      'linear_decay': `base_learning_rate * min(s / w, 1 + decay_factor * (w - s))`, which includes
        the two factors above.
      'rsqrt_decay': `1 / sqrt(max(s, w))`.
      'rsqrt_normalized_decay': `sqrt(w) / sqrt(max(s, w))`.
      'decay_every': `decay_factor ** (s // steps_per_decay)`.
      'cosine_decay': from 1 to 0 over each cycle of `steps_per_cycle` after the warm-up.

    Steps up to `step_offset`, such as those of pretraining, do not count. The rate is at least
    `min_learning_rate`.

    Raises:
      ValueError: If a factor is unknown.
    """
    warmup = max(warmup_steps, 1)

    def rsqrt(step: jax.Array | int) -> jax.Array:
        return jax.lax.rsqrt(jnp.maximum(step, warmup))

    def cosine(step: jax.Array | int) -> jax.Array:
        cycles = jnp.maximum((step - warmup_steps) / max(steps_per_cycle, 1.0), 0.0)
        return jnp.maximum(0.0, 0.5 * (1.0 + jnp.cos(jnp.pi * (cycles % 1.0))))

    known: dict[str, Callable[[jax.Array | int], Any]] = {
        "constant": lambda step: base_learning_rate,
        "linear_warmup": lambda step: jnp.minimum(1.0, step / warmup),
        "linear_decay": lambda step: (
            base_learning_rate
            * jnp.minimum(step / warmup, 1.0 + decay_factor * (warmup_steps - step))
        ),
        "rsqrt_decay": rsqrt,
        "rsqrt_normalized_decay": lambda step: jnp.sqrt(warmup) * rsqrt(step),
        "decay_every": lambda step: decay_factor ** (step // steps_per_decay),
        "cosine_decay": cosine,
    }
    names = [name.strip() for name in factors.split("*")]
    for name in names:
        if name not in known:
            raise ValueError(f"factors = {factors!r} has {name!r}; {did_you_mean(name, known)}")

    def schedule(step: jax.Array | int) -> jax.Array:
        step = jnp.maximum(0.0, jnp.asarray(step, jnp.float32) - step_offset)
        rate = jnp.float32(1.0)
        for name in names:
            rate *= known[name](step)
        return jnp.maximum(rate, min_learning_rate)

    return schedule
