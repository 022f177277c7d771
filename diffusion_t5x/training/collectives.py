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
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>.+?) (?P<opcode>[a-z][\w\-]*)"
    r"\((?P<inside>[^)]*)\)(?P<attributes>.*)$"
)
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,<=]*)\]")
_CALLS = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
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
    computations: dict[str, _Computation] = {}
    entry, current = "", _Computation()
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[2]] = _Computation()
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            current[found["name"]] = found
            current.root = found if found["root"] else current.root
    unknown = False

    @functools.cache
    def within(name: str) -> Counter[str]:
        nonlocal unknown
        computation, total = computations[name], Counter[str]()
        for instruction in computation.values():
            opcode, attributes = instruction["opcode"], instruction["attributes"]
            # An asynchronous collective counts where it ends, since only there is its shape that
            # of its result; another asynchronous call counts where it starts.
            if (kind := opcode.removesuffix("-done")) in _KINDS:
                total[kind] += _bytes(instruction["shape"])
                continue
            called = [] if opcode.endswith(("-done", "-update")) else _CALLS.findall(attributes)
            for branches in _BRANCHES.findall(attributes):
                called += re.findall(r"[\w.\-]+", branches)
            inner = sum((within(one) for one in called), Counter[str]())
            if not inner:
                continue
            trips = _trips(computations, computation, instruction) if opcode == "while" else 1
            unknown |= trips is None
            total.update({kind: size * (trips or 1) for kind, size in inner.items()})
        return total

    return Sent(dict(within(entry)), unknown)


class _Computation(dict[str, re.Match[str]]):
    """Instructions by name, and the one whose value is returned."""

    root: re.Match[str] | None = None

    def find(self, name: str) -> re.Match[str] | None:
        """Returns the instruction that a name stands for, past copies."""
        found = self.get(name)
        while found and found["opcode"] in ("copy", "bitcast", "copy-start", "copy-done"):
            found = self.get(_operands(found)[0])
        return found

    def element(self, index: int) -> re.Match[str] | None:
        """Returns the instruction of an element of the returned tuple."""
        return self.find(_operands(self.root)[index]) if self.root else None


def _trips(
    computations: Mapping[str, _Computation], outer: _Computation, loop: re.Match[str]
) -> int | None:
    """Returns how often a loop runs: as annotated, or from a counter; None if neither is there.

    A counter starts at a constant, rises by a constant, and is compared with a constant.
    """
    if known := _TRIPS.search(loop["attributes"]):
        return int(known[1])
    names = dict(re.findall(r"\b(condition|body)=%?([\w.\-]+)", loop["attributes"]))
    condition, body = computations[names["condition"]], computations[names["body"]]
    start = outer.find(_operands(loop)[0])
    test = condition.root
    if not (start and start["opcode"] == "tuple" and test and "direction=LT" in test["attributes"]):
        return None
    first = [outer.find(name) for name in _operands(start)]

    def carried(at: re.Match[str] | None) -> int | None:
        """Returns the value of a constant inside the loop, also of one that it carries along."""
        if (index := _index(at)) is not None and _index(body.element(index)) == index:
            at = first[index]
        return _number(at)

    counter, bound = (condition.find(name) for name in _operands(test))
    index, end = _index(counter), carried(bound)
    step = body.element(index) if index is not None else None
    if index is None or end is None or step is None or step["opcode"] != "add":
        return None
    left, right = (body.find(name) for name in _operands(step))
    begin, by = _number(first[index]), carried(left if _index(right) == index else right)
    if begin is None or not by or by < 0 or index not in (_index(left), _index(right)):
        return None
    return max(0, -(-(end - begin) // by))


def _operands(instruction: re.Match[str]) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction["inside"])


def _number(instruction: re.Match[str] | None) -> int | None:
    """Returns the value of a whole constant; None if the instruction is another."""
    if instruction is None or instruction["opcode"] != "constant":
        return None
    return int(instruction["inside"]) if re.fullmatch(r"-?\d+", instruction["inside"]) else None


def _index(instruction: re.Match[str] | None) -> int | None:
    """Returns which element of a loop's state an instruction takes; None if it takes none."""
    if instruction is None or instruction["opcode"] != "get-tuple-element":
        return None
    found = re.search(r"\bindex=(\d+)", instruction["attributes"])
    return int(found[1]) if found else None


def _bytes(shape: str) -> int:
    total = 0
    for dtype, bits, sizes in _ARRAY.findall(shape):
        length = math.prod(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        total += math.ceil(length * (int(bits) if bits else {"pred": 8}.get(dtype, 0)) / 8)
    return total
