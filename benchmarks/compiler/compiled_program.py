"""Collectives, memory and estimated time of an XLA executable, with loops counted in full.

XLA's own totals count the body of a loop once, however often it runs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from benchmarks.compiler import hlo_costs
from diffusion_t5x.training import collectives as hlo_collectives
from diffusion_t5x.training import hlo
from diffusion_t5x.training.collectives import Collective
from diffusion_t5x.training.hlo import UnknownTripCountError

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


def _text(compiled: Any) -> str:
    return compiled if isinstance(compiled, str) else compiled.as_text()


def _program(compiled: Any, unknown_trips: int | None) -> hlo.Program:
    return hlo.Program(_text(compiled), unknown_trips)


def collectives(compiled: Any, *, unknown_trips: int | None = None) -> tuple[Collective, ...]:
    """Lists the collectives of an executable: see `training.collectives.collectives`.

    Args:
      compiled: A `jax.stages.Compiled`, or its optimised HLO as text.
      unknown_trips: Number of iterations to assume for loops whose trip count depends on data.
    """
    return hlo_collectives.collectives(_text(compiled), unknown_trips=unknown_trips)


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
        if instruction.opcode.removesuffix("-start") not in hlo_collectives.KINDS:
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
