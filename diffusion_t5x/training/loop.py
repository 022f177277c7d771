"""The training loop: from a configuration to checkpoints and metrics, resumable at any step.

`train` is longer than other functions here: it is the story of a run, a chapter after a heading,
and the order of the chapters matters.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from diffusion_t5x import paths
from diffusion_t5x.checkpointing.checkpoints import CheckpointConfig, Checkpointer
from diffusion_t5x.data import datasets, lengths, task_checks, vocabularies
from diffusion_t5x.interfaces import Model
from diffusion_t5x.names import check_known
from diffusion_t5x.runtime import directory_lock
from diffusion_t5x.runtime.guards import Watchdog
from diffusion_t5x.runtime.interrupts import stop_on_signals
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.terminal import Progress
from diffusion_t5x.runtime.train_state import (
    TrainState,
    abstract_train_state,
    create_train_state,
    input_shapes_and_types,
)
from diffusion_t5x.training import dry_run as dry_runs
from diffusion_t5x.training import hooks, initial_state, run_record
from diffusion_t5x.training.early_stopping import EarlyStopping
from diffusion_t5x.training.metric_logs import MetricLog, write_model_info
from diffusion_t5x.training.nonfinite import NonFiniteSteps
from diffusion_t5x.training.train_step import Health, Trainer

# Steps that are dispatched to the devices before the host waits for the oldest one's result.
STEPS_IN_FLIGHT = 2


def train(
    *,
    model: Model,
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
    on_metric_error: Literal["continue", "stop"] = "continue",
    log_period: int = 100,
    step_timeout_seconds: float | None = 1800.0,
    summarize_config_fn: Callable[[str], None] | None = None,
    dry_run: bool = False,
) -> TrainState | dry_runs.Report:
    """Trains until `total_steps`, resuming from the run's latest checkpoint if it has one.

    Returns the final state, or the report of a dry run.

    Args:
      model_dir: Directory of the run, which gets `checkpoint_{step}/`, `config.gin`,
        `model-info.txt`, `metrics.jsonl` and TensorBoard events.
      total_steps: Step to stop at; steps of an initial checkpoint count.
      train_eval_dataset_cfg: Data to evaluate the loss on; None for no such evaluation.
      infer_eval_dataset_cfg: Data to decode and measure; None for no such evaluation.
      checkpoint_cfg: The checkpoints to save and the one to start from.
      eval_steps: Number of batches of a loss evaluation; None for the whole split.
      eval_period: Steps between evaluations; there is always one at the end.
      relative_steps: Steps beyond the initial checkpoint's; takes precedence over `total_steps`,
        and one of the two is required.
      early_stopping: Rule that ends training when evaluations no longer improve; the last step is
        saved.
      random_seed: Seed of parameters, data order, and all random draws in a step.
      inference_evaluator_cls: Factory of the evaluator of decoded text.
      on_metric_error: Whether the run goes on if a task's metric fails. It is reported in any
        case, and the step is saved; by default the run goes on, since `eval` can measure the
        checkpoint later while hours of devices come back no more.
      log_period: Steps between lines of metrics.
      step_timeout_seconds: Longest time that a step may take, including its data and saving but
        not evaluations and compilation; beyond it the process ends with its stacks and exit code
        69. None or 0 for no limit.
      summarize_config_fn: Writes the configuration to the run's directory.
      dry_run: Check everything, compile the step, report its memory, and write nothing.

    Raises:
      NonFiniteError: If the loss, a gradient or an update is not finite in more steps in a row
        than `Trainer.max_skipped_updates` allows; `nonfinite/` has the batch.
      CheckpointMismatchError: If a checkpoint does not fit the model.
      DamagedCheckpointError: If the initial checkpoint is damaged, or all of the run's own.
      FileNotFoundError: If the initial checkpoint does not exist.
      InUseError: If another process trains in `model_dir`.
      MetricError: If a metric fails and `on_metric_error` is 'stop'.
      OtherRunError: If `model_dir` holds checkpoints of a run with other settings.
      Preempted, Interrupted: After SIGTERM or Ctrl-C, once everything is saved.
      DoesNotFit: In a dry run, if the step needs more memory than a device has.
      ValueError: If settings contradict each other.
    """
    # Set-up: the state to start from, and how far to go.
    _check_settings(on_metric_error, EVAL_PERIOD=eval_period, log_period=log_period)
    model_dir = str(paths.writable(model_dir, "MODEL_DIR"))
    if not dry_run:
        directory_lock.check(model_dir, "MODEL_DIR")
    start = initial_state.find(model_dir, checkpoint_cfg)
    last_step = start.last_step(total_steps, relative_steps)
    watchdog = Watchdog(step_timeout_seconds)

    # Data: this process's rows of each global batch, without end.
    batch_size = train_dataset_cfg.batch_size
    iterator = datasets.get_training_iterator(
        train_dataset_cfg,
        model.FEATURE_CONVERTER_CLS,
        layout=partitioner.data_layout(batch_size),
        seed=random_seed,
    )
    train_eval_dataset_cfg = _check_tasks(
        model, train_dataset_cfg, train_eval_dataset_cfg, random_seed
    )
    record = run_record.describe(model, str(train_dataset_cfg.mixture_or_task_name))
    if start.is_own:
        run_record.check(model_dir, record)

    # State: shapes and shardings alone, compared with the checkpoint before anything is allocated.
    spec = input_shapes_and_types(iterator.element_spec)
    trainer = trainer_cls(
        model=model,
        partitioner=partitioner,
        abstract_state=abstract_train_state(model, partitioner, *spec),
        random_seed=random_seed,
        first_step=start.first_step,
    )
    abstract = trainer.abstract_state
    start = start.fit(abstract)
    trainer.check_batch_size(batch_size)

    # Evaluations that training pauses for.
    evaluations: dict[str, hooks.Evaluate] = {}
    if train_eval_dataset_cfg is not None:
        evaluations["training_eval"] = hooks.loss_evaluation(
            trainer, train_eval_dataset_cfg, eval_steps, random_seed
        )
    if infer_eval_dataset_cfg is not None and inference_evaluator_cls is not None:
        evaluations |= hooks.text_evaluations(
            inference_evaluator_cls(
                model=model,
                dataset_cfg=infer_eval_dataset_cfg,
                partitioner=partitioner,
                output_dir=f"{model_dir}/inference_eval",
                random_seed=random_seed,
            )
        )

    # By now every mistake in the settings has been found, and nothing has been written.
    if dry_run:
        next(iterator)  # raises if the data cannot be read
        _say(f"start: {start}; {initial_state.what_is_left(start.step, last_step)}")
        batch = dry_runs.abstract_batch(trainer, batch_size, *spec)
        return dry_runs.check(trainer, abstract, batch)

    # Start: arrays, restored or fresh, and the files that describe the run.
    with contextlib.ExitStack() as opened:
        opened.enter_context(directory_lock.hold(model_dir, "MODEL_DIR"))
        checkpointer = None
        if checkpoint_cfg.save is not None:
            # Finishes pending saves however training ends.
            checkpointer = opened.enter_context(
                contextlib.closing(Checkpointer(model_dir, checkpoint_cfg.save, start.damaged))
            )
        key = jax.random.fold_in(jax.random.PRNGKey(random_seed), np.uint32(2**32 - 1))
        create = functools.partial(create_train_state, model, partitioner, *spec, key)
        state = trainer.begin_average(
            initial_state.restore(start, abstract, checkpointer, iterator, create)
        )
        step = int(state.step)
        write_model_info(model_dir, abstract)
        run_record.write(model_dir, record, start.first_step)
        if summarize_config_fn is not None and jax.process_index() == 0:
            summarize_config_fn(model_dir)
        log = opened.enter_context(MetricLog(model_dir, step, batch_size))
        nonfinite = NonFiniteSteps(
            model_dir, step, trainer.leaf_names, trainer.max_skipped_updates, random_seed
        )

        # Hooks: the work between steps, in this order. Saved first, a step survives an evaluation
        # that fails or is killed.
        evaluate = hooks.evaluation(
            evaluations,
            log,
            early_stopping,
            watchdog,
            on_metric_error,
            partitioner.compile_seconds,
        )
        save, finish = hooks.saving(checkpointer, iterator, log)
        periodic = [
            (log_period, hooks.logging(log, trainer, nonfinite)),
            *save,
            (eval_period, evaluate),
            *finish,
        ]

        # An evaluation that was due when the run was interrupted.
        if start.is_own and (step % eval_period == 0 or step >= last_step):
            evaluate(hooks.Run(step, last_step, state, {}))

        # Loop.
        if step >= last_step or early_stopping.should_stop(log.lines):
            _say(initial_state.what_is_left(step, min(step, last_step)))
            return state
        return _run_steps(
            state, last_step, trainer, iterator, periodic, checkpointer, nonfinite, log, watchdog
        )


def _run_steps(
    state: TrainState,
    last_step: int,
    trainer: Trainer,
    iterator: datasets.DatasetIterator,
    periodic: Sequence[hooks.Hook],
    checkpointer: Checkpointer | None,
    nonfinite: NonFiniteSteps,
    log: MetricLog,
    watchdog: Watchdog,
) -> TrainState:
    """Compiles the step and runs it until the run ends; arguments and errors as in `train`."""
    # Compilation, once the first batch is there: data fail sooner than a compiler ends.
    rows = next(iterator)
    partitioner = trainer.partitioner
    batch = partitioner.shard_batch(rows)
    metrics = trainer.empty_metrics(trainer.metric_shapes(state, batch))
    run = hooks.Run(int(state.step), last_step, state, metrics)
    run_step = partitioner.compile("training step", trainer.step, state, metrics, batch)
    log.compiled(run.step, partitioner.compile_seconds)
    in_flight: collections.deque[tuple[Health, datasets.Batch]] = collections.deque()
    progress = Progress(last_step, "training", "steps", initial=run.step)
    with stop_on_signals() as stop, progress, watchdog:
        started = time.monotonic()
        while True:
            # The call returns before the devices have computed anything, and so does all else up
            # to `look_at`: the host prepares the next steps while the devices are at this one.
            run.state, run.metrics, health = run_step(run.state, run.metrics, batch)
            run.step += 1
            in_flight.append((health, rows))
            watchdog.beat(f"step {run.step + 1}")
            progress.update()
            if checkpointer is not None:
                checkpointer.check()  # raises what failed in the background
            # Asked at every step: on a pod, the processes agree on the step to stop at.
            run.preempted = stop.asked(run.step)
            pauses = any(run.is_due(every) for every, _ in periodic)
            # Looking at a step waits for it. Some steps stay in flight, which keeps the devices
            # busy, but none at a pause, so that nothing is logged or saved of a broken step.
            while len(in_flight) > (0 if pauses else STEPS_IN_FLIGHT):
                nonfinite.look_at(*in_flight.popleft())
            if pauses:
                log.count(time.monotonic() - started)
                for every, hook in periodic:
                    if run.is_due(every):
                        hook(run)
                progress.update(0, **run.shown)
                started = time.monotonic()
            if run.ends:
                break
            rows = next(iterator)
            batch = partitioner.shard_batch(rows)
    if run.preempted:
        raise stop.ended(run.step)
    if run.stopped_early:
        print(f"stopped early at step {run.step}, and everything is saved.", flush=True)
    return run.state


def _check_settings(on_metric_error: str, **periods: int) -> None:
    check_known(on_metric_error, ("continue", "stop"), "trainer.train.on_metric_error")
    for name, period in periods.items():
        if not isinstance(period, int) or period < 1:
            raise ValueError(f"{name} = {period!r}; expected a positive whole number of steps.")


def _check_tasks(
    model: Model,
    trained: datasets.DatasetConfig,
    evaluated: datasets.DatasetConfig | None,
    random_seed: int,
) -> datasets.DatasetConfig | None:
    """Checks that all tokens are the model's and, for data read later, that they exist.

    Says how much of the training data is cut.

    Returns:
      `evaluated`, or None if its task has a training split alone.
    """
    tasks = [datasets.get_mixture_or_task(str(trained.mixture_or_task_name))]
    if evaluated is not None and evaluated.split != "train":
        datasets.import_task_module(evaluated.module)
        task = datasets.get_mixture_or_task(str(evaluated.mixture_or_task_name))
        if set(task.splits) == {"train"}:
            _say(f"task {task.name!r} has only a training split: training goes without evaluation.")
            evaluated = None
    if evaluated is not None:
        converter = model.FEATURE_CONVERTER_CLS(
            pack=evaluated.pack, use_custom_packing_ops=evaluated.use_custom_packing_ops
        )
        tasks.append(datasets.find_task(evaluated, converter))
        if not evaluated.use_cached:
            task_checks.check_not_empty(tasks[-1], evaluated.split)
    for task in tasks:
        vocabularies.check_task(task, model.input_vocabulary, model.output_vocabulary)
    if jax.process_index() == 0:
        lengths.report_cut(trained, random_seed)
    return evaluated


def _say(text: str) -> None:
    """Prints from the first process."""
    if jax.process_index() == 0:
        print(text, flush=True)
