"""Decodes texts given on the command line, and shows the denoising steps of a canvas if asked to.

python -m diffusion_t5x.sample --gin_file=models/tiny.gin --gin_file=objectives/diffusion.gin \\
  --gin_file=runs/sample.gin --gin.NAME=VALUE ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusion_t5x.commands import flags


def main(argv: Sequence[str] | None = None) -> Any:
    """Runs `sampling.sample` as gin configures it; `argv` replaces the command line."""
    return flags.run("diffusion_t5x.evaluation.sampling.sample", __doc__, argv)


if __name__ == "__main__":
    main()
