"""Decoding, training and numerics on one accelerator, in a few minutes.

python -m benchmarks.accelerator                         # on the card (or TPU) of this machine
python -m benchmarks.accelerator --sections=decoding,training --sizes=base --limit_seconds=300
python -m benchmarks.accelerator --compile_for=h100:1x1  # compile every program, without a card
python -m benchmarks.accelerator --sizes=tiny            # on a CPU, to see that it runs

A JSON line is printed as soon as a figure is there, the most wanted first, so that a run that is
cut off has measured what it could; `compile_seconds` are apart. It needs neither TensorFlow nor
SeqIO nor the network. With `--compile_for` nothing is run: lines have the seconds of the compiler,
the temporary memory, and for each outermost loop its turns (null where they depend on data) and the
kernels, library calls and copies of a turn, which in decoding is a token or a step.

peaks: the rates of a product of 8,192 x 8,192 matrices in bfloat16, and of a copy.
decoding: one text of 512 tokens, and eight, after prefixes of 32: AR (greedy), ten steps of one
  canvas and of eight, the settings of decoders/fast.gin, and blocks of 128; and how many times as
  fast as AR. `long` is the same with 4,096 tokens.
training: loss and gradient of 64 texts of 512 tokens, AR and diffusion, by XLA's attention and by
  the fused kernel. Model FLOPs are the products of the network and the vocabulary, in both passes
  of diffusion, forwards once and backwards twice; their share is of the rate of `peaks`.
numerics: against float32 on the CPU of the machine (`JAX_PLATFORMS=cuda,cpu`): the largest
  difference of logits, and the shares of greedy tokens and of samples at equal keys that are equal.
vocabulary: the loss and gradient of AR at a vocabulary of 262,144 tokens, a quarter of the texts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from benchmarks import accelerator_programs as programs
from benchmarks.accelerator_programs import SIZES, Program
from benchmarks.compiler import compiled_program
from diffusion_t5x.training import topologies

SECTIONS = ("peaks", "decoding", "training", "numerics", "vocabulary", "long")
ROUNDS = 5
PRODUCT, COPY = 8192, 2**30  # width of matrices, and bytes
FLOAT = jnp.bfloat16


@dataclasses.dataclass
class Bench:
    """Compiles programs for a device, and runs them if it is here."""

    device: jax.Device
    sharding: NamedSharding
    is_here: bool
    deadline: float  # of `time.monotonic`, after which nothing more is begun
    product_rate: float | None = None  # FLOP/s

    def line(self, **fields: Any) -> None:
        """Prints a line."""
        print(json.dumps({"benchmark": "accelerator", **fields}), flush=True)

    def measure(self, program: Program) -> float | None:
        """Compiles a program, and prints its line; returns the median seconds if it ran."""
        if time.monotonic() > self.deadline:
            self.line(what=program.what, skipped="the time is over")
            return None
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.sharding),
            program.arguments,
        )
        started = time.monotonic()
        try:
            options = topologies.compiler_options(self.device)
            compiled = jax.jit(program.function).lower(*arguments).compile(options)
        except Exception as error:
            self.line(what=program.what, error=str(error).partition("\n")[0][:300])
            return None
        fields: dict[str, Any] = {"compile_seconds": round(time.monotonic() - started, 2)}
        fields["temporary_bytes"] = compiled_program.memory(compiled).temporaries
        seconds = None
        if self.is_here:
            try:
                seconds = self._seconds(compiled, program)
            except Exception as error:
                self.line(what=program.what, **fields, error=str(error).partition("\n")[0][:300])
                return None
            fields |= {"milliseconds": seconds * 1e3, **program.figures(seconds, self.product_rate)}
        else:
            fields["loops"] = [
                {"turns": turns, "launches_per_turn": count}
                for turns, count in compiled_program.launches(compiled)
            ]
        self.line(what=program.what, **fields)
        return seconds

    def _seconds(self, compiled: Callable[..., Any], program: Program) -> float:
        arguments = jax.device_put(programs.concrete(program.arguments), self.sharding)
        seconds = []
        for _ in range(ROUNDS + 1):
            started = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds[1:])


def measure_peaks(bench: Bench, width: int, size: int) -> None:
    """The rates that others are compared with."""
    repeats = 20

    def products(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, repeats, lambda _, x: (x @ y) * FLOAT(0.02), x)

    def copies(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, repeats, lambda _, x: x + 1, x)

    matrix = jax.ShapeDtypeStruct((width, width), FLOAT)
    flops = repeats * 2 * width**3
    seconds = bench.measure(
        Program(
            f"{repeats} products of {width} x {width}, bfloat16", products, (matrix,) * 2, flops
        )
    )
    if seconds:
        bench.product_rate = flops / seconds
        bench.line(what="product", tera_flops_per_second=bench.product_rate / 1e12)
    array = jax.ShapeDtypeStruct((size // 4,), jnp.float32)
    seconds = bench.measure(Program(f"{repeats} copies of {size} bytes", copies, (array,)))
    if seconds:
        bench.line(what="copy", tera_bytes_per_second=repeats * 2 * size / seconds / 1e12)


def measure_decoding(bench: Bench, sizes: list[str], length: int) -> None:
    """Texts by each method, the smallest first."""
    cases = [(size, batch_size) for batch_size in programs.BATCHES for size in sizes]
    for size, batch_size in cases:
        baseline = None
        for program in programs.decoding(size, length, batch_size):
            seconds = bench.measure(program)
            if program.what.startswith("AR"):
                baseline = seconds
            elif seconds and baseline:
                bench.line(what=f"{program.what}: times as fast as AR", ratio=baseline / seconds)


def measure_training(bench: Bench, sizes: list[str]) -> None:
    """Loss and gradient of each objective."""
    for size in sizes:
        found: dict[bool, float] = {}
        for fused in (False, True):
            for objective in ("autoregressive", "diffusion"):
                program = programs.gradient(size, objective, fused=fused)
                seconds = bench.measure(program)
                if objective == "autoregressive" and seconds:
                    found[fused] = seconds
                elif seconds and fused in found:
                    bench.line(what=f"{program.what}: over AR", ratio=seconds / found[fused])


def measure_numerics(bench: Bench, sizes: list[str]) -> None:
    """The device's numbers against those of the CPU in float32."""
    if not bench.is_here:
        for size in sizes:
            for dtype in ("float32", "bfloat16"):
                for program in programs.numerics(size, dtype):
                    bench.measure(program)
        return
    cpu = jax.devices("cpu")[0]
    for size in sizes:
        for dtype in ("float32", "bfloat16"):
            compared = zip(
                programs.numerics(size, "float32"), programs.numerics(size, dtype), strict=True
            )
            for exact, program in compared:
                arguments = programs.concrete(exact.arguments)
                with programs.for_device(cpu) as there:
                    want = jax.jit(exact.function)(*jax.device_put(arguments, there))
                precision = "highest" if dtype == "float32" else None
                with jax.default_matmul_precision(precision):
                    have = jax.jit(program.function)(*jax.device_put(arguments, bench.sharding))
                want, have = np.asarray(want), np.asarray(have)
                if want.dtype == np.int32:
                    fields = {"equal_tokens": float(np.mean(want == have)), "tokens": want.size}
                else:
                    fields = {"largest_difference": float(np.max(np.abs(want - have)))}
                    fields["largest_logit"] = float(np.max(np.abs(want)))
                bench.line(what=program.what, **fields)


