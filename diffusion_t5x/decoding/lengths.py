"""The sequence lengths that decoding compiles for."""

from __future__ import annotations

FIRST = 128


def cache_lengths(length: int, first: int = FIRST) -> list[int]:
    """Returns the lengths of a growing key-value cache: `first`, twice that, ..., `length`.

    A step that appends to a cache attends to all of it, free room included, so a cache with room
    for the whole text from the start would cost more than it holds.
    """
    lengths = []
    while first < length:
        lengths.append(first)
        first *= 2
    return [*lengths, length]


def bucket_lengths(length: int, multiple: int) -> list[int]:
    """Returns 1, 2, 3, 4, 6, 8, 12, 16, ... times `multiple`, two per doubling, and `length`.

    For a canvas of 4,096 tokens and a multiple of 8 these are 18 lengths; all multiples are 512.
    """
    lengths, count = [], 1
    while count * multiple < length:
        lengths.append(count * multiple)
        count += max(1, (1 << count.bit_length()) >> 2)
    return [*lengths, length]
