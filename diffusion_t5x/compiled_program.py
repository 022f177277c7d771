"""What XLA says of a program it compiled: collectives, memory and time, loops counted in full.

XLA's own totals count the body of a loop once, however often it runs. Here the optimised HLO is
read with the trip count of every loop: from the annotation `known_trip_count` where XLA wrote one,
else from the loop itself, an induction variable with a constant start, step and bound.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_SCALAR = re.compile(r"\(?(?:pred|[su]\d+)\[\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


class UnknownTripCountError(ValueError):
    """How often a loop runs is decided by data, so that what it costs cannot be told."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program, as one device sees it.

    Attributes:
      kind: one of `KINDS`.
      bytes: of the arrays it leaves on one device, each time it runs: the gathered array of an
        all-gather, the share of a reduce-scatter. Not the traffic of links, which depends on the
        algorithm.
      shapes: of those arrays, such as 'f32[128,64]'.
      times: how often it runs in one call of the program.
    """

    kind: str
    bytes: int
    shapes: tuple[str, ...]
    times: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device while the program runs.

    Attributes:
      arguments: what the program is called with.
      outputs: what it returns.
      aliased: outputs that take the place of donated arguments.
      temporaries: what it needs in between.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int

    @property
    def total(self) -> int:
        """All that is held at once, in bytes."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str  # what stands between the brackets of operands
    attributes: str

    def called(self, attribute: str) -> str:
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        assert found, (self.name, attribute)
        return found.group(1)


@dataclasses.dataclass
class _Computation:
    instructions: dict[str, _Instruction]
    root: str = ""


@dataclasses.dataclass
class _Scope:
    """A computation as it is called: what its parameters are, as far as that is known."""

    computation: _Computation
    arguments: tuple[Any, ...]
    values: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Element:
    """What a loop computes: its element `index`, with `added` to it."""

    index: int
    added: int = 0


@dataclasses.dataclass(frozen=True)
class _Comparison:
    direction: str
    left: Any
    right: Any


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    raise ValueError(f"HLO with an open bracket: {text[:200]!r}.")


