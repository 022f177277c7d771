"""Tokens per second that the input pipeline delivers, against what a training step consumes.

python -m benchmarks.input

Both are measured alone, on the network of `models/tiny.gin`, the smallest and so the hungriest. The
ratio says how much faster the pipeline is: below 1 it is the bound.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.runtime_overhead import bare_window
from diffusion_t5x.data import datasets, feature_converters

ROUNDS = 3
BATCHES = 200  # per window
BATCH_SIZE = 16
# (task or mixture, objective, lengths, whether texts are packed)
WORK = (
    ("embedded_translation_en_fr", "diffusion", {"inputs": 24, "targets": 24}, False),
    ("embedded_qa", "diffusion", {"inputs": 112, "targets": 32}, False),
    ("embedded_code", "diffusion", {"inputs": 80, "targets": 48}, False),
    ("embedded_pretrain_prefix_lm", "autoregressive", {"inputs": 128, "targets": 128}, True),
)


def _batches(task: str, objective: str, lengths: dict[str, int], pack: bool) -> Iterator[Any]:
    """Training batches without end."""
    cfg = datasets.DatasetConfig(
        task, lengths, "train", BATCH_SIZE, shuffle=True, pack=pack, module="diffusion_t5x.tasks"
    )
    converter = feature_converters.CanvasFeatureConverter
    if objective == "autoregressive":
        converter = feature_converters.EncDecFeatureConverter
    return datasets.get_training_iterator(cfg, converter)


def measure(task: str, objective: str, lengths: dict[str, int], pack: bool) -> dict[str, Any]:
    """Median tokens per second of both, in interleaved windows."""
    batches = _batches(task, objective, lengths, pack)
    window = bare_window(task, lengths, objective, pack=pack)
    window()  # the first is slower
    pipeline, step = [], []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for _ in range(BATCHES):
            next(batches)
        pipeline.append((time.perf_counter() - started) / BATCHES)
        step.append(window())
    tokens = BATCH_SIZE * sum(lengths.values())
    figure, baseline = tokens / statistics.median(pipeline), tokens / statistics.median(step)
    return {
        "benchmark": "input",
        "task": task,
        "objective": objective,
        "packed": pack,
        "tokens_per_second": figure,
        "baseline": "tokens per second of the training step",
        "baseline_tokens_per_second": baseline,
        "ratio": figure / baseline,
    }


def main() -> None:
    """All tasks."""
    for work in WORK:
        print(json.dumps(measure(*work)), flush=True)


if __name__ == "__main__":
    main()
