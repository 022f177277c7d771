"""Diffusion models of the embedded tasks, trained for about as long as their metric still gains.

The network, lengths and settings are those of `gin/scales/laptop.gin`; an hour or two on two cores
for all three tasks and two objectives, and code in blocks. A run that was stopped goes on, a
finished one is taken as it is.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys

from diffusion_t5x.experiments import __main__ as experiments
from diffusion_t5x.experiments import experiment_graph

STEPS = {"translation": 6000, "qa": 8000, "code": 3000}
# Tokens per block, of tasks whose texts are long enough to be written in blocks.
BLOCK_LENGTHS = {"code": 16}
BLOCKS = "objectives/diffusion_blocks.gin"
SCHEDULE = "optimizers.create_learning_rate_scheduler"


def settings(role: str) -> tuple[experiment_graph.Scale, experiment_graph.TaskSettings]:
    """The laptop's scale, and its settings of the task `role`.

    Raises:
      ValueError: if there is no such task.
    """
    _, scale, _ = experiments.load("families", "laptop")
    return scale, experiment_graph.lookup(scale.tasks, role, "task")


def adapt_to_blocks(role: str, initial: str) -> str:
    """Goes on from the model at `initial` with blocks for as many steps again; see `train`."""
    return train(role, BLOCKS, initial=initial, BLOCK_LENGTH=BLOCK_LENGTHS[role])


def train(role: str, objective: str, *, initial: str | None = None, **settings_of_file: int) -> str:
    """Trains a model and returns its MODEL_DIR, under `runs/benchmarks`.

    Args:
      role: one of `STEPS`, whose steps are taken.
      objective: its gin file.
      initial: MODEL_DIR of a model of the same task to go on from; None for fresh parameters.
      **settings_of_file: what the objective's file wants to be told.
    """
    scale, task = settings(role)
    model_dir = pathlib.Path("runs", "benchmarks", role, pathlib.Path(objective).stem)
    run = "runs/pretrain.gin" if initial is None else "runs/adapt.gin"
    files = (scale.models["decoder_only/base"], objective, run, *scale.settings)
    steps_before = 0 if initial is None else STEPS[role]
    bindings: dict[str, object] = {
        **settings_of_file,
        "MIXTURE_OR_TASK_NAME": task.name,
        "TASK_FEATURE_LENGTHS": {"inputs": task.inputs, "targets": task.targets},
        "MODEL_DIR": str(model_dir),
        "RANDOM_SEED": 0,
        "TRAIN_STEPS": steps_before + STEPS[role],
        "trainer.train.infer_eval_dataset_cfg": None,
        f"{SCHEDULE}.base_learning_rate": scale.learning_rates["diffusion"],
        f"{SCHEDULE}.step_offset": steps_before,
        f"{SCHEDULE}.steps_per_cycle": STEPS[role],
    }
    if initial is not None:
        bindings["INITIAL_CHECKPOINT_PATH"] = initial
    command = [sys.executable, "-m", "diffusion_t5x.train"]
    command += [f"--gin_file={file}" for file in files]
    command += [f"--gin.{name}={value!r}" for name, value in bindings.items()]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return str(model_dir)
