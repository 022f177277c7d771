"""Evaluates a checkpoint on tasks of lm-eval, EleutherAI's harness.

python -m diffusion_t5x.lm_eval --gin_file=models/tiny.gin --gin_file=objectives/diffusion.gin \\
  --gin_file=runs/lm_eval.gin --gin.LM_EVAL_TASKS=hellaswag --gin.NAME=VALUE ...
"""

from __future__ import annotations

import functools

from diffusion_t5x.commands import flags

main = functools.partial(
    flags.run, "diffusion_t5x.evaluation.lm_eval_model.evaluate_tasks", __doc__
)

if __name__ == "__main__":
    main()
