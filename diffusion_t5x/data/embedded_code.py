"""Small Python functions with assertions, composed from parts whose meaning is known.

A problem reads like MBPP's: a description and one assertion in, a function out, which must also
pass assertions that were not shown. What a function should return is computed by the reference
callables below; no generated text is run here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

# What is done to each element: name, words, expression of x, reference.
MAPS: tuple[tuple[str, str, str, Callable[[int], int]], ...] = (
    ("squares", "the squares", "x * x", lambda x: x * x),
    ("cubes", "the cubes", "x ** 3", lambda x: x**3),
    ("doubles", "the doubles", "2 * x", lambda x: 2 * x),
    ("negatives", "the negatives", "-x", lambda x: -x),
    ("absolutes", "the absolute values", "abs(x)", abs),
    ("values", "the values", "x", lambda x: x),
    *tuple(
        (name.format(n), words.format(n), text.format(n), make(n))
        for n in range(2, 10)
        for name, words, text, make in (
            ("sums_{}", "the values plus {}", "x + {}", lambda n: lambda x: x + n),
            ("products_{}", "the values times {}", "x * {}", lambda n: lambda x: x * n),
            ("rests_{}", "the remainders by {}", "x % {}", lambda n: lambda x: x % n),
            ("quotients_{}", "the quotients by {}", "x // {}", lambda n: lambda x: x // n),
        )
    ),
)

# Which elements count: name, words, condition on x, reference.
FILTERS: tuple[tuple[str, str, str, Callable[[int], bool]], ...] = (
    ("all", "all numbers", "", lambda x: True),
    ("even", "the even numbers", " if x % 2 == 0", lambda x: x % 2 == 0),
    ("odd", "the odd numbers", " if x % 2 == 1", lambda x: x % 2 == 1),
    ("positive", "the positive numbers", " if x > 0", lambda x: x > 0),
    ("negative", "the negative numbers", " if x < 0", lambda x: x < 0),
    *tuple(
        (name.format(n), words.format(n), text.format(n), make(n))
        for n in range(1, 10)
        for name, words, text, make in (
            ("above_{}", "the numbers above {}", " if x > {}", lambda n: lambda x: x > n),
            ("below_{}", "the numbers below {}", " if x < {}", lambda n: lambda x: x < n),
        )
    ),
)

# What becomes of them: name, words, expression around a generator, reference.
REDUCTIONS: tuple[tuple[str, str, str, Callable[[list[int]], Any]], ...] = (
    ("sum", "the sum of", "sum({})", sum),
    ("count", "how many different", "len(set({}))", lambda xs: len(set(xs))),
    ("list", "the list of", "list({})", list),
    ("sorted", "the sorted list of", "sorted({})", sorted),
    ("reversed", "the reversed list of", "list({})[::-1]", lambda xs: xs[::-1]),
    ("largest", "the largest of", "max({}, default=0)", lambda xs: max(xs, default=0)),
    ("smallest", "the smallest of", "min({}, default=0)", lambda xs: min(xs, default=0)),
)

ARGUMENTS = ([3, -2, 8, 5], [1, 2, 3, 4, 5, 6], [-7, 0, 9, 4, -4])


def generate() -> Iterator[dict[str, Any]]:
    """Problems `{'text', 'code', 'tests'}`; every combination of parts once."""
    combinations = itertools.product(REDUCTIONS, MAPS, FILTERS)
    for (r_name, r_words, r_code, r), (m_name, m_words, m_code, m), (
        f_name,
        f_words,
        f_code,
        f,
    ) in combinations:
        name = f"{r_name}_{m_name}_{f_name}"
        expression = r_code.format(f"({m_code} for x in numbers{f_code})")
        expression = (
            expression.replace("((", "(", 1).replace("))", ")", 1)
            if ("set(" not in r_code and "default" not in r_code)
            else expression
        )
        tests = []
        for argument in ARGUMENTS:
            result = r([m(x) for x in argument if f(x)])
            tests.append(f"assert {name}({argument}) == {result}")
        yield {
            "text": f"Write a function to return {r_words} {m_words} of {f_words} in a list.",
            "code": f"def {name}(numbers):\n    return {expression}",
            "tests": tests,
        }
