"""Measures how long a model takes to decode; its parameters are random.

python -m diffusion_t5x.speed --gin_file=models/tiny.gin --gin_file=objectives/diffusion.gin \\
  --gin_file=runs/speed.gin --gin.NAME=VALUE ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusion_t5x.commands import flags


def main(argv: Sequence[str] | None = None) -> Any:
    """Runs `decoding_speed.measure` as gin configures it; `argv` replaces the command line."""
    return flags.run("diffusion_t5x.decoding_speed.measure", __doc__, argv)


if __name__ == "__main__":
    main()
