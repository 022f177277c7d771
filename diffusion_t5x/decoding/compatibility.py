"""What objective, decoder and network must have in common to be one model."""

from __future__ import annotations

from diffusion_t5x.interfaces import Decoder, Objective
from diffusion_t5x.objectives.attention_patterns import CACHED_PATTERNS


def check_tokens(objective: Objective, decoder: Decoder, rows: int, extra: int) -> None:
    """Checks that a network has the tokens that noise writes, and no others besides text's.

    Args:
      rows: tokens that the network predicts, `TransformerConfig.vocab_size`.
      extra: tokens from `rows` on that only noise has, `TransformerConfig.extra_tokens`.

    Raises:
      ValueError: if not; the message names the setting.
    """
    for part in (objective, decoder):
        _check_noise(part, rows, extra)
    # As where gin files are out of order.
    noise = getattr(objective, "corruption", None)
    if extra and noise is not None and noise.vocab_size <= rows:
        raise ValueError(
            f"TransformerConfig.extra_tokens = {extra}, but {type(noise).__name__} has no such "
            "token. A file of gin/noise/ comes after the objective file; a mask token of the "
            "vocabulary's own needs extra_tokens = 0."
        )


def _check_noise(part: Objective | Decoder, rows: int, extra: int) -> None:
    """Refuses noise of tokens that a network of `rows` and `extra` ones lacks, or never writes."""
    corruption = getattr(part, "corruption", None)
    if corruption is None:
        return
    name, size = f"{type(part).__name__}.corruption", corruption.vocab_size
    if size > rows + extra:
        settings = "set VOCAB_SIZE for both"
        if any(token >= rows for token in corruption.forbidden):
            settings = f"set TransformerConfig.extra_tokens = {size - rows}"
        raise ValueError(
            f"{name}.vocab_size = {size}, but the network knows only {rows + extra} tokens; "
            f"{settings}."
        )
    if not set(range(rows, size)) <= set(corruption.forbidden):
        raise ValueError(
            f"{name}.vocab_size = {size}, but tokens from {rows} on are extra_tokens, which only "
            f"mask noise has; expected at most {rows}, which is VOCAB_SIZE."
        )


def check_decoder(objective: Objective, decoder: Decoder) -> None:
    """Checks that a decoder's settings suit the objective that the model is trained with.

    Raises:
      ValueError: if prefixes are to be cached although they see the canvas, both cut texts into
        blocks of different lengths, or only one of them has a mask token, or another one.
    """
    pattern, name = objective.attention_pattern, type(decoder).__name__
    noise = getattr(decoder, "corruption", None)
    if noise is not None and noise.forbidden != objective.forbidden:
        raise ValueError(
            f"{name}.corruption is {type(noise).__name__} with mask tokens {noise.forbidden}, but "
            f"those of {type(objective).__name__} are {objective.forbidden}; bind CORRUPTION for "
            "both."
        )
    if getattr(decoder, "prefix_cache", False) and pattern not in CACHED_PATTERNS:
        raise ValueError(
            f"{name}.prefix_cache = True, but the prefix sees the canvas under attention_pattern = "
            f"{pattern!r}; train with 'cached_prefix' (objectives/diffusion_cached_prefix.gin), or "
            "set prefix_cache = False."
        )
    trained, decoded = (getattr(part, "block_length", 0) for part in (objective, decoder))
    if trained != decoded:
        raise ValueError(
            f"{name}.block_length = {decoded}, but the model is trained with "
            f"{type(objective).__name__}.block_length = {trained}; set BLOCK_LENGTH for both."
        )
