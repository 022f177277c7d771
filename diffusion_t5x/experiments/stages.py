"""Stages of an experiment: the commands that train, choose and test every row of its table.

Stages are named after what they make, not after the experiment, so experiments of one scale share
the stages that they have in common.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from diffusion_t5x.experiments.experiment_graph import (
    DEFAULT,
    NO_BINDINGS,
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
BEST = "{best}"  # stands in a binding for the step that was best on the validation split


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command of an experiment.

    Attributes:
      name: Unique within a scale, and the directory that the command writes to.
      command: 'train', 'eval' or 'sample'.
      files: Gin files.
      bindings: Gin bindings; `BEST` in one stands for the step chosen by `chosen_by`.
      after: Names of the stages that must have finished.
      steps: Most training steps; 0 where nothing is trained.
      tokens: Positions that these steps train on, prefixes and padding included.
      chosen_by: Name of the stage whose results name the best checkpoint.
      flags: Further arguments, which override the bindings.
      title: What the stage does, in words.
    """

    name: str
    command: str
    files: tuple[str, ...]
    bindings: Bindings
    after: tuple[str, ...] = ()
    steps: int = 0
    tokens: int = 0
    chosen_by: str | None = None
    flags: tuple[str, ...] = ()
    title: str = dataclasses.field(default="", compare=False)

    def argv(self, best: int | None = None) -> list[str]:
        """Returns the command's arguments; `best` replaces `BEST`, which stays where it is None."""
        values = dict(self.bindings)
        if best is not None:
            values["CHECKPOINT_PATH"] = values["CHECKPOINT_PATH"].replace(BEST, str(best))
        files = [f"--gin_file={file}" for file in self.files]
        return [*files, *(f"--gin.{k}={v!r}" for k, v in values.items()), *self.flags]


