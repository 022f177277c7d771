"""Programming problems with assertions, composed from parts with reference implementations.

A problem reads like MBPP's: a description and one assertion in, a function out, which must also
pass assertions that were not shown. The expected results come from the reference callables below;
no generated text is run here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Part(NamedTuple):
    """A component of a function: its name, its description, its code and its reference."""

    name: str
    words: str
    code: str
    reference: Callable[[Any], Any]


# Functions of an element; the code is an expression of x.
MAPS = (
    Part("squares", "the squares", "x * x", lambda x: x * x),
    Part("cubes", "the cubes", "x ** 3", lambda x: x**3),
    Part("doubles", "the doubles", "2 * x", lambda x: 2 * x),
    Part("negatives", "the negatives", "-x", lambda x: -x),
    Part("absolutes", "the absolute values", "abs(x)", abs),
    Part("values", "the values", "x", lambda x: x),
    *(
        Part(name.format(n), words.format(n), code.format(n), make(n))
        for n in range(2, 10)
        for name, words, code, make in (
            ("sums_{}", "the values plus {}", "x + {}", lambda n: lambda x: x + n),
            ("products_{}", "the values times {}", "x * {}", lambda n: lambda x: x * n),
            ("rests_{}", "the remainders by {}", "x % {}", lambda n: lambda x: x % n),
            ("quotients_{}", "the quotients by {}", "x // {}", lambda n: lambda x: x // n),
        )
    ),
)

# Conditions on elements; the code is the end of a comprehension over x.
FILTERS = (
    Part("all", "all numbers", "", lambda x: True),
    Part("even", "the even numbers", " if x % 2 == 0", lambda x: x % 2 == 0),
    Part("odd", "the odd numbers", " if x % 2 == 1", lambda x: x % 2 == 1),
    Part("positive", "the positive numbers", " if x > 0", lambda x: x > 0),
    Part("negative", "the negative numbers", " if x < 0", lambda x: x < 0),
    *(
        Part(name.format(n), words.format(n), code.format(n), make(n))
        for n in range(1, 10)
        for name, words, code, make in (
            ("above_{}", "the numbers above {}", " if x > {}", lambda n: lambda x: x > n),
            ("below_{}", "the numbers below {}", " if x < {}", lambda n: lambda x: x < n),
        )
    ),
)

# Functions of all results; the code takes a comprehension, in parentheses unless it is the only
# argument.
REDUCTIONS = (
    Part("sum", "the sum of", "sum({})", sum),
    Part("count", "how many different", "len(set({}))", lambda xs: len(set(xs))),
    Part("list", "the list of", "list({})", list),
    Part("sorted", "the sorted list of", "sorted({})", sorted),
    Part("reversed", "the reversed list of", "list({})[::-1]", lambda xs: xs[::-1]),
    Part("largest", "the largest of", "max(({}), default=0)", lambda xs: max(xs, default=0)),
    Part("smallest", "the smallest of", "min(({}), default=0)", lambda xs: min(xs, default=0)),
)

ARGUMENTS = ([3, -2, 8, 5], [1, 2, 3, 4, 5, 6], [-7, 0, 9, 4, -4])


def generate() -> Iterator[dict[str, Any]]:
    """Yields problems `{'text', 'code', 'tests'}`, one for each combination of parts."""
    for reduce, each, keep in itertools.product(REDUCTIONS, MAPS, FILTERS):
        name = f"{reduce.name}_{each.name}_{keep.name}"
        expression = reduce.code.format(f"{each.code} for x in numbers{keep.code}")
        results = [
            reduce.reference([each.reference(x) for x in argument if keep.reference(x)])
            for argument in ARGUMENTS
        ]
        yield {
            "text": (
                f"Write a function to return {reduce.words} {each.words} of {keep.words} in a list."
            ),
            "code": f"def {name}(numbers):\n    return {expression}",
            "tests": [
                f"assert {name}({argument}) == {result}"
                for argument, result in zip(ARGUMENTS, results, strict=True)
            ],
        }
