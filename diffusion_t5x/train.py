"""Trains a model, or adapts or fine-tunes one from a checkpoint.

python -m diffusion_t5x.train --gin_file=models/tiny.gin --gin_file=objectives/diffusion.gin \\
  --gin_file=runs/pretrain.gin --gin.NAME=VALUE ...
"""

from __future__ import annotations

import functools

from diffusion_t5x.commands import flags

main = functools.partial(flags.run, "diffusion_t5x.training.loop.train", __doc__, topology=True)

if __name__ == "__main__":
    main()