def make(experiment: Experiment, scale: Scale, root: pathlib.Path) -> list[Stage]:
    """Returns the stages of an experiment in an order in which they can run, each once.

    Args:
      experiment: What is compared.
      scale: How big everything is.
      root: Directory of the scale.

    Raises:
      ValueError: if the scale lacks something that the experiment names, or two methods give one
        name to different stages.
    """
    found: dict[str, Stage] = {}
    every = [row for _, row in rows(experiment)]
    most = max(scale.seeds.get(row.size, 1) for row in every)
    for seed, row in itertools.product(range(most), every):
        if seed >= scale.seeds.get(row.size, 1):
            continue
        varying = [
            *[row.architecture] * (len(experiment.architectures) > 1),
            *[row.size] * (len(experiment.sizes) > 1),
            *[row.pretraining] * (len(experiment.pretraining) > 1),
            *[f"seed {seed}"] * (most > 1),
        ]
        builder = _Builder(scale, root, row, seed, f" ({', '.join(varying)})" if varying else "")
        pretraining = builder.pretraining()
        made = list(pretraining)
        for role in experiment.tasks:
            task = lookup(scale.tasks, role, "task")
            made += [
                builder.finetuning(task, pretraining),
                builder.validation(task),
                builder.test(task, experiment.decoding[row.decoding]),
            ]
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
    root: pathlib.Path
    row: Row
    seed: int
    where: str

    def _path(self, name: str) -> str:
        return str(self.root / name)

    def _files(self, method: Method, run: str) -> tuple[str, ...]:
        model = lookup(self.scale.models, f"{self.row.architecture}/{self.row.size}", "model")
        return (model, method.objective, f"runs/{run}.gin", *self.scale.settings)

    def _common(self, method: Method, data: Pretraining | TaskSettings) -> dict[str, Any]:
        return {
            **self.scale.model_bindings.get(self.row.size, NO_BINDINGS),
            **method.bindings,
            "MIXTURE_OR_TASK_NAME": data.mixture if isinstance(data, Pretraining) else data.name,
            "TASK_FEATURE_LENGTHS": {"inputs": data.inputs, "targets": data.targets},
            "RANDOM_SEED": self.seed,
        }

    def _train(
        self,
        name: str,
        method: Method,
        run: str,
        data: Pretraining | TaskSettings,
        before: Sequence[Stage],
        steps: int,
        period: int,
        title: str,
        extra: Bindings = NO_BINDINGS,
    ) -> Stage:
        """Makes a training of `steps` steps from the model that the stages `before` lead to."""
        start = before[-1].name if before else None
        bindings = {
            **self._common(method, data),
            "MODEL_DIR": self._path(name),
            "EVAL_PERIOD": period,
            "CHECKPOINT_PERIOD": period,
            **extra,
        }
        if start is None:
            bindings["TRAIN_STEPS"] = steps
        else:
            bindings["INITIAL_CHECKPOINT_PATH"] = self._path(start)
            bindings["TRAIN_STEPS_RELATIVE"] = steps
        scheduler, rate = "optimizers.create_learning_rate_scheduler", method.learning_rate
        if rate is None and self.scale.learning_rates is not None:
            rate = _of_kind(self.scale.learning_rates, method.kind, "learning_rates")
        if rate is not None:
            bindings[f"{scheduler}.base_learning_rate"] = rate
        if self.scale.learning_rates is not None:
            bindings[f"{scheduler}.step_offset"] = sum(stage.steps for stage in before)
            bindings[f"{scheduler}.steps_per_cycle"] = steps
        return Stage(
            name,
            "train",
            self._files(method, run),
            bindings,
            after=(start,) if start else (),
            steps=steps,
            tokens=steps * self.scale.batch_size * (data.inputs + data.targets),
            title=f"{title}{self.where}",
        )

    def pretraining(self) -> list[Stage]:
        """Makes the pretraining and the adaptation."""
        scale = self.scale
        data = lookup(scale.pretraining, self.row.pretraining, "pretraining")
        made: list[Stage] = []
        for stage, method in self.row.method.pretraining():
            run, steps, n = "pretrain", scale.pretrain_steps, method.adapt_steps
            if made:
                run = "adapt"
                steps = lookup(scale.adapt_steps, n, "adapt_steps") if isinstance(n, str) else n
            name, title = f"{self.row.base(self.seed)}/{stage}", f"{run} {method.shown}"
            period = scale.pretrain_checkpoint_period
            period = min(period, steps) if made else period
            made.append(self._train(name, method, run, data, tuple(made), steps, period, title))
        return made

    def finetuning(self, task: TaskSettings, before: Sequence[Stage]) -> Stage:
        """Makes the fine-tuning of the model that the stages `before` lead to."""
        method, run = self.row.method, self.row.run(self.seed, task)
        extra: dict[str, Any] = {
            # The next stage decodes each checkpoint.
            "trainer.train.infer_eval_dataset_cfg": None,
        }
        if self.scale.patience is not None:
            extra["PATIENCE"] = self.scale.patience
        steps, period = method.finetune_steps, method.checkpoint_period
        steps = steps or _of_kind(task.finetune_steps, method.kind, "finetune_steps")
        period = period or _of_kind(task.checkpoint_period, method.kind, "checkpoint_period")
        title = f"fine-tune {method.shown} on {task.name}"
        return self._train(
            f"{run}/train", method, "finetune", task, before, steps, period, title, extra
        )

    def _eval(
        self,
        name: str,
        task: TaskSettings,
        checkpoint: str,
        num_examples: int | None,
        title: str,
        extra: Bindings,
        **links: Any,
    ) -> Stage:
        """Makes an evaluation of the checkpoints at `checkpoint`."""
        bindings = {
            **self._common(self.row.method, task),
            "CHECKPOINT_PATH": self._path(checkpoint),
            "EVAL_OUTPUT_DIR": self._path(name),
            "EVALUATOR_NUM_EXAMPLES": num_examples,
            **extra,
        }
        title = f"{title} {self.row.method.shown} on {task.name}"
        files = self._files(self.row.method, "eval")
        return Stage(name, "eval", files, bindings, title=f"{title}{self.where}", **links)

    def validation(self, task: TaskSettings) -> Stage:
        """Makes the choice of the best checkpoint of the fine-tuning."""
        run = self.row.run(self.seed, task)
        extra = {
            "BEST_METRIC": task.validation_metric or task.metric,
            "datasets.DatasetConfig.split": task.validation_split,
        }
        return self._eval(
            f"{run}/validation", task, f"{run}/train", self.scale.validation_examples,
            "choose a checkpoint of", extra, after=(f"{run}/train",),
        )  # fmt: skip

    def test(self, task: TaskSettings, decoding: Bindings) -> Stage:
        """Makes the measurement of the best checkpoint."""
        method, run = self.row.method, self.row.run(self.seed, task)
        chosen_by = f"{run}/validation"
        extra = {
            "datasets.DatasetConfig.split": task.test_split,
            **({"NUM_DECODES": task.num_decodes} if task.num_decodes > 1 else {}),
            **task.decoding.get(method.kind, NO_BINDINGS),
            **method.decoding,
            **decoding,
        }
        how = "test" if self.row.decoding == DEFAULT else f"test with {self.row.decoding}"
        return self._eval(
            self.row.test(self.seed, task), task, f"{run}/train/checkpoint_{BEST}",
            self.scale.test_examples, how, extra, after=(chosen_by,), chosen_by=chosen_by,
        )  # fmt: skip
