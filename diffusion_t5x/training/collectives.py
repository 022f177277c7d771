"""What the devices of a compiled program send each other, read from its optimised HLO."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

from diffusion_t5x.training import hlo

GIB = 2**30
KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip


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
class Sent:
    """Bytes that the collectives of one call leave on a device, by kind.

    Attributes:
      results: Kind of collective -> bytes of its results, as `Collective.bytes`.
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


def collectives(text: str, *, unknown_trips: int | None = None) -> tuple[Collective, ...]:
    """Lists the collectives of an executable in order, asynchronous ones where they start.

    Counts every branch of a conditional.

    Args:
      text: The optimised HLO, `jax.stages.Compiled.as_text()`.
      unknown_trips: Number of iterations to assume for loops whose trip count depends on data.

    Raises:
      hlo.UnknownTripCountError: If there is such a loop and `unknown_trips` is None.
    """
    program = hlo.Program(text, unknown_trips)
    found = []
    for outer, times in program.executions():
        for instruction in (outer, *program.inside(outer)):
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                arrays = hlo.arrays(_outputs(instruction))
                shapes = tuple(shape for shape, _ in arrays)
                found.append(Collective(kind, sum(size for _, size in arrays), shapes, times))
    return tuple(found)


def sent(text: str) -> Sent:
    """Adds up what the collectives of an executable leave on each device; see `collectives`."""

    def results(unknown_trips: int | None) -> dict[str, int]:
        total = Counter[str]()
        for one in collectives(text, unknown_trips=unknown_trips):
            total[one.kind] += one.bytes * one.times
        return dict(total)

    try:
        return Sent(results(None))
    except hlo.UnknownTripCountError:
        once = results(1)
        return Sent(once, at_least=results(2) != once)


def _outputs(instruction: hlo.Instruction) -> str:
    """Returns the shape of a collective's result; an asynchronous start carries operands too."""
    starts = ("all-gather-start", "collective-permute-start", "reduce-scatter-start")
    if instruction.opcode in starts:
        return hlo.top_level(instruction.shape)[1]
    return instruction.shape
