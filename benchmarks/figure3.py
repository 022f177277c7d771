"""Seconds to decode texts of 128 to 4096 tokens: AR against diffusion (arXiv 2401.17181, figure 3).

python -m benchmarks.figure3
python -m benchmarks.figure3 --lengths 512 4096 --batch-sizes 1 --plot figure3.png

Greedy, a prefix of 32 tokens, no text ends early; diffusion has one canvas per text. With blocks, a
text is written as canvases of 128 tokens, each joining the key-value cache of the next. Ten steps
are the paper's; five are what early stop leaves of them on easy tasks.

Each figure is the median of three interleaved rounds; of long work there is one measurement. The
baseline grows faster than the square of the length: it is left out of the longest, and our AR takes
its place.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import workloads
from benchmarks.shapes import Shape
from diffusion_t5x.experiments.report import save_figure

SHAPE = Shape(embed_dim=512, num_heads=8, num_layers=6)
PREFIX = 32
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
BLOCKS = {"prefix_cache": True, "block_length": 128, "num_samples": 1}
# Of rows x tokens squared: what is measured three times, and with T5X's AR at all.
THRICE, WITH_BASELINE = 8 * 512**2, 4096**2
# name -> fields of the diffusion decoder
DIFFUSION: Mapping[str, Mapping[str, Any]] = {
    "diffusion, 10 steps": {"num_steps": 10, "num_samples": 1},
    "blocks, 10 steps": {"num_steps": 10, **BLOCKS},
    "blocks, 5 steps": {"num_steps": 5, **BLOCKS},
}


def measure(batch_size: int, length: int) -> list[dict[str, Any]]:
    """One record per way of decoding, each against the baseline's AR and against ours."""
    batch, work = workloads.our_batch(SHAPE, batch_size, PREFIX, length), batch_size * length**2
    functions = {}
    if work <= WITH_BASELINE:
        reference = workloads.baseline()
        decoding = reference.decoding(SHAPE, batch_size, PREFIX, length)
        functions[f"{reference.NAME}, AR"] = decoding
    our_ar = workloads.our_model(SHAPE, "autoregressive")
    functions["AR"] = workloads.our_decoding(our_ar, batch)
    baseline = next(iter(functions))
    for name, decoder in DIFFUSION.items():
        model = workloads.our_model(SHAPE, "diffusion", decoder=decoder)
        functions[name] = workloads.our_decoding(model, batch)
    short = work <= THRICE
    seconds = workloads.interleaved_medians(functions, 3 if short else 1, warm_up=short)
    return [
        {
            "benchmark": "figure3",
            "method": name,
            "tokens": length,
            "batch_size": batch_size,
            "seconds": value,
            "baseline": baseline,
            "baseline_seconds": seconds[baseline],
            "ratio": value / seconds[baseline],
            "ratio_to_our_ar": value / seconds["AR"],
        }
        for name, value in seconds.items()
    ]


def plot(records: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Seconds against tokens, both logarithmic, a panel per batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batch_sizes = sorted({record["batch_size"] for record in records})
    figure, panels = pyplot.subplots(
        1, len(batch_sizes), figsize=(4.6 * len(batch_sizes), 3.6), squeeze=False
    )
    for panel, batch_size in zip(panels[0], batch_sizes, strict=True):
        of_batch = [record for record in records if record["batch_size"] == batch_size]
        for name in dict.fromkeys(record["method"] for record in of_batch):
            points = [(r["tokens"], r["seconds"]) for r in of_batch if r["method"] == name]
            panel.plot(*zip(*points, strict=True), marker="o", label=name)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel("tokens decoded")
        panel.set_ylabel("seconds")
        panel.set_title(f"batch of {batch_size}", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def main() -> None:
    """Measures the lengths and batch sizes asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=(1, 8))
    parser.add_argument("--plot", type=pathlib.Path, help="a PNG file to write")
    args = parser.parse_args()
    records = []
    for batch_size in args.batch_sizes:
        for length in args.lengths:
            measured = measure(batch_size, length)
            records += measured
            for record in measured:
                print(json.dumps(record), flush=True)
            if args.plot:
                plot(records, args.plot)


if __name__ == "__main__":
    main()
