"""From decoded tokens to text."""

from __future__ import annotations

from typing import Any

import numpy as np


def end_text(tokens: np.ndarray, eos_id: int | None, pad_id: int = 0) -> np.ndarray:
    """Overwrites everything from the first end-of-text or padding token on with end-of-text.

    A canvas may hold tokens after its end: a denoiser writes padding where the text is over, but
    nothing forbids it a stray token behind. The text is what comes before the first of either.

    Args:
      tokens: `[..., length]` int.
      eos_id: the end-of-text token; None where the vocabulary has none, and padding is used.
      pad_id: the padding token.

    Returns:
      `[..., length]`, after whose text there are only end-of-text tokens.
    """
    end = pad_id if eos_id is None else eos_id
    over = np.logical_or.accumulate((tokens == end) | (tokens == pad_id), axis=-1)
    return np.where(over, end, tokens)


def detokenize(tokens: np.ndarray, vocabulary: Any) -> str:
    """The text of `tokens [length]` under a `seqio.Vocabulary`."""
    end = vocabulary.eos_id if vocabulary.eos_id is not None else 0
    ended = end_text(tokens, vocabulary.eos_id)
    return vocabulary.decode([int(token) for token in ended[: int(np.sum(ended != end))]])
