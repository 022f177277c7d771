"""Seconds and memory of loss and gradient: AR against the baseline, diffusion against AR.

python -m benchmarks.train_step
python -m benchmarks.train_step --flops  # counts arithmetic, compiles and measures nothing

The rows of `PREFIXED` have texts whose first half is the prefix. `cached_prefix` reads it once for
both passes, which takes 1.5 times the arithmetic of AR below the vocabulary, where `diffusion`
takes 2. `one_block` and `all_blocks` are of blocks of 32 tokens; ratios are also given per token
that has a loss.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import jax

from benchmarks import workloads
from benchmarks.shapes import Shape
from diffusion_t5x import models

BATCH_SIZE, LENGTH, BLOCK = 16, 512, 32
BLOCKS = {"attention_pattern": "causal_prefix", "block_length": BLOCK}
# Name -> fields of the objective, and tokens of a text that have a loss.
PREFIXED: dict[str, tuple[dict[str, Any], int]] = {
    "prefixed_diffusion": ({}, LENGTH // 2),
    "cached_prefix": ({"attention_pattern": "cached_prefix"}, LENGTH // 2),
    "one_block": (BLOCKS, BLOCK),
    "all_blocks": ({**BLOCKS, "all_blocks": True}, LENGTH // 2),
}
PREFIXED_AR = "prefixed_autoregressive"


def prefixed(**config: Any) -> tuple[dict[str, models.Model], Any]:
    """The models of the rows with prefixes, and their batch."""
    found = {PREFIXED_AR: workloads.our_model(Shape(), "autoregressive", **config)}
    for name, (fields, _) in PREFIXED.items():
        decoder = {"block_length": BLOCK, "prefix_cache": True} if "block_length" in fields else {}
        model = workloads.our_model(Shape(), "diffusion", decoder=decoder, **config)
        model.objective = dataclasses.replace(model.objective, **fields)
        found[name] = model
    return found, workloads.our_batch(Shape(), BATCH_SIZE, LENGTH // 2, LENGTH // 2)


def count_flops() -> dict[str, float]:
    """Floating-point operations of loss and gradient of the rows with prefixes."""
    # In one chunk: of a loop one turn would be counted.
    found, batch = prefixed(attention_block_logits=2**40)
    counted = {}
    for name, model in found.items():
        params = jax.eval_shape(lambda model=model: workloads.our_params(model, batch))
        counted[name] = workloads.lower_gradient(model, params, batch).cost_analysis()["flops"]
    return counted


def compile_prefixed() -> dict[str, tuple[Any, Any]]:
    """The compiled loss and gradient of the rows with prefixes, and arguments to call them with."""
    found, batch = prefixed()
    return {name: workloads.our_gradient(model, batch) for name, model in found.items()}


def compile_whole() -> dict[str, tuple[Any, Any]]:
    """Those of texts with hardly a prefix."""
    batch = workloads.our_batch(Shape(), BATCH_SIZE, 1, LENGTH - 1)
    return {
        objective: workloads.our_gradient(workloads.our_model(Shape(), objective), batch)
        for objective in ("autoregressive", "diffusion")
    }


def main() -> None:
    """Counts arithmetic, or measures all in interleaved rounds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--flops", action="store_true")
    baselines = dict.fromkeys(PREFIXED, PREFIXED_AR)
    functions = {}
    if parser.parse_args().flops:
        figure, figures = "flops", count_flops()
    else:
        figure, reference = "seconds", workloads.baseline()
        functions = {reference.NAME: reference.gradient(Shape(), BATCH_SIZE, LENGTH)}
        functions |= compile_whole() | compile_prefixed()
        baselines |= {"autoregressive": reference.NAME, "diffusion": "autoregressive"}
        figures = workloads.interleaved_medians(functions, rounds=5)
    for objective, baseline in baselines.items():
        line = {"benchmark": "train_step", "objective": objective, "baseline": baseline}
        for prefix, name in (("", objective), ("baseline_", baseline)):
            line[f"{prefix}{figure}"] = figures[name]
            if name in functions:
                line[f"{prefix}bytes"] = workloads.temporary_bytes(functions[name][0])
        line["ratio"] = figures[objective] / figures[baseline]
        if objective in PREFIXED:
            tokens = PREFIXED[objective][1]
            line["ratio_per_token_of_loss"] = line["ratio"] * (LENGTH // 2) / tokens
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