def main(arguments: list[str] | None = None) -> None:
    """Measures the sections that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", type=_names(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--sizes", type=_names(tuple(SIZES)), default=["base", "large"])
    parser.add_argument("--compile_for", help="a card, such as h100:1x1, or a slice of TPUs")
    parser.add_argument("--limit_seconds", type=float, default=float("inf"))
    options = parser.parse_args(arguments)
    if options.compile_for:
        device = topologies.devices(options.compile_for).flat[0]
    else:
        device = jax.devices()[0]
    deadline = time.monotonic() + options.limit_seconds
    small = options.sizes == ["tiny"]
    with programs.for_device(device) as sharding:
        bench = Bench(device, sharding, is_here=not options.compile_for, deadline=deadline)
        bench.line(device=device.device_kind, jax=jax.__version__, compiled_only=not bench.is_here)
        for section in options.sections:
            if section == "peaks":
                measure_peaks(bench, *((128, 2**20) if small else (PRODUCT, COPY)))
            elif section in programs.LENGTHS:
                measure_decoding(bench, options.sizes, programs.LENGTHS[section])
            elif section == "training":
                measure_training(bench, options.sizes)
            elif section == "vocabulary":
                for fused in (False, True):
                    bench.measure(programs.large_vocabulary(options.sizes[0], fused=fused))
            else:
                measure_numerics(bench, options.sizes[:1])


def _names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        wanted = text.split(",")
        if unknown := [name for name in wanted if name not in known]:
            raise argparse.ArgumentTypeError(
                f"{unknown} is unknown; expected some of {', '.join(known)}."
            )
        return wanted

    return parse


if __name__ == "__main__":
    main()
