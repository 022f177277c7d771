"""The cost of HLO instructions: operations of matrix products, and bytes of main memory."""

from __future__ import annotations

import math
import re

import numpy as np

from diffusion_t5x.training.hlo import Instruction, Program, arrays, top_level

# Instructions that move no data, or are counted at their start.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "opt-barrier",
    "iota",
}
_SLICES = ("dynamic-slice", "slice", "gather")


def flops(program: Program, instruction: Instruction) -> int:
    """Returns the floating-point operations of the matrix products in an instruction.

    A multiplication and an addition count as two. For a custom kernel, returns the FLOPs of its
    `pl.CostEstimate`, or 0.
    """
    if instruction.opcode == "custom-call":
        return _estimate(instruction, "flops") or 0
    total = 0
    for inner in (instruction, *program.inside(instruction)):
        if inner.opcode == "convolution":
            total += _convolution_flops(program, inner)
        elif inner.opcode == "dot":
            total += _dot_flops(program, inner)
    return total


def memory_bytes(program: Program, instruction: Instruction) -> int:
    """Returns the bytes read from and written to main memory; a chip's fast memory is free.

    If an array is only sliced, its slices count; if it is updated in place, the updates. For a
    custom kernel, which may read an array more than once, its `pl.CostEstimate` counts if it has
    one.
    """
    if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
        return 0
    siblings = program.siblings(instruction)
    if instruction.opcode == "fusion":
        inner = program.called(instruction)
        read = sum(
            min(_slow_bytes(siblings[name].shape), _bytes_used(program, inner, number))
            for number, name in enumerate(instruction.operands)
            if _slow_bytes(siblings[name].shape)
        )
        return read + _bytes_written(program, instruction)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _slow_bytes(siblings[instruction.operands[1]].shape)
    if instruction.opcode in _SLICES:
        return 2 * _slow_bytes(instruction.shape)
    if instruction.opcode == "copy-start":  # Its shape is (result, operand, context).
        return sum(_slow_bytes(part) for part in top_level(instruction.shape)[:2])
    read = sum(_slow_bytes(siblings[name].shape) for name in instruction.operands)
    estimate = _estimate(instruction, "bytes_accessed")
    return read + _slow_bytes(instruction.shape) if estimate is None else estimate


def _estimate(kernel: Instruction, name: str) -> int | None:
    """Returns a field of a kernel's cost estimate; None without one."""
    found = re.search(rf'"cost_estimate":\{{[^}}]*"{name}":"?(\d+)', kernel.attributes)
    return int(found.group(1)) if found else None


def _slow_bytes(shape: str) -> int:
    """Returns the bytes of those arrays of a shape that are in main memory."""
    parts = top_level(shape) if shape.startswith("(") else [shape]
    if len(parts) > 1 or shape.startswith("("):
        return sum(_slow_bytes(part.strip()) for part in parts)
    return 0 if re.search(r"S\([1-9]", shape) else sum(size for _, size in arrays(shape))


def _bytes(shape: str) -> int:
    return sum(size for _, size in arrays(shape))


def _bytes_used(program: Program, inner: dict[str, Instruction], number: int) -> int:
    """Returns the bytes that a fused computation reads of parameter `number`."""
    name = next(i.name for i in inner.values() if i.opcode == "parameter" and int(i.text) == number)
    return _bytes_read(program, inner, name)


def _bytes_read(program: Program, inner: dict[str, Instruction], name: str) -> int:
    total = 0
    whole = _bytes(inner[name].shape)
    for user in inner.values():
        for number, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.opcode in _SLICES:
                total += _bytes(user.shape) if number == 0 else whole
            elif user.opcode == "bitcast":
                total += _bytes_read(program, inner, user.name)
            elif user.opcode == "fusion":
                total += _bytes_used(program, program.called(user), number)
            elif user.opcode != "dynamic-update-slice" or number != 0:
                total += whole
    used = any(name in user.operands for user in inner.values())
    return min(total, whole) if used else whole  # an array without a use is a result


def _bytes_written(program: Program, fusion: Instruction) -> int:
    """Returns the bytes of a fusion's results, or of its updates if they are in place."""
    inner = program.called(fusion)
    root = program.root(fusion)
    roots, parts = [root], [fusion.shape]
    if root.opcode == "tuple":
        roots, parts = [inner[name] for name in root.operands], top_level(fusion.shape)
    total = 0
    for part, result in zip(parts, roots, strict=True):
        made = result
        while made.opcode == "bitcast":
            made = inner[made.operands[0]]
        written = _slow_bytes(part.strip())
        if made.opcode == "dynamic-update-slice":
            written = min(written, _bytes(inner[made.operands[1]].shape))
        total += written
    return total


def _sizes(shape: str) -> list[int]:
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(size) for size in found.group(1).split(",") if size] if found else []


def _dot_flops(program: Program, dot: Instruction) -> int:
    left = _sizes(program.siblings(dot)[dot.operands[0]].shape)
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    contracted = [int(axis) for axis in found.group(1).split(",") if axis] if found else []
    return 2 * math.prod(_sizes(dot.shape)) * math.prod(left[axis] for axis in contracted)


def _convolution_flops(program: Program, convolution: Instruction) -> int:
    """Counts two operations per product of an input, none for padding and dilation."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    assert labels, convolution.name
    left_labels, right_labels, out_labels = labels.groups()
    siblings = program.siblings(convolution)
    left, right = (_sizes(siblings[name].shape) for name in convolution.operands)
    out = _sizes(convolution.shape)
    window = _window(convolution.attributes, sum(label.isdigit() for label in out_labels))
    pairs = 1
    for axis, settings in enumerate(window):
        label = str(axis)
        pairs *= _pairs(
            left[left_labels.index(label)],
            right[right_labels.index(label)],
            out[out_labels.index(label)],
            settings,
        )
    batch, feature = out[out_labels.index("b")], out[out_labels.index("f")]
    return 2 * batch * feature * right[right_labels.index("i")] * pairs


def _window(attributes: str, axes: int) -> list[dict[str, str]]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    settings: list[dict[str, str]] = [{} for _ in range(axes)]
    for part in found.group(1).split() if found else []:
        name, values = part.split("=")
        for axis, value in enumerate(values.split("x")):
            settings[axis][name] = value
    return settings


def _pairs(inputs: int, kernel: int, outputs: int, settings: dict[str, str]) -> int:
    """Counts the pairs of an output and a kernel position that meet an input."""
    dilation = int(settings.get("lhs_dilate", 1))
    low = int(settings.get("pad", "0_0").split("_")[0])
    positions = (
        np.arange(outputs)[:, None] * int(settings.get("stride", 1))
        + np.arange(kernel)[None] * int(settings.get("rhs_dilate", 1))
        - low
    )
    inside = (positions >= 0) & (positions <= (inputs - 1) * dilation)
    return int(np.sum(inside & (positions % dilation == 0)))
