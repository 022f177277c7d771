"""Seconds until a command answers, and until training has taken its first step.

python -m benchmarks.startup

The first start compiles into an empty cache, the second finds what the first compiled.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS = 3
HELP_LIMIT = 1.5  # seconds, what a person waits without wondering
TRAIN = (
    "--gin_file=models/tiny.gin",
    "--gin_file=objectives/diffusion.gin",
    "--gin_file=runs/pretrain.gin",
    "--gin_file=scales/laptop_settings.gin",
    "--gin.MIXTURE_OR_TASK_NAME=embedded_translation_en_fr",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 24}",
    "--gin.TRAIN_STEPS=1",
    "--gin.trainer.train.train_eval_dataset_cfg=None",
)


def _seconds(*arguments: str, cache: str) -> float:
    """Seconds of `python -m diffusion_t5x.train` with these arguments."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
    command = [sys.executable, "-m", "diffusion_t5x.train", *arguments]
    started = time.perf_counter()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.perf_counter() - started


def _train(cache: str) -> float:
    """Seconds of a run of one step in a directory of its own."""
    with tempfile.TemporaryDirectory() as model_dir:
        return _seconds(*TRAIN, f"--gin.MODEL_DIR={model_dir}", cache=cache)


def main() -> None:
    """Measures `--help`, then pairs of starts."""
    firsts, seconds, helps = [], [], []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as cache:
            helps.append(_seconds("--help", cache=cache))
            firsts.append(_train(cache))
            seconds.append(_train(cache))
    for what, figure, baseline, limit in (
        ("--help", helps, "what it may take", [HELP_LIMIT]),
        ("second start, one step", seconds, "first start", firsts),
    ):
        line = {"benchmark": "startup", "what": what, "seconds": statistics.median(figure)}
        line |= {"baseline": baseline, "baseline_seconds": statistics.median(limit)}
        line["ratio"] = line["seconds"] / line["baseline_seconds"]
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
