"""Text from decoded tokens."""

from __future__ import annotations

import numpy as np
import seqio


def end_text(tokens: np.ndarray, eos_id: int | None) -> np.ndarray:
    """Overwrites the first end-of-text or padding token, and all after it, with end-of-text.

    The text of a canvas ends at the first of either. A denoiser writes padding after the text, but
    nothing prevents a stray token there. If the vocabulary has no `eos_id`, padding is written.
    Tokens are `[..., length]` int.
    """
    end = eos_id or 0
    over = np.logical_or.accumulate((tokens == end) | (tokens == 0), axis=-1)
    return np.where(over, end, tokens)


def close_holes(tokens: np.ndarray, fixed: np.ndarray, eos_id: int | None) -> np.ndarray:
    """Moves padding and end-of-text tokens out of the holes between fixed positions, to the end.

    A hole is a fixed number of positions, of which the text that fills it may leave some as
    padding. What follows the last fixed token of the text is no hole, and stays as it is.

    Args:
      tokens: `[..., length]` int.
      fixed: `[..., length]` bool, which positions were given.
    """
    text = fixed & (tokens != 0)
    followed = np.logical_or.accumulate(text[..., ::-1], axis=-1)[..., ::-1]
    empty = ~fixed & followed & ((tokens == 0) | (tokens == (eos_id or 0)))
    order = np.argsort(empty, axis=-1, stable=True)
    return np.take_along_axis(np.where(empty, 0, tokens), order, axis=-1)


def detokenize(tokens: np.ndarray, vocabulary: seqio.Vocabulary) -> str:
    """Decodes tokens `[length]` up to the end of the text."""
    ended = end_text(tokens, vocabulary.eos_id)
    text = ended[ended != (vocabulary.eos_id or 0)]
    return vocabulary.decode([int(token) for token in text])
