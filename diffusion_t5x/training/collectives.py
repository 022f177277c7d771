"""What the devices of a compiled program send each other, read from its optimised HLO."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Mapping

GIB = 2**30
_KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
# An asynchronous collective counts where it ends: only there is its shape that of its result.
_COLLECTIVE = re.compile(rf" = (?P<shape>.+?) (?P<kind>{'|'.join(_KINDS)})(?:-done)?\(")
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,<=]*)\]")
_CALLS = re.compile(r"\b(?:calls|to_apply|body|\w+_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Sent:
    """Bytes that the collectives of one call leave on a device, by kind.

    Attributes:
      results: Kind of collective -> bytes of its results: the gathered array of an all-gather, the
        shard of a reduce-scatter. Not the traffic of links, which depends on the algorithm.
      at_least: True if a loop with collectives is of unknown length, and counted once.
    """

    results: Mapping[str, int]
    at_least: bool = False

    def __str__(self) -> str:
        others = sum(self.results.values())
        parts = []
        for kind in ("all-reduce", "all-gather"):
            others -= self.results.get(kind, 0)
            parts.append(f"{kind} {self.results.get(kind, 0) / GIB:.3f}")
        bound = "at least " if self.at_least else ""
        return f"collectives, GiB: {bound}{', '.join(parts)}, others {others / GIB:.3f}"


def sent(hlo: str) -> Sent:
    """Returns what the collectives of an optimised HLO module leave on each device.

    Loops count as often as they run, and each branch of a conditional counts.

    Args:
      hlo: The module as text, `jax.stages.Compiled.as_text()`.
    """
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            lines = computations.setdefault(header["name"], [])
            entry = header["name"] if header["entry"] else entry
        else:
            lines.append(line)
    unknown = False

    @functools.cache
    def within(name: str) -> Counter[str]:
        nonlocal unknown
        total: Counter[str] = Counter()
        for line in computations.get(name, ()):
            if found := _COLLECTIVE.search(line):
                total[found["kind"]] += _bytes(found["shape"])
                continue
            called = _CALLS.findall(line)
            for branches in _BRANCHES.findall(line):
                called += re.findall(r"[\w.\-]+", branches)
            inner = sum((within(one) for one in called), Counter())
            if not inner or "-done(" in line:  # an asynchronous call counts where it starts
                continue
            trips = _TRIPS.search(line) if " while(" in line else None
            unknown |= " while(" in line and trips is None
            times = int(trips[1]) if trips else 1
            total.update({kind: size * times for kind, size in inner.items()})
        return total

    return Sent(dict(within(entry)), unknown)


def _bytes(shape: str) -> int:
    total = 0
    for dtype, bits, sizes in _ARRAY.findall(shape):
        length = math.prod(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        total += math.ceil(length * (int(bits) if bits else {"pred": 8}.get(dtype, 0)) / 8)
    return total
