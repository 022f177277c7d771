"""Writes predictions or scores of a task's examples as JSON lines.

python -m diffusion_t5x.infer --gin_file=models/tiny.gin --gin_file=objectives/diffusion.gin \\
  --gin_file=runs/infer.gin --gin.NAME=VALUE ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusion_t5x.commands import flags


def main(argv: Sequence[str] | None = None) -> Any:
    """Runs `inference.infer` as gin configures it; `argv` replaces the command line."""
    return flags.run("diffusion_t5x.evaluation.inference.infer", __doc__, argv)


if __name__ == "__main__":
    main()
