"""What the runtime costs: a step of `train` against the bare compiled step on a batch at hand.

python -m benchmarks.runtime_overhead

`train` reads and shards its data, accumulates metrics, checks every step for what is not finite
and shows progress; the bare step does none of that. Windows of both alternate, and the medians are
compared. Prints one JSON line per task and objective: what it costs is nearly the same for every
step, so that it weighs most where steps are shortest.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import optax

import gin
from diffusion_t5x import gin_utils, models, train
from diffusion_t5x.data import datasets
from diffusion_t5x.training.metric_logs import read_metrics

ROUNDS = 5
STEPS = 100  # per window
# task -> lengths
TASKS = {
    "embedded_translation_en_fr": {"inputs": 24, "targets": 24},
    "embedded_qa": {"inputs": 112, "targets": 32},
}


def argv(objective: str) -> list[str]:
    """The gin files of a run of the demo's network."""
    files = ("models/tiny.gin", f"objectives/{objective}.gin", "runs/pretrain.gin")
    return [f"--gin_file={file}" for file in (*files, "scales/laptop_settings.gin")]


def bare_window(
    task: str, lengths: dict[str, int], objective: str, *, pack: bool = False
) -> Callable[[], float]:
    """A function that runs a window of bare steps and returns its seconds per step."""
    gin.clear_config()
    names = [flag.partition("=")[2] for flag in argv(objective)]
    gin_utils.parse_config(
        names,
        [f"MIXTURE_OR_TASK_NAME={task}", f"TASK_FEATURE_LENGTHS={lengths}", "MODEL_DIR=''"],
    )
    model: Any = gin.get_configurable(models.Model)()
    batch_size = gin.query_parameter("BATCH_SIZE/macro.value")
    cfg = datasets.DatasetConfig(
        task, lengths, "train", batch_size, shuffle=True, pack=pack, module="diffusion_t5x.tasks"
    )
    batch = next(datasets.get_training_iterator(cfg, model.FEATURE_CONVERTER_CLS))
    batch = jax.device_put(batch)
    shapes = {name: value.shape for name, value in batch.items()}
    params = model.get_initial_variables(jax.random.PRNGKey(0), shapes)["params"]
    state = params, model.optimizer_def.init(params)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, rng: jax.Array, batch: Any) -> tuple[Any, jax.Array]:
        params, opt_state = state
        grads_of = jax.value_and_grad(model.loss_fn, has_aux=True)
        (loss, _), grads = grads_of(params, batch, rng)
        grads, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
        updates, opt_state = model.optimizer_def.update(grads, opt_state, params)
        updates = jax.tree.map(lambda update: update * 1e-3, updates)
        return (optax.apply_updates(params, updates), opt_state), loss

    run_step = step.lower(state, jax.random.PRNGKey(0), batch).compile()

    def window() -> float:
        nonlocal state
        started = time.monotonic()
        for number in range(STEPS):
            state, loss = run_step(state, jax.random.PRNGKey(number), batch)
        jax.block_until_ready(loss)
        return (time.monotonic() - started) / STEPS

    return window


def _train_window(task: str, objective: str, model_dir: str, number: int) -> float:
    """Seconds per step of a window of `train`, which goes on where the last one ended."""
    steps = (number + 1) * STEPS
    train.main(
        [
            *argv(objective),
            f"--gin.MIXTURE_OR_TASK_NAME={task}",
            f"--gin.TASK_FEATURE_LENGTHS={TASKS[task]}",
            f"--gin.MODEL_DIR={model_dir}",
            f"--gin.TRAIN_STEPS={steps}",
            f"--gin.EVAL_PERIOD={10**9}",
            "--gin.trainer.train.train_eval_dataset_cfg=None",
        ]
    )
    [line] = [line for line in read_metrics(model_dir) if line["step"] == steps]
    return 1.0 / line["steps_per_second"]


def measure(task: str, objective: str) -> dict[str, Any]:
    """Median seconds per step of `train` and of the bare step, and their ratio."""
    bare, whole = [], []
    window = bare_window(task, TASKS[task], objective)
    window()  # the first is slower
    with tempfile.TemporaryDirectory() as model_dir:
        for number in range(ROUNDS):
            bare.append(window())
            whole.append(_train_window(task, objective, model_dir, number))
    figure, baseline = statistics.median(whole), statistics.median(bare)
    return {
        "benchmark": "runtime_overhead",
        "task": task,
        "objective": objective,
        "train_seconds_per_step": figure,
        "bare_seconds_per_step": baseline,
        "ratio": figure / baseline,
    }


def main() -> None:
    """Measures both objectives on each task."""
    for task, objective in itertools.product(TASKS, ("autoregressive", "diffusion")):
        print(json.dumps(measure(task, objective)), flush=True)


if __name__ == "__main__":
    main()