def _parse_instruction(name: str, text: str) -> _Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    opcode = re.match(r" ([a-z][\w\-]*)\(", text[end:])
    if not opcode:
        raise ValueError(f"HLO with an instruction of unknown form: {text[:200]!r}.")
    opening = end + opcode.end() - 1
    closing = _closing(text, opening)
    inside = text[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return _Instruction(
        name, text[:end], opcode.group(1), operands, inside, text[closing + 1 :].strip()
    )


def _arrays(shape: str) -> list[tuple[str, int]]:
    """Each array of a shape: 'f32[2,3]' and its bytes."""
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


def _top_level(shape: str) -> list[str]:
    """The elements of a tuple's shape."""
    parts, depth, start = [], 0, 1
    for index, letter in enumerate(shape):
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(letter, 0)
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            parts.append(shape[start:index])
            start = index + 1
    return parts


class _Program:
    """The computations of an HLO module, and how often each runs."""

    def __init__(self, text: str, unknown_trips: int | None):
        self._computations: dict[str, _Computation] = {}
        self._unknown_trips = unknown_trips
        current: _Computation | None = None
        entry = None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self._computations[header.group(2)] = _Computation({})
                entry = header.group(2) if header.group(1) else entry
            elif line.startswith("}"):
                current = None
            elif current and (found := _INSTRUCTION.match(line)):
                instruction = _parse_instruction(found.group(2), found.group(3))
                current.instructions[instruction.name] = instruction
                current.root = instruction.name if found.group(1) else current.root
        if entry is None:
            raise ValueError("The text is no optimised HLO: it has no ENTRY computation.")
        self._entry = entry

    def executions(self) -> Iterator[tuple[_Instruction, int]]:
        """Every instruction outside fusions, loops and branches included, and its executions."""
        yield from self._walk(self._scope(self._entry), 1)

    def inside(self, instruction: _Instruction) -> Iterator[_Instruction]:
        """What a fusion or asynchronous call consists of; nothing for other instructions."""
        if instruction.opcode not in ("fusion", "async-start"):
            return
        for inner in self._computations[instruction.called("calls")].instructions.values():
            yield inner
            yield from self.inside(inner)

    def _walk(self, scope: _Scope, times: int) -> Iterator[tuple[_Instruction, int]]:
        for instruction in scope.computation.instructions.values():
            yield instruction, times
            if instruction.opcode == "while":
                state = self._loop_state(scope, instruction)
                trips = self._trips(scope, instruction, state)
                condition = self._scope(instruction.called("condition"), (state,))
                yield from self._walk(condition, times * (trips + 1))
                body = self._scope(instruction.called("body"), (state,))
                yield from self._walk(body, times * trips)
            elif instruction.opcode == "call":
                values = tuple(self._value(scope, operand) for operand in instruction.operands)
                called = self._scope(instruction.called("to_apply"), values)
                yield from self._walk(called, times)
            elif instruction.opcode == "conditional":
                for branch in _branches(instruction):
                    yield from self._walk(self._scope(branch), times)

    def _scope(self, name: str, arguments: tuple[Any, ...] = ()) -> _Scope:
        return _Scope(self._computations[name], arguments)

    def _loop_state(self, scope: _Scope, loop: _Instruction) -> list[Any]:
        """Elements that no iteration changes, by their value; the others as `_Element`."""
        count = len(_top_level(loop.shape)) if loop.shape.startswith("(") else 1
        unchanged = [_Element(index) for index in range(count)]
        start = self._value(scope, loop.operands[0])
        end = self._root(loop.called("body"), (unchanged,))
        if not (isinstance(start, list) and isinstance(end, list)):
            return unchanged
        return [
            first if last == same and isinstance(first, int) else same
            for first, last, same in zip(start, end, unchanged, strict=True)
        ]

    def _trips(self, scope: _Scope, loop: _Instruction, state: list[Any]) -> int:
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
            stepped = isinstance(after, _Element) and after.index == index and after.added
            if stepped and isinstance(begin, int) and isinstance(test.right, int):
                first = begin + test.left.added
                trips = _count(first, after.added, test.direction, test.right)
        if trips is None:
            trips = self._unknown_trips
        if trips is None:
            raise UnknownTripCountError(
                f"How often loop %{loop.name} runs is decided while it runs, or is written in a "
                "way that is not understood: expected an integer with a constant start, step and "
                "bound, as jax.lax.scan and fori_loop make them. Give `unknown_trips` to count "
                "such loops as that many iterations."
            )
        return trips

    def _root(self, name: str, arguments: tuple[Any, ...]) -> Any:
        return self._value(self._scope(name, arguments), self._computations[name].root)

    def _value(self, scope: _Scope, name: str) -> Any:
        """An integer, `_Element`, `_Comparison`, or a list of them; None for anything else."""
        if name not in scope.values:
            scope.values[name] = None
            if found := scope.computation.instructions.get(name):
                scope.values[name] = self._evaluate(scope, found)
        return scope.values[name]

    def _evaluate(self, scope: _Scope, found: _Instruction) -> Any:
        value = None
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

    def _evaluate_scalar(self, scope: _Scope, found: _Instruction) -> Any:
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


def _branches(instruction: _Instruction) -> list[str]:
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
    """Iterations of `for (i = first; i <direction> bound; i += step)`; None if they never end."""
    if step < 0:
        first, step, bound = -first, -step, -bound
        direction = {"GT": "LT", "GE": "LE"}.get(direction, "" if direction != "NE" else "NE")
    if direction == "NE":
        steps, rest = divmod(bound - first, step)
        return steps if not rest and steps >= 0 else None
    if direction not in ("LT", "LE"):
        return None
    return max(0, math.ceil((bound + (direction == "LE") - first) / step))


def _program(compiled: Any, unknown_trips: int | None) -> _Program:
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    return _Program(text, unknown_trips)


def _outputs(instruction: _Instruction) -> str:
    """The shape of what a collective leaves; an asynchronous start carries its operands too."""
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        return _top_level(instruction.shape)[1]
    return instruction.shape


def collectives(compiled: Any, *, unknown_trips: int | None = None) -> tuple[Collective, ...]:
    """The collectives of a program, in its order; asynchronous ones are counted where they start.

    Of a conditional, every branch is counted.

    Args:
      compiled: a `jax.stages.Compiled`, or its optimised HLO as text.
      unknown_trips: iterations to count for loops whose number of iterations data decide.

    Raises:
      UnknownTripCountError: such a loop is met and `unknown_trips` is None.
    """
    program = _program(compiled, unknown_trips)
    found = []
    for outer, times in program.executions():
        for instruction in (outer, *program.inside(outer)):
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                arrays = _arrays(_outputs(instruction))
                shapes = tuple(shape for shape, _ in arrays)
                found.append(Collective(kind, sum(size for _, size in arrays), shapes, times))
    return tuple(found)


def memory(compiled: Any) -> Memory:
    """What a compiled program (`jax.stages.Compiled`) needs of one device's memory."""
    stats = compiled.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
    )


def estimated_seconds(compiled: Any, *, unknown_trips: int | None = None) -> float | None:
    """Seconds of one call by the TPU compiler's estimate; None where it makes none, as on CPUs.

    The compiler's `optimal_seconds` sums what each instruction needs at the chip's peak rates, and
    counts each loop once. It is multiplied by the compiler's `estimated_cycles` with loops in full
    over the same with loops once. Collectives are not part of either.

    Args:
      compiled: a `jax.stages.Compiled`.
      unknown_trips: iterations to count for loops whose number of iterations data decide.

    Raises:
      UnknownTripCountError: such a loop is met and `unknown_trips` is None.
    """
    seconds = (compiled.cost_analysis() or {}).get("optimal_seconds", 0.0)
    once = full = 0
    for instruction, times in _program(compiled, unknown_trips).executions():
        if cycles := _CYCLES.search(instruction.attributes):
            once += int(cycles.group(1))
            full += int(cycles.group(1)) * times
    return seconds * full / once if once and seconds > 0 else None
