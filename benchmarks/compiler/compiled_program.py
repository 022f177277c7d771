"""Collectives, memory and estimated time of an XLA executable, with loops counted in full.

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
    "launches",
    "main_memory_bytes",
    "memory",
]

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions for which a GPU launches nothing.
NOT_LAUNCHED = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("while", "conditional", "call"),
}
# Rates that libtpu's own estimates imply for bfloat16 products, in operations per second, and for
# main memory, in bytes per second: found from its estimates for a product and a sum of large
# matrices.
TPU_RATES = {
    "TPU v4": (241e12, 0.98e12),
    "TPU v5": (394e12, 2.35e12),  # v5p
    "TPU v5 lite": (197e12, 0.74e12),  # v5e
    "TPU v6 lite": (918e12, 1.64e12),  # v6e
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of an executable, from the view of one device.

    Attributes:
      kind: One of `KINDS`.
      bytes: Bytes of the arrays that one execution leaves on a device: the gathered array of an
        all-gather, the shard of a reduce-scatter. Not the traffic of links, which depends on the
        algorithm.
      shapes: Shapes of those arrays, such as 'f32[128,64]'.
      times: Number of executions in one call.
    """

    kind: str
    bytes: int
    shapes: tuple[str, ...]
    times: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that an executable occupies on one device.

    Attributes:
      arguments: Size of its arguments.
      outputs: Size of its results.
      aliased: Size of the results that take the place of donated arguments.
      temporaries: Size of intermediate arrays.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int

    @property
    def total(self) -> int:
        """Size of all arrays that exist at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


def _program(compiled: Any, unknown_trips: int | None) -> hlo.Program:
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    return hlo.Program(text, unknown_trips)


def _outputs(instruction: hlo.Instruction) -> str:
    """Returns the shape of a collective's result; an asynchronous start carries operands too."""
    starts = ("all-gather-start", "collective-permute-start", "reduce-scatter-start")
    if instruction.opcode in starts:
        return hlo.top_level(instruction.shape)[1]
    return instruction.shape


def collectives(compiled: Any, *, unknown_trips: int | None = None) -> tuple[Collective, ...]:
    """Lists the collectives of an executable in order, asynchronous ones where they start.

    Counts every branch of a conditional.

    Args:
      compiled: A `jax.stages.Compiled`, or its optimised HLO as text.
      unknown_trips: Number of iterations to assume for loops whose trip count depends on data.

    Raises:
      UnknownTripCountError: If there is such a loop and `unknown_trips` is None.
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
    """Returns the memory that an executable needs on one device, by XLA's own account.

    Args:
      compiled: A `jax.stages.Compiled`.
    """
    stats = compiled.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
    )


def estimated_seconds(compiled: Any, *, unknown_trips: int | None = None) -> float | None:
    """Estimates the seconds of one call on a TPU; None for other devices.

    Adds up, for each execution of an instruction, the longer of the time for its matrix products
    and the time for its main memory traffic, at the rates of `TPU_RATES`. Collectives and
    elementwise operations are not counted. The compiler's own `optimal_seconds` is the same sum
    (within 2 % without loops) with two differences: it counts each loop once, and prefetches into
    fast memory five times.

    Args:
      compiled: A `jax.stages.Compiled`.
      unknown_trips: Number of iterations to assume for loops whose trip count depends on data.

    Raises:
      UnknownTripCountError: If there is such a loop and `unknown_trips` is None.
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
    """Returns the bytes that one call reads from and writes to one device's main memory.

    Args:
      compiled: A `jax.stages.Compiled`, or its optimised HLO as text.
      unknown_trips: Number of iterations to assume for loops whose trip count depends on data.

    Raises:
      UnknownTripCountError: If there is such a loop and `unknown_trips` is None.
    """
    program = _program(compiled, unknown_trips)
    return sum(hlo_costs.memory_bytes(program, i) * times for i, times in program.executions())


def launches(compiled: Any) -> list[tuple[int | None, int]]:
    """Counts what each outermost loop of a program launches on a GPU in one turn.

    These are fusions, library calls and copies; loops inside count in full, without conditions.

    Args:
      compiled: A `jax.stages.Compiled`, or its optimised HLO as text.

    Returns:
      For each loop its turns, None where they depend on data, and the launches of a turn.

    Raises:
      UnknownTripCountError: If the turns of a loop inside depend on data.
    """
    return [
        (turns, sum(times for found, times in executed if found.opcode not in NOT_LAUNCHED))
        for turns, executed in _program(compiled, None).outer_loops()
    ]


def _device_kind(compiled: Any) -> str:
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    return next(iter(shardings[0].device_set)).device_kind
