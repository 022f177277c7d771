"""Training: from a configuration to checkpoints and metrics; killed at any moment, it goes on."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

from diffusion_t5x.checkpointing.checkpoints import CheckpointConfig, Checkpointer
from diffusion_t5x.data import datasets, vocabularies
from diffusion_t5x.runtime.disk_space import stops_when_full
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.preemption import Preempted, stop_on_sigterm
from diffusion_t5x.runtime.terminal import Progress
from diffusion_t5x.runtime.train_state import (
    TrainState,
    abstract_train_state,
    input_shapes_and_types,
)
from diffusion_t5x.runtime.watchdog import Watchdog
from diffusion_t5x.training import dry_run as dry_run_report
from diffusion_t5x.training import initial_state, run_record
from diffusion_t5x.training.early_stopping import EarlyStopping
from diffusion_t5x.training.metric_logs import MetricLog, write_model_info
from diffusion_t5x.training.nonfinite import NonFiniteSteps
from diffusion_t5x.training.train_step import Health, Metrics, Trainer

# Steps handed to the devices before the oldest one's result is looked at.
STEPS_IN_FLIGHT = 2


def train(
    *,
    model: Any,
    model_dir: str,
    train_dataset_cfg: datasets.DatasetConfig,
    partitioner: PjitPartitioner,
    trainer_cls: Callable[..., Trainer],
    total_steps: int | None = None,
    train_eval_dataset_cfg: datasets.DatasetConfig | None = None,
    infer_eval_dataset_cfg: datasets.DatasetConfig | None = None,
    checkpoint_cfg: CheckpointConfig = CheckpointConfig(),  # noqa: B008 (frozen)
    eval_steps: int | None = 20,
    eval_period: int = 1000,
    relative_steps: int | None = None,
    early_stopping: EarlyStopping = EarlyStopping(),  # noqa: B008 (frozen)
    random_seed: int = 0,
    inference_evaluator_cls: Callable[..., Any] | None = None,
    log_period: int = 100,
    step_timeout_seconds: float | None = 1800.0,
    summarize_config_fn: Callable[[str], None] | None = None,
    dry_run: bool = False,
) -> TrainState | dry_run_report.Report:
    """Trains until `total_steps`, from the run's latest checkpoint if it has one.

    Args:
      model: what to train, of `models.Model`'s kind.
      model_dir: directory of the run, which gets `checkpoint_{step}/`, `config.gin`,
        `model-info.txt`, `metrics.jsonl` and TensorBoard events.
      train_dataset_cfg: training data.
      partitioner: devices and sharding.
      trainer_cls: makes the `Trainer`.
      total_steps: step to stop at; steps of an initial checkpoint count.
      train_eval_dataset_cfg: data on which the loss is evaluated; None for no such evaluation.
      infer_eval_dataset_cfg: data to decode and measure; None for no such evaluation.
      checkpoint_cfg: what to save and where to start from.
      eval_steps: batches of a loss evaluation; None for the whole split.
      eval_period: steps between evaluations; there is always one at the end.
      relative_steps: steps beyond the initial checkpoint's; goes before `total_steps`, and one of
        the two is needed.
      early_stopping: when evaluations say that it is enough; the last step is saved.
      random_seed: of parameters, data order, and all that is drawn in a step.
      inference_evaluator_cls: makes the evaluator of decoded text.
      log_period: steps between lines of metrics.
      step_timeout_seconds: the longest that a step may take, its data and saving included,
        evaluations and compilation not; then the process ends with its stacks and exit code 69.
        None or 0 for no limit.
      summarize_config_fn: writes the configuration to the run's directory.
      dry_run: check everything, compile the step, report, and stop before anything is made.

    Returns:
      The final state; of a dry run, what it found.

    Raises:
      NonFiniteError: if the loss, a gradient or an update is not finite, in more steps in a row
        than `Trainer.max_skipped_updates` allows; `nonfinite/` has the batch.
      CheckpointMismatchError: if a checkpoint does not fit the model.
      DamagedCheckpointError: if the initial checkpoint is damaged, or all of the run's own.
      DiskFull: if something cannot be written for lack of room.
      FileNotFoundError: if the initial checkpoint is not there.
      OtherRunError: if `model_dir` holds checkpoints of a run of something else.
      Preempted: after SIGTERM, everything saved.
      DoesNotFit: in a dry run, if the step needs more memory than a device has.
      ValueError: if settings do not go together.
    """
    for name, period in (("EVAL_PERIOD", eval_period), ("log_period", log_period)):
        if not isinstance(period, int) or period < 1:
            raise ValueError(f"{name} = {period!r}; expected a positive whole number of steps.")
    start = initial_state.find(model_dir, checkpoint_cfg)
    last_step = start.last_step(total_steps, relative_steps)
    watchdog = Watchdog(step_timeout_seconds)
    iterator = datasets.get_training_iterator(
        train_dataset_cfg,
        model.FEATURE_CONVERTER_CLS,
        layout=partitioner.data_layout(train_dataset_cfg.batch_size),
        seed=random_seed,
    )
    for cfg in (train_dataset_cfg, train_eval_dataset_cfg):
        _check_data(model, cfg)
    record = run_record.describe(model, str(train_dataset_cfg.mixture_or_task_name))
    if start.is_own:
        run_record.check(model_dir, record)
    shapes, types = input_shapes_and_types(iterator.element_spec)
    abstract = abstract_train_state(model, partitioner, shapes, types)
    start.check(abstract)
    trainer = trainer_cls(
        model=model, partitioner=partitioner, abstract_state=abstract, random_seed=random_seed
    )
    trainer.check_batch_size(train_dataset_cfg.batch_size)
    evaluations = _Evaluations(
        model, partitioner, trainer, train_eval_dataset_cfg, infer_eval_dataset_cfg,
        inference_evaluator_cls, eval_steps, model_dir, random_seed,
    )  # fmt: skip
    if dry_run:
        next(iterator)  # which says what is wrong with the data
        if jax.process_index() == 0:
            print(f"start: {start}; {initial_state.what_is_left(start.step, last_step)}")
        size = train_dataset_cfg.batch_size
        job = dry_run_report.Job(
            model, partitioner, trainer_cls, size, shapes, types, trainer.num_microbatches
        )
        return dry_run_report.check(job)
    with stops_when_full(model_dir), _open_checkpointer(model_dir, checkpoint_cfg) as checkpointer:
        state = initial_state.restore(
            start, model, partitioner, abstract, checkpointer, iterator, random_seed,
            (shapes, types),
        )  # fmt: skip
        write_model_info(model_dir, abstract)
        run_record.write(model_dir, record)
        if summarize_config_fn is not None and jax.process_index() == 0:
            summarize_config_fn(model_dir)
        with MetricLog(model_dir, int(state.step), train_dataset_cfg.batch_size) as log:
            nonfinite = NonFiniteSteps(
                model_dir, int(state.step), trainer.leaf_names, trainer.max_skipped_updates,
                random_seed, _vocabularies(model),
            )  # fmt: skip
            loop = _Loop(
                trainer, partitioner, iterator, evaluations, checkpointer, log, nonfinite,
                early_stopping, watchdog,
            )  # fmt: skip
            return loop.run(state, last_step, log_period, eval_period)


def _vocabularies(model: Any) -> dict[str, Any]:
    """Stack -> vocabulary, of a model that has some."""
    names = {"encoder": "input_vocabulary", "decoder": "output_vocabulary"}
    found = {stack: getattr(model, name, None) for stack, name in names.items()}
    return {stack: vocabulary for stack, vocabulary in found.items() if vocabulary is not None}


def _check_data(model: Any, cfg: datasets.DatasetConfig | None) -> None:
    """Checks that there is such data, and that its tokens are the model's."""
    if cfg is None:
        return
    converter = model.FEATURE_CONVERTER_CLS(
        pack=cfg.pack, use_custom_packing_ops=cfg.use_custom_packing_ops
    )
    task = datasets.find_task(cfg, converter)
    vocabularies.check_task(task, model.input_vocabulary, model.output_vocabulary)


