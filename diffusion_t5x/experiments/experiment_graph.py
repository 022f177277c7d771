"""An experiment as a graph of commands: what is compared, how big, and in which order.

An `Experiment` says what is compared (a table of the paper), a `Scale` how big everything is (the
paper's settings, or a laptop's). Stages are named after what they make, not after the experiment,
so experiments of one scale share the stages that they have in common.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

NONE: Mapping[str, Any] = {}
BEST = "{best}"  # stands in a binding for the step that was best on the validation split


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """A task at some scale.

    Attributes:
      name: its registered name.
      inputs: maximum prefix tokens.
      targets: maximum target tokens, the length of the canvas.
      metric: which picks the best checkpoint on the validation split, and is tabled.
      finetune_steps: objective -> most steps.
      checkpoint_period: objective -> steps between checkpoints.
      validation_metric: which picks the best checkpoint where it is not `metric`.
      validation_split: its name.
      test_split: name of the split that is tabled.
      num_decodes: candidates per example of the test split, for pass@k.
      decoding: objective -> gin bindings with which the test split is decoded.
    """

    name: str
    inputs: int
    targets: int
    metric: str
    finetune_steps: Mapping[str, int]
    checkpoint_period: Mapping[str, int]
    validation_metric: str | None = None
    validation_split: str = "validation"
    test_split: str = "test"
    num_decodes: int = 1
    decoding: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """Pretraining data: a mixture and its maximum tokens of prefix and of target."""

    mixture: str
    inputs: int
    targets: int


@dataclasses.dataclass(frozen=True)
class Scale:
    """How big everything is.

    Attributes:
      models: 'architecture/size' -> gin file.
      settings: gin files that follow the run file of every stage.
      pretraining: pretraining objective -> data.
      pretrain_steps: of AR and of diffusion models.
      pretrain_checkpoint_period: steps between checkpoints of pretraining and adaptation.
      adapt_steps: the N of `ar2diff_N` as methods are called -> steps.
      tasks: role, such as 'translation' -> task.
      batch_size: examples per step, as `settings` or the run files have it.
      model_bindings: size -> gin bindings of every stage.
      learning_rates: objective -> height of one cosine over each stage; None leaves the schedules
        of the run files.
      validation_examples: decoded per checkpoint to pick the best; None for all.
      test_examples: decoded to measure the best; None for all.
      seeds: size -> number of seeds, 1 where it is not named.
      patience: evaluations of the loss on the validation split, one per checkpoint, without
        improvement after which fine-tuning stops; None for never.
    """

    models: Mapping[str, str]
    settings: tuple[str, ...]
    pretraining: Mapping[str, Pretraining]
    pretrain_steps: int
    pretrain_checkpoint_period: int
    adapt_steps: Mapping[str, int]
    tasks: Mapping[str, TaskSettings]
    batch_size: int
    model_bindings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    learning_rates: Mapping[str, float] | None = None
    validation_examples: int | None = None
    test_examples: int | None = None
    seeds: Mapping[str, int] = dataclasses.field(default_factory=dict)
    patience: int | None = None


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is compared: every combination of the following is a row, and every task a column.

    Attributes:
      title: what the table shows.
      tasks: roles, keys of `Scale.tasks`.
      methods: 'autoregressive', 'diffusion', or 'ar2diff_' and a key of `Scale.adapt_steps`, or 0.
      architectures: 'decoder_only', 'encoder_decoder'.
      sizes: with an architecture, keys of `Scale.models`.
      pretraining: keys of `Scale.pretraining`.
      decoding: name -> gin bindings with which the test split is decoded.
      published: row, named by what varies among the rows -> role -> the paper's number.
      scale: the scale at which it is run unless another is asked for.
      trajectory: text whose denoising is shown at the end.
    """

    title: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    architectures: tuple[str, ...] = ("decoder_only",)
    sizes: tuple[str, ...] = ("base",)
    pretraining: tuple[str, ...] = ("prefix_lm",)
    decoding: Mapping[str, Mapping[str, Any]] = dataclasses.field(
        default_factory=lambda: {"default": {}}
    )
    published: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    scale: str = "paper"
    trajectory: str | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table."""

    architecture: str
    size: str
    pretraining: str
    method: str
    decoding: str

    def run(self, seed: int, task: TaskSettings) -> str:
        """The directory of its fine-tuning, under that of the scale."""
        return f"{_base(self, seed)}/{task.name}/{self.method}"

    def test(self, seed: int, task: TaskSettings) -> str:
        """The name of the stage that measured it."""
        suffix = "" if self.decoding == "default" else f"_{self.decoding}"
        return f"{self.run(seed, task)}/test{suffix}"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command of an experiment.

    Attributes:
      name: unique within a scale, and the directory of what it makes.
      command: 'train' or 'eval'.
      files: gin files.
      bindings: gin bindings; `BEST` in one stands for the step chosen by `chosen_by`.
      after: names of the stages that must have finished.
      steps: most training steps; 0 where nothing is trained.
      tokens: positions that these steps train on, prefixes and padding included.
      chosen_by: name of the stage whose results say which checkpoint is best.
      flags: further arguments, which override the bindings.
    """

    name: str
    command: str
    files: tuple[str, ...]
    bindings: Mapping[str, Any]
    after: tuple[str, ...] = ()
    steps: int = 0
    tokens: int = 0
    chosen_by: str | None = None
    flags: tuple[str, ...] = ()

    def argv(self, root: pathlib.Path) -> list[str]:
        """The command's arguments; `BEST` stays where the choice is not made yet."""
        best = best_step(root / self.chosen_by) if self.chosen_by else None
        values = dict(self.bindings)
        if best is not None:
            values["CHECKPOINT_PATH"] = values["CHECKPOINT_PATH"].replace(BEST, str(best))
        files = [f"--gin_file={file}" for file in self.files]
        return [*files, *(f"--gin.{k}={v!r}" for k, v in values.items()), *self.flags]


