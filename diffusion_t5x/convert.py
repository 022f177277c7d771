"""Converts checkpoints: T5X's and Hugging Face's models into ours, and ours into theirs.

python -m diffusion_t5x.convert --from=gs://bucket/t5_1_1_small --to=runs/t5 \\
  [--gin_file=models/encoder_decoder/small.gin ...]

With the gin file of a model, the parameters must fit that model. Without, the network is inferred
from the checkpoint, and TO/network.gin configures a model for it.

python -m diffusion_t5x.convert --from=runs/mine --to=mine_hf --format=hugging_face \\
  --gin_file=models/hugging_face.gin --gin.HF_MODEL=SmolLM2-135M [...]
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence

from diffusion_t5x.commands import flags
from diffusion_t5x.runtime import interrupts


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `conversion.convert`; `argv` replaces the command line."""
    parser = flags.make_parser(__doc__)
    add = parser.add_argument
    add("--from", dest="source", required=True, help="checkpoint, run for its latest, or model")
    add("--to", dest="destination", required=True, help="directory to write into")
    add(
        "--format",
        default="diffusion_t5x",
        help="diffusion_t5x (default); t5x: T5X's layout with our names, for our models in T5X; "
        "t5x:t5, t5x:scalable_t5, t5x:decoder_only: the same with names of T5X's networks; "
        "hugging_face: TO becomes a model that transformers loads",
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
    add(
        "--parameters",
        choices=("averaged", "raw"),
        default="averaged",
        help="the moving average of the parameters where FROM has one (default), or the parameters "
        "as they are",
    )
    with interrupts.end_on_signals():
        _convert(flags.start(parser, argv))


def _convert(args: argparse.Namespace) -> None:
    model, found = None, {}
    if args.gin_file:
        import gin
        from diffusion_t5x import models

        # The parameters do not depend on the objective or the run.
        flags.configure(args, ["objectives/autoregressive.gin"], ["DROPOUT_RATE=0.0"])
        model = gin.get_configurable(models.Model)()
        for name in ("HF_MODEL", "TASK_FEATURE_LENGTHS"):
            with contextlib.suppress(ValueError):  # no file given sets it
                found[name] = gin.query_parameter(f"%{name}")
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
            hf_model=found.get("HF_MODEL"),
            lengths=found.get("TASK_FEATURE_LENGTHS"),
            parameters=args.parameters,
        )
    )


if __name__ == "__main__":
    main()
