"""Training and decoding on TPUs by the TPU compiler's account.

python -m benchmarks.tpu                                  # Base; about half an hour on two cores
python -m benchmarks.tpu --parts=decoding --sizes=base,large,xl

No TPU is needed: libtpu compiles for one (`pip install 'diffusion_t5x[tpu]'`). Nothing is run, so
nothing is measured: memory is what the compiler allocates, seconds are its estimate (see
`benchmarks.compiler.compiled_program.estimated_seconds`). Parts:

training: loss and gradient of 128 texts of 1,024 tokens, data-parallel over v5p:2x2x4, each size of
  `--sizes` at a vocabulary of 256,000, in bfloat16; T5X's too where it can be imported; and what
  `TransformerConfig.scan_layers` and each setting of `remat` change.
decoding: on one v5p chip, weights in bfloat16: one AR token with a cache of `tokens`; one denoising
  step of a canvas of `tokens` as in the paper, nothing cached; and one of a block of 128 positions
  with all before it cached. From these follow seconds of decoding `tokens` tokens: AR with a cache
  that doubles as the text grows (shorter ones than any that was compiled at its cost, others on
  lines between those that were); diffusion in 10 steps.
  A block's speed-up is 128 AR tokens over 10 steps and the one that caches it, where the text has
  `tokens` tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import partitioning as flax_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import tpu_programs
from benchmarks.compiler import compiled_program
from benchmarks.shapes import Shape, of_size
from diffusion_t5x.decoding.lengths import cache_lengths
from diffusion_t5x.runtime.partitioning import standard_logical_axis_rules
from diffusion_t5x.training import topologies

VOCABULARY = 256_000
SIZES = {name: of_size(name, VOCABULARY) for name in ("base", "large", "xl")}
TOPOLOGY = "v5p:2x2x4"
TRAIN_BATCH, TRAIN_LENGTH = 128, 1024
# Name, what it is compared with, objective, and settings of `workloads.our_model`. `LARGE_BLOCKS`
# are blocks for a chip that holds them, 128 positions of each text, and attention of 8 texts, with
# the kernel of `networks.flash_attention`.
SCANNED = {"scan_layers": True}
LARGE_BLOCKS = {
    **SCANNED,
    "remat": "full",
    "block_logits": 2**25,
    "attention_block_logits": 2**27,
    "attention_kernel": "fused",
}
HALF = {**LARGE_BLOCKS, "prefix": TRAIN_LENGTH // 2}
TRAINING = (
    ("AR", "T5X, AR", "autoregressive", {}),
    ("AR, scanned", "T5X, AR", "autoregressive", SCANNED),
    ("AR, scanned, remat dots", "T5X, AR", "autoregressive", {**SCANNED, "remat": "dots"}),
    ("AR, scanned, remat full", "T5X, AR", "autoregressive", {**SCANNED, "remat": "full"}),
    ("AR, scanned, remat full, large blocks, kernel", "T5X, AR", "autoregressive", LARGE_BLOCKS),
    ("diffusion, scanned", "AR, scanned", "diffusion", SCANNED),
    (
        "diffusion, scanned, remat full, large blocks, kernel",
        "AR, scanned, remat full, large blocks, kernel",
        "diffusion",
        LARGE_BLOCKS,
    ),
    # Half of each text is a prefix, which 'cached_prefix' reads once for both passes.
    ("AR, prefixes", "AR", "autoregressive", HALF),
    ("diffusion, prefixes", "AR, prefixes", "diffusion", HALF),
    (
        "diffusion, prefixes read once",
        "AR, prefixes",
        "diffusion",
        {**HALF, "pattern": "cached_prefix"},
    ),
)
# Of a denoising step: the kernel, and blocks of 512 positions.
DECODING = {"attention_kernel": "fused", "block_logits": 2**23}
BATCHES = (1, 8, 64)
LENGTHS = (512, 1024, 2048, 4096)
BLOCK, STEPS = 128, 10


def _line(**fields: object) -> None:
    print(json.dumps({"benchmark": "tpu", **fields}), flush=True)


def compile_for(program: tpu_programs.Program, chips: np.ndarray, donated: tuple[int, ...] = ()):
    """A program compiled for chips, batches split among them and all else on each.

    Args:
      program: its function, and the shapes of its arguments: parameters first, the last a batch.
      chips: `[chips]` devices.
      donated: arguments whose memory results may take.
    """
    function, (*held, batch) = program
    mesh = Mesh(chips.reshape(-1, 1), ("data", "model"))
    on_each = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def place(tree: Any, sharding: NamedSharding) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    rules = flax_partitioning.axis_rules(standard_logical_axis_rules())
    with jax.set_mesh(mesh), rules:
        jitted = jax.jit(function, donate_argnums=donated)
        return jitted.lower(*place(held, on_each), place(batch, rows)).compile()


def in_bfloat16(program: tpu_programs.Program) -> tpu_programs.Program:
    """The program with its parameters in bfloat16, as they are kept for decoding."""
    function, (params, *others) = program

    def cast(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)

    return function, (jax.tree.map(cast, params), *others)


def _training_programs(shape: Shape) -> Iterator[tuple[str, str, tpu_programs.Program]]:
    """Name, what it is compared with, and program."""
    if importlib.util.find_spec("t5x"):
        from benchmarks import t5x_network

        program = t5x_network.abstract_gradient(shape, TRAIN_BATCH, TRAIN_LENGTH)
        yield "T5X, AR", "", program
    for name, baseline, objective, config in TRAINING:
        yield (
            name,
            baseline,
            tpu_programs.gradient(shape, objective, TRAIN_BATCH, TRAIN_LENGTH, **config),
        )


def measure_training(sizes: list[str]) -> None:
    """Temporary memory and seconds of loss and gradient."""
    chips = topologies.devices(TOPOLOGY)
    for size in sizes:
        figures: dict[str, tuple[int, float]] = {}
        for name, baseline, program in _training_programs(SIZES[size]):
            compiled = compile_for(program, chips)
            memory = compiled_program.memory(compiled).temporaries
            seconds = compiled_program.estimated_seconds(compiled)
            figures[name] = memory, seconds
            fields: dict[str, object] = {}
            if baseline in figures:
                fields = {
                    "baseline": baseline,
                    "bytes_ratio": memory / figures[baseline][0],
                    "seconds_ratio": seconds / figures[baseline][1],
                }
            _line(
                what=f"loss and gradient, {size}, {TRAIN_BATCH} x {TRAIN_LENGTH}, {TOPOLOGY}",
                program=name,
                temporary_bytes_per_chip=memory,
                seconds=seconds,
                **fields,
            )


def _decoding_seconds(
    program: tpu_programs.Program, chip: np.ndarray, donated: tuple[int, ...] = ()
) -> float:
    compiled = compile_for(in_bfloat16(program), chip, donated)
    return compiled_program.estimated_seconds(compiled)


def ar_seconds(length: int, seconds_per_token: dict[int, float]) -> float:
    """Seconds of decoding `length` tokens with a cache that begins small and doubles.

    Args:
      length: tokens.
      seconds_per_token: for caches of some lengths; what others cost lies on lines between these.
    """
    known = sorted(seconds_per_token)
    seconds, done = 0.0, 0
    for room in cache_lengths(length):
        each = np.interp(room, known, [seconds_per_token[k] for k in known])
        seconds += (room - done) * float(each)
        done = room
    return seconds


def measure_decoding(sizes: list[str], batches: list[int], lengths: list[int]) -> None:
    """AR tokens against denoising steps on one chip."""
    chip = topologies.devices(TOPOLOGY)[:1]
    for size in sizes:
        shape = SIZES[size]
        for batch_size in batches:
            tokens: dict[int, float] = {}
            for length in lengths:
                token = tpu_programs.token(shape, batch_size, length)
                tokens[length] = _decoding_seconds(token, chip, donated=(1,))
                whole, block = (
                    _decoding_seconds(
                        tpu_programs.denoising_step(shape, batch_size, length, canvas, **DECODING),
                        chip,
                    )
                    for canvas in (length - 1, BLOCK)
                )
                _line(
                    what=f"decoding, {size}, one {TOPOLOGY.partition(':')[0]} chip",
                    batch=batch_size,
                    tokens=length,
                    ar_token_seconds=tokens[length],
                    denoising_step_seconds=whole,
                    block_step_seconds=block,
                    speed_up=ar_seconds(length, tokens) / (STEPS * whole),
                    block_speed_up=BLOCK * tokens[length] / ((STEPS + 1) * block),
                )
                if batch_size == 1 and importlib.util.find_spec("t5x"):
                    _measure_t5x(size, length, chip, tokens[length], whole)


def _measure_t5x(size: str, length: int, chip: np.ndarray, token: float, step: float) -> None:
    from benchmarks import t5x_network

    for what, figure, make, donated in (
        ("AR token", token, t5x_network.abstract_token, (1,)),
        ("pass over all tokens", step, t5x_network.abstract_pass, ()),
    ):
        seconds = _decoding_seconds(make(SIZES[size], 1, length), chip, donated)
        _line(
            what=f"{what}, {size}, batch 1, {length} tokens",
            seconds=figure,
            baseline="T5X",
            baseline_seconds=seconds,
            ratio=figure / seconds,
        )


def main(arguments: list[str] | None = None) -> None:
    """Prints what is asked for, one JSON line per figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def names(known: Any) -> Any:
        def parse(text: str) -> list[Any]:
            wanted = text.split(",")
            for name in wanted:
                if name not in map(str, known):
                    raise argparse.ArgumentTypeError(
                        f"{name!r} is unknown; expected some of {', '.join(map(str, known))}."
                    )
            return [known_name for known_name in known if str(known_name) in wanted]

        return parse

    parts = ("training", "decoding")
    parser.add_argument("--parts", type=names(parts), default=list(parts))
    parser.add_argument("--sizes", type=names(SIZES), default=["base"])
    parser.add_argument("--batches", type=names(BATCHES), default=list(BATCHES))
    parser.add_argument("--lengths", type=names(LENGTHS), default=list(LENGTHS))
    options = parser.parse_args(arguments)
    if "decoding" in options.parts:
        measure_decoding(options.sizes, options.batches, options.lengths)
    if "training" in options.parts:
        measure_training(options.sizes)


if __name__ == "__main__":
    main()
