"""Hooks of the training loop: logging, evaluation, early stopping and checkpoints."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from diffusion_t5x.checkpointing.checkpoints import Checkpointer
from diffusion_t5x.data import datasets
from diffusion_t5x.data.task_checks import MetricError, no_example
from diffusion_t5x.runtime.guards import Watchdog
from diffusion_t5x.runtime.train_state import TrainState
from diffusion_t5x.training.early_stopping import EarlyStopping
from diffusion_t5x.training.metric_logs import MetricLog
from diffusion_t5x.training.nonfinite import NonFiniteSteps
from diffusion_t5x.training.train_step import Metrics, Trainer


@dataclasses.dataclass
class Run:
    """The position of a training run; the loop moves it on, and hooks read and mark it.

    Attributes:
      step: Number of updates so far. `state.step` is the same, but reading it waits for the device.
      last_step: Step at which training ends.
      state: The train state after `step` updates.
      metrics: Sums over the steps since the last line of the log, on the devices.
      preempted: True if training ends at this step because of SIGTERM or Ctrl-C.
      stopped_early: True if training ends at this step because evaluations no longer improve.
      shown: Values that the progress display shows.
    """

    step: int
    last_step: int
    state: TrainState
    metrics: Metrics
    preempted: bool = False
    stopped_early: bool = False
    shown: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def ends(self) -> bool:
        """True if no step follows this one."""
        return self.preempted or self.stopped_early or self.step >= self.last_step

    def is_due(self, every: int) -> bool:
        """Returns True at every `every`-th step, and at the last one."""
        return self.ends or self.step % every == 0


# A hook runs when its period is due; the order of hooks is the order of a step's work.
Hook = tuple[int, Callable[[Run], None]]
# An evaluation of a state: metric -> value.
Evaluate = Callable[[TrainState], Mapping[str, Any]]


def logging(log: MetricLog, trainer: Trainer, nonfinite: NonFiniteSteps) -> Callable[[Run], None]:
    """Returns a hook that logs metrics and skipped updates since the last line."""

    def hook(run: Run) -> None:
        values = compute(run.metrics)
        if trainer.max_skipped_updates:
            # If all updates were skipped, there is nothing to average over.
            values = {name: value for name, value in values.items() if math.isfinite(value)}
            values["skipped_updates"] = nonfinite.skipped_since(log.last_step)
        log.training(run.step, values)
        run.shown = {"loss": values.get("loss", math.nan)}
        run.metrics = trainer.empty_metrics(run.metrics)

    return hook


def evaluation(
    evaluations: Mapping[str, Evaluate],
    log: MetricLog,
    early_stopping: EarlyStopping,
    watchdog: Watchdog,
    on_metric_error: str,
    compile_seconds: dict[str, float],
) -> Callable[[Run], None]:
    """Returns a hook that evaluates, logs each result at once, and may stop training early.

    A preempted run is not evaluated: the time it is given is for saving. What the log has of this
    step, from before a restart, is not evaluated again. The watchdog is suspended meanwhile, since
    evaluations may take any time.

    A metric that fails is reported. With `on_metric_error` 'stop' the error is raised once the
    other evaluations are logged. `compile_seconds`, of the programs that evaluations compiled, are
    logged and emptied.
    """

    def hook(run: Run) -> None:
        if run.preempted:
            return
        failed: list[MetricError] = []
        known = {line["split"] for line in log.lines if line["step"] == run.step}
        with watchdog.suspended():
            for split, evaluate in evaluations.items():
                if split in known:
                    continue
                try:
                    values = evaluate(run.state)
                    log.compiled(run.step, compile_seconds)
                    log.write(run.step, split, values)
                except MetricError as error:
                    failed.append(error)
                    print(f"step {run.step}: {error}", flush=True)
        if failed and on_metric_error == "stop":
            raise failed[0]
        # A run without its metric cannot be judged.
        run.stopped_early = not failed and early_stopping.should_stop(log.lines)

    return hook


def saving(
    checkpointer: Checkpointer | None, iterator: datasets.DatasetIterator, log: MetricLog
) -> tuple[list[Hook], list[Hook]]:
    """Returns the hooks that save a step before evaluations, and what is left to do after them.

    At the end that is to save the step at which they stop the run, and to keep the best
    checkpoints. The log is written before a checkpoint, since a resumed run continues it.
    """
    if checkpointer is None:
        return [], []
    checkpointer.keep_best_of(log.lines)

    def save(run: Run) -> None:
        log.flush()
        checkpointer.save(run.state, iterator)

    def finish(run: Run) -> None:
        save(run)
        if not run.preempted:
            checkpointer.prune()

    return [(checkpointer.config.period, save)], [(sys.maxsize, finish)]


def loss_evaluation(
    trainer: Trainer, cfg: datasets.DatasetConfig, num_batches: int | None, random_seed: int
) -> Evaluate:
    """Returns an evaluation of the loss.

    It takes `num_batches` batches, None for the whole split; `random_seed` is that of the data,
    unless `cfg` has its own.
    """
    layout = trainer.partitioner.data_layout(cfg.batch_size)
    converter = trainer.model.FEATURE_CONVERTER_CLS
    shapes: Metrics | None = None
    step: Callable[..., Metrics] | None = None  # compiled

    def evaluate(state: TrainState) -> dict[str, float]:
        nonlocal shapes, step
        metrics: Metrics | None = None
        for rows in datasets.get_eval_batches(
            cfg, converter, layout=layout, num_batches=num_batches, seed=random_seed
        ):
            batch = trainer.partitioner.shard_batch(rows)
            if metrics is None:
                shapes = shapes or trainer.eval_metric_shapes(state, batch)
                metrics = trainer.empty_metrics(shapes)
            args = state.evaluated_params, metrics, batch
            step = step or trainer.partitioner.compile("eval step", trainer.eval_step, *args)
            metrics = step(*args)
        if metrics is None:
            raise no_example(cfg.split, str(cfg.mixture_or_task_name))
        return compute(metrics)

    return evaluate


def text_evaluations(evaluator: Any) -> dict[str, Evaluate]:
    """Returns the evaluations of decoded text, a split 'inference_eval/TASK' per task."""

    def of(task: str) -> Evaluate:
        return lambda state: evaluator.evaluate(state.evaluated_params, int(state.step), [task])[
            task
        ]

    return {f"inference_eval/{task}": of(task) for task in evaluator.tasks}


def compute(metrics: Metrics) -> dict[str, float]:
    """Waits for the devices; returns the averages, and those of parts that a metric names."""
    values: dict[str, float] = {}
    for name, metric in jax.device_get(metrics).items():
        values[name] = float(metric.compute())
        values |= getattr(metric, "parts", dict)()
    return values
