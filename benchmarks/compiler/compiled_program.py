"""What XLA says of a program it compiled: collectives, memory and time, loops counted in full.

XLA's own totals count the body of a loop once, however often it runs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from benchmarks.compiler import hlo, hlo_costs
from benchmarks.compiler.hlo import UnknownTripCountError

__all__ = [
    "Collective",
    "Memory",
    "UnknownTripCountError",
    "collectives",
    "estimated_seconds",
    "main_memory_bytes",
    "memory",
]

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# At what rates libtpu's own estimates count bfloat16 products, in operations per second, and main
# memory, in bytes per second: found from its estimates for a product and a sum of large matrices.
TPU_RATES = {
    "TPU v4": (241e12, 0.98e12),
    "TPU v5": (394e12, 2.35e12),  # v5p
    "TPU v5 lite": (197e12, 0.74e12),  # v5e
    "TPU v6 lite": (918e12, 1.64e12),  # v6e
}


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


def _program(compiled: Any, unknown_trips: int | None) -> hlo.Program:
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    return hlo.Program(text, unknown_trips)


def _outputs(instruction: hlo.Instruction) -> str:
    """The shape of what a collective leaves; an asynchronous start carries its operands too."""
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        return hlo.top_level(instruction.shape)[1]
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
                arrays = hlo.arrays(_outputs(instruction))
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
    """Seconds of one call on a TPU, estimated from its instructions; None for other devices.

    For each instruction the longer of its products of matrices and its main memory, at the rates of
    `TPU_RATES`, as often as it runs. Collectives and operations on single elements are not counted.
    The compiler's own `optimal_seconds` is the same sum (within 2 % where there are no loops) with
    two differences: it counts each loop once, and what is fetched into fast memory beforehand five
    times.

    Args:
      compiled: a `jax.stages.Compiled`.
      unknown_trips: iterations to count for loops whose number of iterations data decide.

    Raises:
      UnknownTripCountError: such a loop is met and `unknown_trips` is None.
    """
    rates = TPU_RATES.get(_device_kind(compiled))
    if rates is None:
        return None
    flops_rate, bytes_rate = rates
    seconds = 0.0
    program = _program(compiled, unknown_trips)
    for instruction, times in program.executions():
        if instruction.opcode.removesuffix("-start") not in KINDS:
            flops = hlo_costs.flops(program, instruction) / flops_rate
            moved = hlo_costs.memory_bytes(program, instruction) / bytes_rate
            seconds += times * max(flops, moved)
    return seconds


def main_memory_bytes(compiled: Any, *, unknown_trips: int | None = None) -> int:
    """Bytes that one call reads from and writes to one device's main memory.

    Args:
      compiled: a `jax.stages.Compiled`, or its optimised HLO as text.
      unknown_trips: iterations to count for loops whose number of iterations data decide.

    Raises:
      UnknownTripCountError: such a loop is met and `unknown_trips` is None.
    """
    program = _program(compiled, unknown_trips)
    return sum(hlo_costs.memory_bytes(program, i) * times for i, times in program.executions())


def _device_kind(compiled: Any) -> str:
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    return next(iter(shardings[0].device_set)).device_kind
