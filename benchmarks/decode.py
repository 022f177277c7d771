"""Seconds to decode one text: ours with a cache against the baseline's, and ten denoising steps.

python -m benchmarks.decode

Greedy, a prefix of 32 tokens, one text, one canvas. No text ends early.
"""

from __future__ import annotations

import dataclasses
import json

from benchmarks import workloads
from benchmarks.shapes import Shape

SHAPE = Shape(embed_dim=512, num_heads=8, num_layers=6)
PREFIX = 32
LENGTHS = (128, 512, 1024)
LARGE_VOCABULARY = 32_128
ONE_CANVAS = {"num_steps": 10, "num_samples": 1}


def measure(shape: Shape, length: int) -> None:
    """One line for AR and one for diffusion, each against the baseline's AR."""
    reference = workloads.baseline()
    batch = workloads.our_batch(shape, 1, PREFIX, length)
    functions = {reference.NAME: reference.decoding(shape, 1, PREFIX, length)}
    for objective in ("autoregressive", "diffusion"):
        model = workloads.our_model(shape, objective, decoder=ONE_CANVAS)
        functions[objective] = workloads.our_decoding(model, batch)
    seconds = workloads.interleaved_medians(functions, rounds=3)
    for objective in ("autoregressive", "diffusion"):
        line = {
            "benchmark": "decode",
            "method": objective,
            "tokens": length,
            "vocab_size": shape.vocab_size,
            "seconds": seconds[objective],
            "baseline": f"{reference.NAME}, AR",
            "baseline_seconds": seconds[reference.NAME],
            "ratio": seconds[objective] / seconds[reference.NAME],
        }
        print(json.dumps(line), flush=True)


def main() -> None:
    """All lengths, and a larger vocabulary."""
    for length in LENGTHS:
        measure(SHAPE, length)
    measure(dataclasses.replace(SHAPE, vocab_size=LARGE_VOCABULARY), 512)


if __name__ == "__main__":
    main()
