"""A parser of optimised HLO text, which counts the executions of each instruction.

The trip count of a loop is XLA's annotation `known_trip_count` if there is one; else it is derived
from an induction variable with a constant start, step and bound.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_SCALAR = re.compile(r"\(?(?:pred|[su]\d+)\[\]")


class UnknownTripCountError(ValueError):
    """The trip count of a loop depends on data, so that its cost is unknown."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `%name = shape opcode(%operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str  # between the brackets of operands
    attributes: str
    parent: str  # the name of its computation

    def called(self, attribute: str) -> str:
        """Returns the name of the computation that an attribute, such as 'body', gives."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        assert found, (self.name, attribute)
        return found.group(1)


@dataclasses.dataclass
class Computation:
    """Instructions by name, and the name of the one whose value is returned."""

    instructions: dict[str, Instruction]
    root: str = ""


@dataclasses.dataclass
class _Scope:
    """A call of a computation, with the values of its parameters as far as they are known."""

    computation: Computation
    arguments: tuple[Any, ...]
    values: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Element:
    """A loop-carried value: element `index` of the state, plus `added`."""

    index: int
    added: int = 0


@dataclasses.dataclass(frozen=True)
class _Comparison:
    direction: str
    left: Any
    right: Any


def _closing(text: str, start: int) -> int:
    """Returns the index of the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    raise ValueError(f"HLO with an open bracket: {text[:200]!r}.")


