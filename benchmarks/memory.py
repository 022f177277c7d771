"""Temporary memory of loss and gradient, by the compiler's account.

python -m benchmarks.memory

The first lines have the paper's vocabulary, where logits are what memory goes to; the others show
what each setting of `TransformerConfig.remat` saves of activations, and what that costs in time.
"""

from __future__ import annotations

import json

from benchmarks import workloads
from benchmarks.shapes import Shape

LARGE_VOCABULARY = Shape(vocab_size=256_000)
BATCH_SIZE, LENGTH = 8, 512
REMAT_BATCH_SIZE = 16


def _line(**fields: object) -> None:
    print(json.dumps({"benchmark": "memory", **fields}), flush=True)


def measure_loss() -> None:
    """Ours against the baseline, at a vocabulary of 256,000."""
    reference = workloads.baseline()
    compiled, _ = reference.gradient(LARGE_VOCABULARY, BATCH_SIZE, LENGTH)
    baseline = workloads.temporary_bytes(compiled)
    del compiled
    batch = workloads.our_batch(LARGE_VOCABULARY, BATCH_SIZE, 1, LENGTH - 1)
    for objective in ("autoregressive", "diffusion"):
        model = workloads.our_model(LARGE_VOCABULARY, objective)
        compiled, _ = workloads.our_gradient(model, batch)
        figure = workloads.temporary_bytes(compiled)
        _line(
            what="loss and gradient, vocabulary 256,000",
            objective=objective,
            bytes=figure,
            baseline=reference.NAME,
            baseline_bytes=baseline,
            ratio=figure / baseline,
        )


def measure_blocks() -> None:
    """Seconds of reading logits in blocks against all of them at once."""
    batch = workloads.our_batch(LARGE_VOCABULARY, BATCH_SIZE, 1, LENGTH - 1)
    for objective in ("autoregressive", "diffusion"):
        functions = {}
        for name, block_logits in (("blocks", None), ("whole", 2**40)):
            model = workloads.our_model(LARGE_VOCABULARY, objective, block_logits=block_logits)
            functions[name] = workloads.our_gradient(model, batch)
        seconds = workloads.interleaved_medians(functions, rounds=2)
        _line(
            what="seconds of loss and gradient, logits in blocks",
            objective=objective,
            seconds=seconds["blocks"],
            baseline="all logits at once",
            baseline_seconds=seconds["whole"],
            ratio=seconds["blocks"] / seconds["whole"],
        )


def measure_remat() -> None:
    """Memory and seconds of the settings of `remat`, against keeping all activations."""
    batch = workloads.our_batch(Shape(), REMAT_BATCH_SIZE, 1, LENGTH - 1)
    functions = {}
    for remat in ("none", "dots", "full"):
        model = workloads.our_model(Shape(), "autoregressive", remat=remat)
        functions[remat] = workloads.our_gradient(model, batch)
    seconds = workloads.interleaved_medians(functions, rounds=3)
    plain = workloads.temporary_bytes(functions["none"][0])
    for remat, (compiled, _) in functions.items():
        figure = workloads.temporary_bytes(compiled)
        _line(
            what="remat",
            remat=remat,
            bytes=figure,
            baseline="remat = 'none'",
            baseline_bytes=plain,
            ratio=figure / plain,
            seconds=seconds[remat],
            seconds_ratio=seconds[remat] / seconds["none"],
        )


def main() -> None:
    """All measurements."""
    measure_loss()
    measure_blocks()
    measure_remat()


if __name__ == "__main__":
    main()
