"""Exports a model's decoding as StableHLO, with its parameters, to run without this package.

python -m diffusion_t5x.export --gin_file=models/tiny.gin --gin_file=objectives/diffusion.gin \\
  --gin.CHECKPOINT_PATH=... --gin.TASK_FEATURE_LENGTHS="{'inputs': 64, 'targets': 32}" --to=DIR
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusion_t5x.commands import flags
from diffusion_t5x.runtime import interrupts


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `exporting.export` as gin/runs/export.gin binds it; `argv` replaces the command line."""
    parser = flags.make_parser(__doc__)
    parser.add_argument("--to", required=True, help="new directory to write into")
    parser.add_argument(
        "--platforms",
        type=flags.comma_separated,
        default=["cpu", "cuda", "tpu"],
        help="platforms to export for, present or not (default: cpu,cuda,tpu)",
    )
    with interrupts.end_on_signals():
        args = flags.start(parser, argv)
        bindings = [f"EXPORT_DIR = {args.to!r}", f"PLATFORMS = {tuple(args.platforms)!r}"]
        flags.configure(args, ["runs/export.gin"], bindings)
        import gin
        from diffusion_t5x.evaluation import exporting

        gin.get_configurable(exporting.export)(dry_run=args.dry_run)


if __name__ == "__main__":
    main()
