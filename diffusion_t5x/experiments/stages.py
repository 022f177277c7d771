"""Stages of an experiment: the commands that train, choose and test every row of its table.

Stages are named after what they make, not after the experiment, so experiments of one scale share
the stages that they have in common.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TypeVar

from etils import epath

from diffusion_t5x.experiments.experiment_graph import (
    DEFAULT,
    GIN_FILE,
    Bindings,
    Experiment,
    Method,
    Pretraining,
    Row,
    Scale,
    TaskSettings,
    lookup,
    rows,
)

T = TypeVar("T")
BEST = "{best}"  # stands in a path for the step that was best on the validation split
NO_BINDINGS: Bindings = {}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command of an experiment.

    Attributes:
      name: Unique within a scale, and the directory that the command writes to.
      command: 'train', 'eval' or 'sample'.
      files: Gin files.
      bindings: Gin bindings; `BEST` in CHECKPOINT_PATH stands for the step that `after` chooses.
      after: Name of the stage that must have finished.
      steps: Most training steps; 0 where nothing is trained.
      tokens: Positions that these steps train on, prefixes and padding included.
      title: What the stage does, in words.
    """

    name: str
    command: str
    files: tuple[str, ...]
    bindings: Bindings
    after: str | None = None
    steps: int = 0
    tokens: int = 0
    title: str = dataclasses.field(default="", compare=False)

    def argv(self, best: int | None = None) -> list[str]:
        """Returns the command's arguments; `best` replaces `BEST`, which stays where it is None."""
        values = dict(self.bindings)
        if best is not None:
            values["CHECKPOINT_PATH"] = values["CHECKPOINT_PATH"].replace(BEST, str(best))
        files = [f"--gin_file={file}" for file in self.files]
        return [*files, *(f"--gin.{name}={value!r}" for name, value in values.items())]


def make(experiment: Experiment, scale: Scale, root: epath.Path) -> list[Stage]:
    """Returns the stages, below the scale's directory `root`, in an order in which they can run.

    Raises:
      ValueError: if the scale lacks something that the experiment names, or two methods give one
        name to different stages.
    """
    found: dict[str, Stage] = {}
    every = [row for _, row in rows(experiment)]
    most = max(scale.seeds.get(row.size, 1) for row in every)
    axes = (experiment.architectures, experiment.sizes, experiment.pretraining)
    for seed, row in itertools.product(range(most), every):
        if seed >= scale.seeds.get(row.size, 1):
            continue
        names = (row.architecture, row.size, row.pretraining)
        varying = [name for name, axis in zip(names, axes, strict=True) if len(axis) > 1]
        varying += [f"seed {seed}"] * (most > 1)
        where = f" ({', '.join(varying)})" if varying else ""
        builder = _Builder(scale, root, dataclasses.replace(row, seed=seed), where)
        pretraining = builder.pretraining()
        made = list(pretraining)
        for role in experiment.tasks:
            task = lookup(scale.tasks, role, "task")
            made += builder.of_task(task, pretraining, experiment.decoding[row.decoding])
        for stage in made:
            if found.setdefault(stage.name, stage) != stage:
                raise ValueError(
                    f"method {row.method.name!r} needs a stage {stage.name!r} of other settings "
                    "than another method's; give its Method another name, or another adapt_stage."
                )
    return list(found.values())


def _of_kind(value: T | Mapping[str, T], kind: str, setting: str) -> T:
    """Returns a scale's setting for a kind of decoding, where it differs between kinds."""
    return lookup(value, kind, f"{setting}, kind") if isinstance(value, Mapping) else value


