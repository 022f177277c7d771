"""Writes predictions or scores of a task's examples as JSON lines.

python -m diffusion_t5x.infer --gin_file=models/tiny.gin --gin_file=objectives/diffusion.gin \\
  --gin_file=runs/infer.gin --gin.NAME=VALUE ...
"""

from __future__ import annotations

import functools

from diffusion_t5x.commands import flags

main = functools.partial(flags.run, "diffusion_t5x.evaluation.inference.infer", __doc__)

if __name__ == "__main__":
    main()
