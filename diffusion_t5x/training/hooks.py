"""Hooks of the training loop: logging, evaluation, early stopping and checkpoints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from diffusion_t5x.checkpointing.checkpoints import Checkpointer
from diffusion_t5x.data import datasets
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
      results: Metrics of this step's evaluations, 'split/metric' -> value.
      shown: Values that the progress display shows.
    """

    step: int
    last_step: int
    state: TrainState
    metrics: Metrics
    preempted: bool = False
    stopped_early: bool = False
    results: dict[str, float] = dataclasses.field(default_factory=dict)
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
# Metrics of some evaluations of a state: split -> metric -> value.
Evaluate = Callable[[TrainState], Mapping[str, Mapping[str, float]]]


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
    evaluations: list[Evaluate], log: MetricLog, early_stopping: EarlyStopping, watchdog: Watchdog
) -> Callable[[Run], None]:
    """Returns a hook that evaluates, logs the results, and may stop training early.

    A preempted run is not evaluated: the time it is given is for saving. The watchdog is suspended
    meanwhile, since evaluations may take any time.
    """

    def hook(run: Run) -> None:
        if run.preempted:
            return
        with watchdog.suspended():
            results = [evaluate(run.state) for evaluate in evaluations]
        for split, values in ((s, v) for result in results for s, v in result.items()):
            log.write(run.step, split, values)
            run.results.update({f"{split}/{name}": value for name, value in values.items()})
        run.stopped_early = early_stopping.should_stop(log.lines)

    return hook


def saving(
    checkpointer: Checkpointer, iterator: datasets.DatasetIterator, log: MetricLog
) -> Callable[[Run], None]:
    """Returns a hook that saves a checkpoint, after the log, which a resumed run continues."""

    def hook(run: Run) -> None:
        log.flush()
        checkpointer.save(run.state, iterator, run.results)

    return hook


def loss_evaluation(
    trainer: Trainer, cfg: datasets.DatasetConfig, num_batches: int | None, random_seed: int
) -> Evaluate:
    """Returns an evaluation of the loss, as split 'training_eval'.

    It takes `num_batches` batches, None for the whole split; `random_seed` is that of the data,
    unless `cfg` has its own.
    """
    layout = trainer.partitioner.data_layout(cfg.batch_size)
    converter = trainer.model.FEATURE_CONVERTER_CLS
    shapes: Metrics | None = None

    def evaluate(state: TrainState) -> dict[str, dict[str, float]]:
        nonlocal shapes
        metrics: Metrics | None = None
        for rows in datasets.get_eval_batches(
            cfg, converter, layout=layout, num_batches=num_batches, seed=random_seed
        ):
            batch = trainer.partitioner.shard_batch(rows)
            if metrics is None:
                shapes = shapes or trainer.eval_metric_shapes(state, batch)
                metrics = trainer.empty_metrics(shapes)
            metrics = trainer.eval_step(state.params, metrics, batch)
        if metrics is None:
            raise ValueError(
                f"split {cfg.split!r} of {cfg.mixture_or_task_name!r} has no example to evaluate."
            )
        return {"training_eval": compute(metrics)}

    return evaluate


def text_evaluation(evaluator: Any) -> Evaluate:
    """Returns an evaluation of decoded text, with a split 'inference_eval/TASK' per task."""

    def evaluate(state: TrainState) -> dict[str, dict[str, float]]:
        results = evaluator.evaluate(state.params, int(state.step))
        return {f"inference_eval/{task}": metrics for task, metrics in results.items()}

    return evaluate


def compute(metrics: Metrics) -> dict[str, float]:
    """Waits for the devices; returns the averages."""
    return {name: float(metric.compute()) for name, metric in jax.device_get(metrics).items()}
