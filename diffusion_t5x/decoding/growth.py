"""Lengths that programs are compiled for, while caches grow and less of a canvas is read."""

from __future__ import annotations

FIRST = 128


def cache_lengths(length: int, first: int = FIRST) -> list[int]:
    """Of a key-value cache: `first` tokens, twice as many, and so on; `length` comes last.

    A step that appends to a cache reads all of it, room included, so a cache that has room for the
    whole text from the beginning is read in vain for the most part.
    """
    lengths = []
    while first < length:
        lengths.append(first)
        first *= 2
    return [*lengths, length]


def bucket_lengths(length: int, multiple: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... times `multiple`, two for each doubling; `length` comes last.

    A canvas of 4,096 tokens has 18 of them for a multiple of 8, where all multiples would be 512.
    """
    lengths, count = [], 1
    while count * multiple < length:
        lengths.append(count * multiple)
        count += max(1, (1 << count.bit_length()) >> 2)
    return [*lengths, length]