def _parse_instruction(parent: str, name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    opcode = re.match(r" ([a-z][\w\-]*)\(", text[end:])
    if not opcode:
        raise ValueError(f"HLO with an instruction of unknown form: {text[:200]!r}.")
    opening = end + opcode.end() - 1
    closing = _closing(text, opening)
    inside = text[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(
        name, text[:end], opcode.group(1), operands, inside, text[closing + 1 :].strip(), parent
    )


def arrays(shape: str) -> list[tuple[str, int]]:
    """Returns each array of a shape, such as 'f32[2,3]', and its bytes."""
    arrays = []
    for dtype, sizes in _ARRAY.findall(shape):
        lengths = [int(size.lstrip("<=")) for size in sizes.split(",") if size]
        bits = _BITS.get(dtype)
        if bits is None:
            digits = re.search(r"\d+", dtype)
            assert digits, dtype
            bits = int(digits.group())
        arrays.append((f"{dtype}[{sizes}]", math.ceil(math.prod(lengths) * bits / 8)))
    return arrays


def top_level(shape: str) -> list[str]:
    """Returns the elements of a tuple's shape."""
    parts, depth, start = [], 0, 1
    for index, letter in enumerate(shape):
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(letter, 0)
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            parts.append(shape[start:index])
            start = index + 1
    return parts


class Program:
    """The computations of an HLO module, and how often each runs."""

    def __init__(self, text: str, unknown_trips: int | None):
        self._computations: dict[str, Computation] = {}
        self._unknown_trips = unknown_trips
        current: Computation | None = None
        name, entry = "", None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                name = header.group(2)
                current = self._computations[name] = Computation({})
                entry = name if header.group(1) else entry
            elif line.startswith("}"):
                current = None
            elif current and (found := _INSTRUCTION.match(line)):
                instruction = _parse_instruction(name, found.group(2), found.group(3))
                current.instructions[instruction.name] = instruction
                current.root = instruction.name if found.group(1) else current.root
        if entry is None:
            raise ValueError("The text is no optimised HLO: it has no ENTRY computation.")
        self._entry = entry

    def executions(self) -> Iterator[tuple[Instruction, int]]:
        """Yields every instruction outside fusions, and the number of its executions."""
        yield from self._walk(self._scope(self._entry), 1)

    def outer_loops(self) -> Iterator[tuple[int | None, Iterator[tuple[Instruction, int]]]]:
        """Yields each loop of the entry: its trips, None if unknown; and what a trip executes.

        Conditions of loops inside are left out: GPUs evaluate none where the trips are known.
        """
        scope = self._scope(self._entry)
        for loop in scope.computation.instructions.values():
            if loop.opcode == "while":
                state = self._loop_state(scope, loop)
                try:
                    trips = self._trips(scope, loop, state)
                except UnknownTripCountError:
                    trips = None
                yield (
                    trips,
                    self._walk(self._scope(loop.called("body"), (state,)), 1, conditions=False),
                )

    def siblings(self, instruction: Instruction) -> dict[str, Instruction]:
        """Returns the instructions of the same computation, by name."""
        return self._computations[instruction.parent].instructions

    def called(self, fusion: Instruction) -> dict[str, Instruction]:
        """Returns the instructions of a fused computation, by name."""
        return self._computations[fusion.called("calls")].instructions

    def root(self, fusion: Instruction) -> Instruction:
        """Returns the root instruction of a fused computation."""
        computation = self._computations[fusion.called("calls")]
        return computation.instructions[computation.root]

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """Yields the instructions inside a fusion or asynchronous call; none for others."""
        if instruction.opcode not in ("fusion", "async-start"):
            return
        for inner in self._computations[instruction.called("calls")].instructions.values():
            yield inner
            yield from self.inside(inner)

    def _walk(
        self, scope: _Scope, times: int, *, conditions: bool = True
    ) -> Iterator[tuple[Instruction, int]]:
        for instruction in scope.computation.instructions.values():
            yield instruction, times
            if instruction.opcode == "while":
                state = self._loop_state(scope, instruction)
                trips = self._trips(scope, instruction, state)
                if conditions:
                    condition = self._scope(instruction.called("condition"), (state,))
                    yield from self._walk(condition, times * (trips + 1))
                body = self._scope(instruction.called("body"), (state,))
                yield from self._walk(body, times * trips, conditions=conditions)
            elif instruction.opcode == "call":
                values = tuple(self._value(scope, operand) for operand in instruction.operands)
                called = self._scope(instruction.called("to_apply"), values)
                yield from self._walk(called, times, conditions=conditions)
            elif instruction.opcode == "conditional":
                for branch in _branches(instruction):
                    yield from self._walk(self._scope(branch), times, conditions=conditions)

    def _scope(self, name: str, arguments: tuple[Any, ...] = ()) -> _Scope:
        return _Scope(self._computations[name], arguments)

    def _loop_state(self, scope: _Scope, loop: Instruction) -> list[Any]:
        """Returns loop-invariant elements by value, the others as `_Element`."""
        count = len(top_level(loop.shape)) if loop.shape.startswith("(") else 1
        unchanged = [_Element(index) for index in range(count)]
        start = self._value(scope, loop.operands[0])
        end = self._root(loop.called("body"), (unchanged,))
        if not (isinstance(start, list) and isinstance(end, list)):
            return unchanged
        return [
            first if last == same and isinstance(first, int) else same
            for first, last, same in zip(start, end, unchanged, strict=True)
        ]

    def _trips(self, scope: _Scope, loop: Instruction, state: list[Any]) -> int:
        if known := _TRIP_COUNT.search(loop.attributes):
            return int(known.group(1))
        start = self._value(scope, loop.operands[0])
        test = self._root(loop.called("condition"), (state,))
        end = self._root(loop.called("body"), (state,))
        trips = None
        if isinstance(test, _Comparison) and isinstance(test.left, _Element):
            index = test.left.index
            begin = start[index] if isinstance(start, list) else None
            after = end[index] if isinstance(end, list) else None
            if (
                isinstance(after, _Element)
                and after.index == index
                and after.added
                and isinstance(begin, int)
                and isinstance(test.right, int)
            ):
                first = begin + test.left.added
                trips = _count(first, after.added, test.direction, test.right)
        if trips is None:
            trips = self._unknown_trips
        if trips is None:
            raise UnknownTripCountError(
                f"The trip count of loop %{loop.name} depends on data, or its form is not "
                "understood: expected an integer with a constant start, step and bound, as in "
                "jax.lax.scan and fori_loop. Give `unknown_trips` to assume a number of iterations "
                "for such loops."
            )
        return trips

    def _root(self, name: str, arguments: tuple[Any, ...]) -> Any:
        return self._value(self._scope(name, arguments), self._computations[name].root)

    def _value(self, scope: _Scope, name: str) -> Any:
        """Returns an integer, `_Element`, `_Comparison`, or a list of them; None for others."""
        if name not in scope.values:
            scope.values[name] = None
            if found := scope.computation.instructions.get(name):
                scope.values[name] = self._evaluate(scope, found)
        return scope.values[name]

    def _evaluate(self, scope: _Scope, found: Instruction) -> Any:
        value: Any = None
        if found.opcode == "constant":
            value = int(found.text) if re.fullmatch(r"-?\d+", found.text) else None
        elif found.opcode == "parameter":
            number = int(found.text)
            value = scope.arguments[number] if number < len(scope.arguments) else None
        elif found.opcode == "tuple":
            value = [self._value(scope, operand) for operand in found.operands]
        elif found.opcode == "get-tuple-element":
            whole = self._value(scope, found.operands[0])
            index = re.search(r"index=(\d+)", found.attributes)
            value = whole[int(index.group(1))] if index and isinstance(whole, list) else None
        elif _SCALAR.match(found.shape):
            value = self._evaluate_scalar(scope, found)
        return value

    def _evaluate_scalar(self, scope: _Scope, found: Instruction) -> Any:
        values = [self._value(scope, operand) for operand in found.operands]
        if found.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
            return values[0]
        if found.opcode == "fusion":
            return self._root(found.called("calls"), tuple(values))
        if found.opcode == "add":
            return _sum(*values)
        direction = re.search(r"direction=(\w+)", found.attributes)
        if found.opcode == "compare" and direction:
            return _compare(direction.group(1), *values)
        return None


def _branches(instruction: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if listed:
        return re.findall(r"%([\w.\-]+)", listed.group(1))
    return [instruction.called("true_computation"), instruction.called("false_computation")]


def _sum(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        return left + right
    if isinstance(right, _Element):
        left, right = right, left
    if isinstance(left, _Element) and isinstance(right, int):
        return dataclasses.replace(left, added=left.added + right)
    return None


def _compare(direction: str, left: Any, right: Any) -> _Comparison:
    if isinstance(right, _Element):
        mirrored = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
        return _Comparison(mirrored.get(direction, direction), right, left)
    return _Comparison(direction, left, right)


def _count(first: int, step: int, direction: str, bound: int) -> int | None:
    """Counts `for (i = first; i <direction> bound; i += step)`; None if it never ends."""
    if step < 0:
        first, step, bound = -first, -step, -bound
        direction = {"GT": "LT", "GE": "LE"}.get(direction, "" if direction != "NE" else "NE")
    if direction == "NE":
        steps, rest = divmod(bound - first, step)
        return steps if not rest and steps >= 0 else None
    if direction not in ("LT", "LE"):
        return None
    return max(0, math.ceil((bound + (direction == "LE") - first) / step))
