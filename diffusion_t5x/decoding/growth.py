"""How long a key-value cache is while a text grows.

A step that appends to a cache reads all of it, room included, so a cache that has room for the
whole text from the beginning is read in vain for the most part.
"""

from __future__ import annotations

FIRST = 128


def cache_lengths(length: int, first: int = FIRST) -> list[int]:
    """`first` tokens, then twice as many, and so on up to `length`, which comes last."""
    lengths = []
    while first < length:
        lengths.append(first)
        first *= 2
    return [*lengths, length]