@contextmanager
def _open_checkpointer(model_dir: str, config: CheckpointConfig) -> Iterator[Checkpointer | None]:
    """The run's checkpointer, which finishes what it is writing however training ends."""
    if config.save is None:
        yield None
        return
    checkpointer = Checkpointer(model_dir, config.save)
    try:
        yield checkpointer
    finally:
        checkpointer.close()


class _Evaluations:
    """The evaluations that training stops for; each gives named numbers."""

    def __init__(
        self, model: Any, partitioner: PjitPartitioner, trainer: Trainer,
        loss_cfg: datasets.DatasetConfig | None, text_cfg: datasets.DatasetConfig | None,
        evaluator_cls: Callable[..., Any] | None, steps: int | None, model_dir: str, seed: int,
    ):  # fmt: skip
        self._model, self._partitioner, self._trainer = model, partitioner, trainer
        self._loss_cfg, self._steps, self._seed = loss_cfg, steps, seed
        self._shapes: Metrics | None = None
        self._evaluator = None
        if text_cfg is not None and evaluator_cls is not None:
            self._evaluator = evaluator_cls(
                model=model,
                dataset_cfg=text_cfg,
                partitioner=partitioner,
                output_dir=f"{model_dir}/inference_eval",
                random_seed=seed,
            )

    def run(self, state: TrainState) -> dict[str, dict[str, float]]:
        """split -> metric -> value, e.g. {'training_eval': {'loss': 1.0}}."""
        results = {}
        if self._loss_cfg is not None:
            results["training_eval"] = self._loss(state, self._loss_cfg)
        if self._evaluator is not None:
            for task, metrics in self._evaluator.evaluate(state.params, int(state.step)).items():
                results[f"inference_eval/{task}"] = metrics
        return results

    def _loss(self, state: TrainState, cfg: datasets.DatasetConfig) -> dict[str, float]:
        metrics: Metrics | None = None
        for local in datasets.get_eval_batches(
            cfg,
            self._model.FEATURE_CONVERTER_CLS,
            layout=self._partitioner.data_layout(cfg.batch_size),
            num_batches=self._steps,
            seed=self._seed,
        ):
            batch = self._partitioner.shard_batch(local)
            if metrics is None:
                if self._shapes is None:
                    self._shapes = self._trainer.eval_metric_shapes(state, batch)
                metrics = self._trainer.empty_metrics(self._shapes)
            metrics = self._trainer.eval_step(state.params, metrics, batch)
        if metrics is None:
            raise ValueError(
                f"split {cfg.split!r} of {cfg.mixture_or_task_name!r} has no example to evaluate."
            )
        return _compute(metrics)


