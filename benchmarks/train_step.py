"""Seconds and memory of loss and gradient: AR against the baseline, diffusion against AR.

python -m benchmarks.train_step
"""

from __future__ import annotations

import json

from benchmarks import workloads
from benchmarks.shapes import Shape

BATCH_SIZE, LENGTH = 16, 512


def main() -> None:
    """Measures all three in interleaved rounds."""
    reference = workloads.baseline()
    batch = workloads.our_batch(Shape(), BATCH_SIZE, 1, LENGTH - 1)
    functions = {reference.NAME: reference.gradient(Shape(), BATCH_SIZE, LENGTH)}
    for objective in ("autoregressive", "diffusion"):
        functions[objective] = workloads.our_gradient(
            workloads.our_model(Shape(), objective), batch
        )
    seconds = workloads.interleaved_medians(functions, rounds=5)
    for objective, baseline in (
        ("autoregressive", reference.NAME),
        ("diffusion", "autoregressive"),
    ):
        figures = {
            "seconds": seconds[objective],
            "bytes": workloads.temporary_bytes(functions[objective][0]),
        }
        line = {"benchmark": "train_step", "objective": objective, **figures, "baseline": baseline}
        line["baseline_seconds"] = seconds[baseline]
        line["baseline_bytes"] = workloads.temporary_bytes(functions[baseline][0])
        line["ratio"] = seconds[objective] / seconds[baseline]
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
