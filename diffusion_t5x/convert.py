"""Converts a checkpoint of T5X into ours, or ours into one that T5X restores.

python -m diffusion_t5x.convert --from=gs://bucket/t5_1_1_small --to=runs/t5 \\
  [--gin_file=models/encoder_decoder/small.gin ...]

With the gin file of a model, the parameters must fit that model. Without, the network is inferred
from the checkpoint, and TO/network.gin configures a model for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from diffusion_t5x.commands import flags
from diffusion_t5x.runtime import interrupts


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `conversion.convert`; `argv` replaces the command line."""
    parser = flags.make_parser(__doc__)
    add = parser.add_argument
    add("--from", dest="source", required=True, help="checkpoint, or a run for its latest")
    add("--to", dest="destination", required=True, help="directory to write checkpoint_{step} into")
    add(
        "--format",
        default="diffusion_t5x",
        help="diffusion_t5x (default); t5x: T5X's layout with our names, for our models in T5X; "
        "t5x:t5, t5x:scalable_t5, t5x:decoder_only: the same with names of T5X's networks",
    )
    add(
        "--partial",
        action="store_true",
        help="convert the parameters that fit and initialise the others",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="type of the parameters written (default: unchanged)",
    )
    with interrupts.end_on_signals():
        _convert(flags.start(parser, argv))


def _convert(args: argparse.Namespace) -> None:
    model = None
    if args.gin_file:
        import gin
        from diffusion_t5x import models

        # The parameters do not depend on the objective or the run.
        flags.configure(args, ["objectives/autoregressive.gin"], ["DROPOUT_RATE=0.0"])
        model = gin.get_configurable(models.Model)()
    from diffusion_t5x.checkpointing import conversion

    conversion.print_conversion(
        conversion.convert(
            args.source,
            args.destination,
            args.format,
            model=model,
            partial=args.partial,
            dtype=args.dtype,
            dry_run=args.dry_run,
        )
    )


if __name__ == "__main__":
    main()