def _compute(metrics: Metrics) -> dict[str, float]:
    return {name: float(metric.compute()) for name, metric in jax.device_get(metrics).items()}


class _Loop:
    """The steps themselves."""

    def __init__(
        self,
        trainer: Trainer,
        partitioner: PjitPartitioner,
        iterator: datasets.DatasetIterator,
        evaluations: _Evaluations,
        checkpointer: Checkpointer | None,
        log: MetricLog,
        nonfinite: NonFiniteSteps,
        early_stopping: EarlyStopping,
        watchdog: Watchdog,
    ):
        self._trainer = trainer
        self._partitioner = partitioner
        self._iterator = iterator
        self._evaluations = evaluations
        self._checkpointer = checkpointer
        self._log = log
        self._nonfinite = nonfinite
        self._watchdog = watchdog
        self._early_stopping = early_stopping
        self._in_flight: collections.deque[tuple[Health, datasets.Batch]] = collections.deque()

    def run(
        self, state: TrainState, total_steps: int, log_period: int, eval_period: int
    ) -> TrainState:
        """Trains from `state` until `total_steps`, or until evaluations say that it is enough."""
        step = int(state.step)
        if step >= total_steps:
            if jax.process_index() == 0:
                print(initial_state.what_is_left(step, total_steps), flush=True)
            return state
        if self._early_stopping.should_stop(self._log.lines):
            return state
        local, batch = self._next_batch()
        empty = self._trainer.metric_shapes(state, batch)
        metrics = self._trainer.empty_metrics(empty)
        run_step = self._trainer.step.lower(state, metrics, batch).compile()
        period = self._checkpointer.config.period if self._checkpointer else total_steps
        progress = Progress(total_steps, "training", "steps", initial=step)
        with stop_on_sigterm() as told_to_stop, progress, self._watchdog:
            started, logged = time.monotonic(), step
            while step < total_steps:
                self._watchdog.beat(f"step {step + 1}")
                state, metrics, health = run_step(state, metrics, batch)
                step += 1
                self._in_flight.append((health, local))
                if len(self._in_flight) > STEPS_IN_FLIGHT:
                    self._nonfinite.look_at(*self._in_flight.popleft())
                progress.update()
                if self._checkpointer is not None:
                    self._checkpointer.check()
                stopping = told_to_stop(step)
                last = step == total_steps or stopping
                due = [last or step % every == 0 for every in (log_period, eval_period, period)]
                if any(due):
                    self._drain()
                    self._log.count(time.monotonic() - started)
                    if due[0]:
                        values = _compute(metrics)
                        if self._trainer.max_skipped_updates:
                            # Where all were skipped there is nothing to average over.
                            values = {k: v for k, v in values.items() if math.isfinite(v)}
                            values["skipped_updates"] = self._nonfinite.skipped_since(logged)
                        self._log.training(step, values)
                        logged = step
                        progress.update(0, loss=values.get("loss", math.nan))
                        metrics = self._trainer.empty_metrics(empty)
                    enough = self._pause(state, step, due[1] and not stopping, due[2])
                    if enough:
                        print(f"stopped at step {step}: {self._early_stopping}.", flush=True)
                        return state
                    started = time.monotonic()
                if stopping:
                    print(f"stopped at step {step} as told; everything is saved.", flush=True)
                    raise Preempted
                if step < total_steps:
                    local, batch = self._next_batch()
        return state

    def _next_batch(self) -> tuple[datasets.Batch, dict[str, jax.Array]]:
        """This process's rows, and the global batch."""
        local = next(self._iterator)
        return local, self._partitioner.shard_batch(local)

    def _drain(self) -> None:
        """Waits for all steps and checks each, so that nothing broken is logged or saved."""
        while self._in_flight:
            self._nonfinite.look_at(*self._in_flight.popleft())

    def _pause(self, state: TrainState, step: int, evaluate: bool, save: bool) -> bool:
        """Evaluates and saves what is due; whether the evaluations say that it is enough."""
        with self._watchdog.suspended():
            results = self._evaluations.run(state) if evaluate else {}
        flat = {}
        for split, values in results.items():
            self._log.evaluation(step, split, values)
            flat.update({f"{split}/{name}": value for name, value in values.items()})
        enough = evaluate and self._early_stopping.should_stop(self._log.lines)
        if (save or enough) and self._checkpointer is not None:
            self._checkpointer.save(state, self._iterator, flat)
        return enough
