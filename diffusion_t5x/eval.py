"""Evaluates one, several or all checkpoints of a run on one or several tasks.

python -m diffusion_t5x.eval --gin_file=models/tiny.gin --gin_file=objectives/diffusion.gin \\
  --gin_file=runs/eval.gin --gin.NAME=VALUE ...
"""

from __future__ import annotations

import functools

from diffusion_t5x.commands import flags

main = functools.partial(flags.run, "diffusion_t5x.evaluation.evaluation.evaluate", __doc__)

if __name__ == "__main__":
    main()