def configured(experiment: Any, scale: Any = None) -> tuple[Any, Any]:
    """The experiment and the scale that gin files bind here."""
    return experiment, scale


def best_step(validation: pathlib.Path) -> int | None:
    """The checkpoint that a finished validation chose; None while there is none."""
    file = validation / "results.json"
    return json.loads(file.read_text())["best"]["step"] if file.exists() else None


def lookup(known: Mapping[str, Any], name: str, what: str) -> Any:
    """`known[name]`.

    Raises:
      ValueError: naming `what` is unknown and the nearest name that is known.
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{what} {name!r} is unknown; {hint}Known: {', '.join(known)}.")
    return known[name]


def rows(experiment: Experiment) -> Iterator[tuple[str, Row]]:
    """(name, row) of a table; the name tells the row from the others."""
    axes = (
        experiment.architectures,
        experiment.sizes,
        experiment.pretraining,
        experiment.methods,
        tuple(experiment.decoding),
    )
    for values in itertools.product(*axes):
        varying = [v for v, axis in zip(values, axes, strict=True) if len(axis) > 1]
        yield "/".join(varying or values[3:4]), Row(*values)


def stages(experiment: Experiment, scale: Scale, root: pathlib.Path) -> list[Stage]:
    """The stages of an experiment in an order in which they can run, each once.

    Args:
      experiment: what to compare.
      scale: how big.
      root: directory of the scale.

    Raises:
      ValueError: if the scale lacks something that the experiment names.
    """
    found: dict[str, Stage] = {}
    every = [row for _, row in rows(experiment)]
    most = max(scale.seeds.get(row.size, 1) for row in every)
    for seed, row in itertools.product(range(most), every):
        if seed >= scale.seeds.get(row.size, 1):
            continue
        builder = _Builder(scale, root, row, seed)
        made = list(builder.pretraining())
        for role in experiment.tasks:
            task = lookup(scale.tasks, role, "task")
            made += builder.finetuning(task)
            made.append(builder.test(task, experiment.decoding[row.decoding]))
        found.update((stage.name, stage) for stage in made if stage.name not in found)
    return list(found.values())


def start_of(method: str) -> tuple[str, str]:
    """A method's fine-tuning objective, and the stage it starts from, under a base directory.

    Raises:
      ValueError: if there is no such method.
    """
    if method in ("autoregressive", "diffusion"):
        return method, f"pretrain_{method}"
    kind, _, n = method.partition("_")
    if kind != "ar2diff" or not n:
        lookup({"autoregressive": 0, "diffusion": 0, "ar2diff_0": 0}, method, "method")
    return "diffusion", "pretrain_autoregressive" if n == "0" else f"adapt_{n}"


def chain(row: Row, seed: int) -> list[str]:
    """Names of the stages, in order, that led to the model that a row is fine-tuned from."""
    start = start_of(row.method)[1]
    adapted = ["pretrain_autoregressive"] * start.startswith("adapt_")
    return [f"{_base(row, seed)}/{name}" for name in (*adapted, start)]


def _base(row: Row, seed: int) -> str:
    return f"{row.architecture}/{row.size}/{row.pretraining}/seed_{seed}"


@dataclasses.dataclass(frozen=True)
class _Builder:
    """Makes the stages of one row and seed."""

    scale: Scale
    root: pathlib.Path
    row: Row
    seed: int

    def _path(self, name: str) -> str:
        return str(self.root / name)

    def _files(self, objective: str, run: str) -> tuple[str, ...]:
        model = lookup(self.scale.models, f"{self.row.architecture}/{self.row.size}", "model")
        return (model, f"objectives/{objective}.gin", f"runs/{run}.gin", *self.scale.settings)

    def _common(self, data: Pretraining | TaskSettings) -> dict[str, Any]:
        name = data.mixture if isinstance(data, Pretraining) else data.name
        return {
            **self.scale.model_bindings.get(self.row.size, NONE),
            "MIXTURE_OR_TASK_NAME": name,
            "TASK_FEATURE_LENGTHS": {"inputs": data.inputs, "targets": data.targets},
            "RANDOM_SEED": self.seed,
        }

    def _train(
        self,
        name: str,
        objective: str,
        run: str,
        data: Pretraining | TaskSettings,
        *,
        start: str | None,
        before: int,
        steps: int,
        period: int,
        extra: Mapping[str, Any] = NONE,
    ) -> Stage:
        """A training of `steps` steps that begins at step `before`."""
        bindings = {
            **self._common(data),
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
        if self.scale.learning_rates is not None:
            scheduler = "optimizers.create_learning_rate_scheduler"
            bindings[f"{scheduler}.base_learning_rate"] = self.scale.learning_rates[objective]
            bindings[f"{scheduler}.step_offset"] = before
            bindings[f"{scheduler}.steps_per_cycle"] = steps
        return Stage(
            name,
            "train",
            self._files(objective, run),
            bindings,
            after=(start,) if start else (),
            steps=steps,
            tokens=steps * self.scale.batch_size * (data.inputs + data.targets),
        )

    def pretraining(self) -> Iterator[Stage]:
        """Pretraining and adaptation."""
        scale, base = self.scale, _base(self.row, self.seed)
        data = lookup(scale.pretraining, self.row.pretraining, "pretraining")
        period = scale.pretrain_checkpoint_period
        for name in chain(self.row, self.seed):
            stage = name.removeprefix(f"{base}/")
            kind, _, what = stage.partition("_")
            if kind == "pretrain":
                yield self._train(
                    name, what, "pretrain", data,
                    start=None, before=0, steps=scale.pretrain_steps, period=period,
                )  # fmt: skip
            else:
                steps = lookup(scale.adapt_steps, what, "N of AR2Diff_N")
                yield self._train(
                    name, "diffusion", "adapt", data,
                    start=f"{base}/pretrain_autoregressive", before=scale.pretrain_steps,
                    steps=steps, period=min(period, steps),
                )  # fmt: skip

    def finetuning(self, task: TaskSettings) -> Iterator[Stage]:
        """Fine-tuning, and the validation of its checkpoints."""
        objective, start = start_of(self.row.method)
        run, scale = self.row.run(self.seed, task), self.scale
        before = scale.pretrain_steps
        if start.startswith("adapt_"):
            before += scale.adapt_steps[start.removeprefix("adapt_")]
        extra: dict[str, Any] = {
            # The next stage decodes each checkpoint.
            "trainer.train.infer_eval_dataset_cfg": None,
        }
        if scale.patience is not None:
            extra["PATIENCE"] = scale.patience
        train = self._train(
            f"{run}/train", objective, "finetune", task,
            start=f"{_base(self.row, self.seed)}/{start}", before=before,
            steps=task.finetune_steps[objective], period=task.checkpoint_period[objective],
            extra=extra,
        )  # fmt: skip
        yield train
        yield Stage(
            f"{run}/validation",
            "eval",
            self._files(objective, "eval"),
            {
                **self._common(task),
                "CHECKPOINT_PATH": self._path(train.name),
                "EVAL_OUTPUT_DIR": self._path(f"{run}/validation"),
                "EVALUATOR_NUM_EXAMPLES": scale.validation_examples,
                "BEST_METRIC": task.validation_metric or task.metric,
                "datasets.DatasetConfig.split": task.validation_split,
            },
            after=(train.name,),
        )

    def test(self, task: TaskSettings, decoding: Mapping[str, Any]) -> Stage:
        """Measuring the best checkpoint."""
        objective, _ = start_of(self.row.method)
        run, name = self.row.run(self.seed, task), self.row.test(self.seed, task)
        extra = {"NUM_DECODES": task.num_decodes} if task.num_decodes > 1 else {}
        return Stage(
            name,
            "eval",
            self._files(objective, "eval"),
            {
                **self._common(task),
                "CHECKPOINT_PATH": self._path(f"{run}/train/checkpoint_{BEST}"),
                "EVAL_OUTPUT_DIR": self._path(name),
                "EVALUATOR_NUM_EXAMPLES": self.scale.test_examples,
                "datasets.DatasetConfig.split": task.test_split,
                **extra,
                **task.decoding.get(objective, NONE),
                **decoding,
            },
            after=(f"{run}/validation",),
            chosen_by=f"{run}/validation",
        )