@dataclasses.dataclass(frozen=True)
class _Builder:
    """Makes the stages of one row and seed; `where` ends their titles."""

    scale: Scale
    root: epath.Path
    row: Row
    where: str

    def _stage(
        self,
        name: str,
        run: str,
        method: Method,
        data: Pretraining | TaskSettings,
        title: str,
        after: str | None,
        bindings: Bindings,
        steps: int = 0,
        decoder: str | None = None,
    ) -> Stage:
        """Makes a stage of the gin file `run`, whose `bindings` follow those of all stages.

        `decoder` is a gin file that follows the method's own.
        """
        model = lookup(self.scale.models, f"{self.row.architecture}/{self.row.size}", "model")
        return Stage(
            name,
            "eval" if run == "eval" else "train",
            (
                model,
                *method.files,
                *([decoder] if decoder else []),
                f"runs/{run}.gin",
                *self.scale.settings,
            ),
            {
                **self.scale.model_bindings.get(self.row.size, NO_BINDINGS),
                **method.bindings,
                "MIXTURE_OR_TASK_NAME": (
                    data.mixture if isinstance(data, Pretraining) else data.name
                ),
                "TASK_FEATURE_LENGTHS": {"inputs": data.inputs, "targets": data.targets},
                "RANDOM_SEED": self.row.seed,
                **bindings,
            },
            after,
            steps,
            steps * self.scale.batch_size * (data.inputs + data.targets),
            f"{title}{self.where}",
        )

    def _train(
        self,
        name: str,
        run: str,
        method: Method,
        data: Pretraining | TaskSettings,
        title: str,
        before: Sequence[Stage],
        steps: int,
        period: int,
        extra: Bindings = NO_BINDINGS,
    ) -> Stage:
        """Makes a training of `steps` steps from the model that the stages `before` lead to."""
        bindings = {
            "MODEL_DIR": str(self.root / name),
            "EVAL_PERIOD": period,
            "CHECKPOINT_PERIOD": period,
            **extra,
        }
        start = before[-1].name if before else None
        if start is None:
            bindings["TRAIN_STEPS"] = steps
        else:
            bindings["INITIAL_CHECKPOINT_PATH"] = str(self.root / start)
            bindings["TRAIN_STEPS_RELATIVE"] = steps
        scheduler, rate = "optimizers.create_learning_rate_scheduler", method.learning_rate
        if rate is None and self.scale.learning_rates is not None:
            rate = _of_kind(self.scale.learning_rates, method.kind, "learning_rates")
        if rate is not None:
            bindings[f"{scheduler}.base_learning_rate"] = rate
        if self.scale.learning_rates is not None:
            bindings[f"{scheduler}.step_offset"] = sum(stage.steps for stage in before)
            bindings[f"{scheduler}.steps_per_cycle"] = steps
        return self._stage(name, run, method, data, title, start, bindings, steps)

    def pretraining(self) -> list[Stage]:
        """Makes the pretraining and the adaptation."""
        scale = self.scale
        data = lookup(scale.pretraining, self.row.pretraining, "pretraining")
        made: list[Stage] = []
        for stage, method in self.row.method.pretraining():
            steps = method.pretrain_steps or scale.pretrain_steps
            run, period = "pretrain", min(steps, scale.pretrain_checkpoint_period)
            if made:
                run, n = "adapt", method.adapt_steps
                steps = lookup(scale.adapt_steps, n, "adapt_steps") if isinstance(n, str) else n
                period = min(scale.pretrain_checkpoint_period, steps)
            name, title = f"{self.row.base}/{stage}", f"{run} {method.shown}"
            made.append(self._train(name, run, method, data, title, made, steps, period))
        return made

    def of_task(
        self, task: TaskSettings, before: Sequence[Stage], decoding: Bindings
    ) -> list[Stage]:
        """Makes fine-tuning, the choice of its best checkpoint, and the measurement of that one."""
        method, run = self.row.method, self.row.run(task)
        decoding = dict(decoding)
        decoder = decoding.pop(GIN_FILE, None)
        shown = f"{method.shown} on {task.name}"
        # Checkpoints are decoded for their choice, not in training.
        extra: dict[str, object] = {"trainer.train.infer_eval_dataset_cfg": None}
        if self.scale.patience is not None:
            extra["PATIENCE"] = self.scale.patience
        steps, period = method.finetune_steps, method.checkpoint_period
        steps = steps or _of_kind(task.finetune_steps, method.kind, "finetune_steps")
        period = period or _of_kind(task.checkpoint_period, method.kind, "checkpoint_period")
        title = f"fine-tune {shown}"
        training = self._train(
            f"{run}/train", "finetune", method, task, title, before, steps, period, extra
        )
        validation = self._stage(
            f"{run}/validation",
            "eval",
            method,
            task,
            title=f"choose a checkpoint of {shown}",
            after=training.name,
            bindings={
                "CHECKPOINT_PATH": str(self.root / training.name),
                "EVAL_OUTPUT_DIR": str(self.root / run / "validation"),
                "EVALUATOR_NUM_EXAMPLES": self.scale.validation_examples,
                "BEST_METRIC": task.validation_metric or task.metric,
                "datasets.DatasetConfig.split": task.validation_split,
            },
        )
        how = "test" if self.row.decoding == DEFAULT else f"test with {self.row.decoding}"
        test = self._stage(
            self.row.test(task),
            "eval",
            method,
            task,
            title=f"{how} {shown}",
            after=validation.name,
            bindings={
                "CHECKPOINT_PATH": str(self.root / training.name / f"checkpoint_{BEST}"),
                "EVAL_OUTPUT_DIR": str(self.root / self.row.test(task)),
                "EVALUATOR_NUM_EXAMPLES": self.scale.test_examples,
                "datasets.DatasetConfig.split": task.test_split,
                **({"NUM_DECODES": task.num_decodes} if task.num_decodes > 1 else {}),
                **task.decoding.get(method.kind, NO_BINDINGS),
                **method.decoding,
                **decoding,
            },
            decoder=decoder,
        )
        return [training, validation, test]
