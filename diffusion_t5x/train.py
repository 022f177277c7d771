"""Trains a model, or adapts or fine-tunes one from a checkpoint.

python -m diffusion_t5x.train --gin_file=models/tiny.gin --gin_file=objectives/diffusion.gin \\
  --gin_file=runs/pretrain.gin --gin.NAME=VALUE ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusion_t5x.commands import flags


def main(argv: Sequence[str] | None = None) -> Any:
    """Runs `trainer.train` as gin configures it; `argv` replaces the command line."""
    return flags.run("diffusion_t5x.training.loop.train", __doc__, argv, topology=True)


if __name__ == "__main__":
    main()
