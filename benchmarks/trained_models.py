"""Diffusion models of the embedded tasks, trained for about as long as their metric still gains.

The network, lengths and settings are those of `gin/scales/laptop.gin`; an hour on two cores for all
three tasks and two objectives. A run that was stopped goes on, a finished one is taken as it is.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys

from diffusion_t5x import experiment_graph, experiments

STEPS = {"translation": 6000, "qa": 8000, "code": 3000}
SCHEDULE = "optimizers.create_learning_rate_scheduler"


def settings(role: str) -> tuple[experiment_graph.Scale, experiment_graph.TaskSettings]:
    """The laptop's scale, and its settings of the task `role`.

    Raises:
      ValueError: if there is no such task.
    """
    _, scale, _ = experiments.load("families", "laptop")
    return scale, experiment_graph.lookup(scale.tasks, role, "task")


def train(role: str, objective: str) -> str:
    """Trains a model from fresh parameters and returns its MODEL_DIR, under `runs/benchmarks`.

    Args:
      role: one of `STEPS`.
      objective: its gin file.
    """
    scale, task = settings(role)
    model_dir = pathlib.Path("runs", "benchmarks", role, pathlib.Path(objective).stem)
    files = (scale.models["decoder_only/base"], objective, "runs/pretrain.gin", *scale.settings)
    bindings = {
        "MIXTURE_OR_TASK_NAME": task.name,
        "TASK_FEATURE_LENGTHS": {"inputs": task.inputs, "targets": task.targets},
        "MODEL_DIR": str(model_dir),
        "RANDOM_SEED": 0,
        "TRAIN_STEPS": STEPS[role],
        "trainer.train.infer_eval_dataset_cfg": None,
        f"{SCHEDULE}.base_learning_rate": scale.learning_rates["diffusion"],
        f"{SCHEDULE}.step_offset": 0,
        f"{SCHEDULE}.steps_per_cycle": STEPS[role],
    }
    command = [sys.executable, "-m", "diffusion_t5x.train"]
    command += [f"--gin_file={file}" for file in files]
    command += [f"--gin.{name}={value!r}" for name, value in bindings.items()]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return str(model_dir)
