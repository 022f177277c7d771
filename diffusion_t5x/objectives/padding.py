"""The padding after a text: how much of it a loss counts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffusion_t5x.names import check_known

Array = jax.Array

# 'canvas': all of it, as in the paper. 'tail': a number of tokens after the text. 'eos_only': none.
PADDINGS = ("canvas", "tail", "eos_only")


def check_padding(padding: str, tail_length: int, padding_weight: float, owner: str) -> None:
    """Refuses settings that are unknown or contradict each other.

    Args:
      owner: the class whose settings they are, for errors.

    Raises:
      ValueError: if `padding` is unknown, or a number that it does not read is set.
    """
    check_known(padding, PADDINGS, f"{owner}.padding")
    is_count = isinstance(tail_length, int) and not isinstance(tail_length, bool)
    if not is_count or (tail_length < 1 if padding == "tail" else tail_length != 0):
        expected = "a whole number of tokens, at least 1" if padding == "tail" else "0"
        raise ValueError(
            f"{owner}.tail_length = {tail_length!r} with padding = {padding!r}; expected {expected}"
            " (padding = 'tail' reads it, 'eos_only' counts no token after the text)."
        )
    if padding == "eos_only" and padding_weight != 1.0:
        raise ValueError(
            f"{owner}.padding_weight = {padding_weight} with padding = 'eos_only', which counts no "
            "padding; expected 1.0."
        )


def weigh_padding(
    targets: Array, weights: Array, padding: str, tail_length: int, padding_weight: float
) -> Array:
    """Scales the weights of padding (token 0), and drops those of what does not count.

    A text ends with its last token that is not padding, which is its end-of-text token unless it
    was cut.

    Args:
      targets: `[batch, length]` int32, one text a row.
      weights: `[batch, length]` float32.
      padding: one of `PADDINGS`.
      tail_length: positions after the text that count with 'tail'.
      padding_weight: factor of padding that counts.

    Returns:
      `[batch, length]` float32.
    """
    weights = weights * jnp.where(targets == 0, padding_weight, 1.0)
    if padding == "canvas":
        return weights
    places = jnp.arange(targets.shape[1])
    ends = jnp.max(jnp.where(targets != 0, places + 1, 0), axis=1, keepdims=True)  # [batch, 1]
    return weights * (places < ends + tail_length)
