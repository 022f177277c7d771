"""Decodes texts given on the command line, and shows the denoising steps of a canvas if asked to.

python -m diffusion_t5x.sample --gin_file=models/tiny.gin --gin_file=objectives/diffusion.gin \\
  --gin_file=runs/sample.gin --gin.NAME=VALUE ...
"""

from __future__ import annotations

import functools

from diffusion_t5x.commands import flags

main = functools.partial(flags.run, "diffusion_t5x.evaluation.sampling.sample", __doc__)

if __name__ == "__main__":
    main()
