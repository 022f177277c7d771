"""Records of an experiment, which gin files fill in: methods, tasks, a scale, and their rows.

An `Experiment` names what is compared (a table of the paper), a `Scale` the size of everything (the
paper's settings, or a laptop's).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from diffusion_t5x.names import check_known

T = TypeVar("T")
Bindings = Mapping[str, Any]
GIN_FILE = "gin_file"  # among a decoding's bindings, a gin file that they follow
DEFAULT = "default"  # the name of a decoding that the test stage's name leaves out


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train and decode: an objective, and the pretraining that it starts from.

    Attributes:
      name: The method's name, unique within a scale; its stages are named after it.
      objective: The gin file of its objective and decoder, found as `--gin_file` finds files, or
        several, of which later ones follow.
      start: The method whose pretrained model it starts from; None for a pretraining of its own.
      adapt_steps: Steps of pretraining that are continued from `start` with this objective (the N
        of AR2Diff_N, arXiv 2401.17181, section 4.4): a number, or a key of `Scale.adapt_steps`.
      adapt_stage: The name of the adaptation's stage; None for `adapt_{name}`.
      label: The method's name in tables; None for `name`.
      pretrain_steps: Steps of a pretraining of its own; None for the scale's.
      kind: The kind of decoding by which a scale tells settings apart, 'autoregressive' or
        'diffusion'.
      finetune_steps: Most fine-tuning steps on any task; None for the scale's.
      checkpoint_period: Fine-tuning steps between checkpoints; None for the scale's.
      learning_rate: Base learning rate of every stage of this method; None for the scale's.
      bindings: Gin bindings of every stage that reads `objective`.
      decoding: Gin bindings with which the test split is decoded, after the task's own.
    """

    name: str
    objective: str | tuple[str, ...]
    start: Method | None = None
    adapt_steps: int | str = 0
    adapt_stage: str | None = None
    label: str | None = None
    pretrain_steps: int | None = None
    kind: str = "diffusion"
    finetune_steps: int | None = None
    checkpoint_period: int | None = None
    learning_rate: float | None = None
    bindings: Bindings = dataclasses.field(default_factory=dict)
    decoding: Bindings = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.adapt_steps and self.start is None:
            raise ValueError(
                f"method {self.name!r}: adapt_steps = {self.adapt_steps!r}, but no start; expected "
                "the method whose pretrained model is adapted."
            )

    @property
    def files(self) -> tuple[str, ...]:
        """The gin files of its objective and decoder."""
        return (self.objective,) if isinstance(self.objective, str) else tuple(self.objective)

    @property
    def shown(self) -> str:
        """The method's name in tables."""
        return self.label or self.name

    def pretraining(self) -> list[tuple[str, Method]]:
        """Returns (stage, method trained in it) for each stage before fine-tuning, in order."""
        if self.start is None:
            return [(f"pretrain_{self.name}", self)]
        before = self.start.pretraining()
        if not self.adapt_steps:
            return before
        return [*before, (self.adapt_stage or f"adapt_{self.name}", self)]


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """A task at some scale.

    Attributes:
      name: Its registered name.
      inputs: Maximum number of prefix tokens.
      targets: Maximum number of target tokens, the length of the canvas.
      metric: The metric that is tabled, and that picks the best checkpoint.
      finetune_steps: Most fine-tuning steps, one number or one for each kind of decoding.
      checkpoint_period: Steps between checkpoints, one number or one for each kind of decoding.
      validation_metric: The metric that picks the best checkpoint; None for `metric`.
      validation_split: Name of the split that picks the best checkpoint.
      test_split: Name of the split that is tabled.
      num_decodes: Candidates per example of the test split, for pass@k.
      decoding: Kind of decoding -> gin bindings with which the test split is decoded.
    """

    name: str
    inputs: int
    targets: int
    metric: str
    finetune_steps: int | Mapping[str, int]
    checkpoint_period: int | Mapping[str, int]
    validation_metric: str | None = None
    validation_split: str = "validation"
    test_split: str = "test"
    num_decodes: int = 1
    decoding: Mapping[str, Bindings] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """Pretraining data: a mixture and its maximum tokens of prefix and of target."""

    mixture: str
    inputs: int
    targets: int


@dataclasses.dataclass(frozen=True)
class Scale:
    """The size of everything.

    Attributes:
      models: 'architecture/size' -> gin file.
      settings: Gin files that follow the run file of every stage.
      pretraining: Pretraining objective -> data.
      pretrain_steps: Pretraining steps of every method that has a pretraining of its own.
      pretrain_checkpoint_period: Steps between checkpoints of pretraining and adaptation.
      adapt_steps: Name of an N of AR2Diff_N -> steps.
      tasks: Role, such as 'translation' -> task.
      batch_size: Examples per step, as set in `settings` or the run files.
      model_bindings: Size -> gin bindings of every stage.
      learning_rates: Height of one cosine over each stage, one number or one for each kind of
        decoding; None for the schedules of the run files.
      validation_examples: Examples decoded per checkpoint to pick the best; None for all.
      test_examples: Examples decoded to measure the best checkpoint; None for all.
      seeds: Size -> number of seeds, 1 where it is not named.
      patience: Evaluations of the validation loss, one per checkpoint, without improvement after
        which fine-tuning stops; None for never.
    """

    models: Mapping[str, str]
    settings: tuple[str, ...]
    pretraining: Mapping[str, Pretraining]
    pretrain_steps: int
    pretrain_checkpoint_period: int
    adapt_steps: Mapping[str, int]
    tasks: Mapping[str, TaskSettings]
    batch_size: int
    model_bindings: Mapping[str, Bindings] = dataclasses.field(default_factory=dict)
    learning_rates: float | Mapping[str, float] | None = None
    validation_examples: int | None = None
    test_examples: int | None = None
    seeds: Mapping[str, int] = dataclasses.field(default_factory=dict)
    patience: int | None = None


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A comparison: every combination of the following is a row of its table, every task a column.

    Attributes:
      title: The table's caption.
      tasks: Roles, keys of `Scale.tasks`.
      methods: The methods compared.
      architectures: 'decoder_only', 'encoder_decoder'.
      sizes: With an architecture, keys of `Scale.models`.
      pretraining: Keys of `Scale.pretraining`.
      decoding: Name -> gin bindings with which the test split is decoded; `GIN_FILE` among them
        names a gin file that they follow, such as one of decoders/.
      decodings_of: Method's name -> the names of its decodings; a method that is not named has all.
      published: Row, named by what varies among the rows -> role -> the paper's number.
      scale: The scale at which it runs by default, a name or a file.
      trajectory: A text whose denoising is shown at the end; None to show none.
    """

    title: str
    tasks: tuple[str, ...]
    methods: tuple[Method, ...]
    architectures: tuple[str, ...] = ("decoder_only",)
    sizes: tuple[str, ...] = ("base",)
    pretraining: tuple[str, ...] = ("prefix_lm",)
    decoding: Mapping[str, Bindings] = dataclasses.field(default_factory=lambda: {DEFAULT: {}})
    decodings_of: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    published: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    scale: str = "paper"
    trajectory: str | None = None

    def __post_init__(self) -> None:
        for method in self.methods:
            if not isinstance(method, Method):
                raise ValueError(
                    f"Experiment.methods has {method!r}; expected a method's record, such as "
                    "@diffusion/experiment_graph.Method() after include 'experiments/common.gin'."
                )
        shown = [method.shown for method in self.methods]
        if repeated := sorted({name for name in shown if shown.count(name) > 1}):
            raise ValueError(f"Experiment.methods has several methods named {repeated[0]!r}.")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table, of one seed; directories are relative to that of the scale."""

    architecture: str
    size: str
    pretraining: str
    method: Method
    decoding: str
    seed: int = 0

    @property
    def base(self) -> str:
        """The directory that its stages share with those of other methods."""
        return f"{self.architecture}/{self.size}/{self.pretraining}/seed_{self.seed}"

    def run(self, task: TaskSettings) -> str:
        """Returns the directory of its fine-tuning."""
        return f"{self.base}/{task.name}/{self.method.name}"

    def test(self, task: TaskSettings) -> str:
        """Returns the name of the stage that measures it."""
        suffix = "" if self.decoding == DEFAULT else f"_{self.decoding}"
        return f"{self.run(task)}/test{suffix}"


def load(experiment: Experiment, scale: Scale | None = None) -> tuple[Experiment, Scale | None]:
    """Returns the experiment and the scale that gin files bind here."""
    return experiment, scale


def lookup(known: Mapping[str, T], name: str, setting: str) -> T:
    """Returns `known[name]`.

    Raises:
      ValueError: naming the setting, its value and the nearest name that is known.
    """
    check_known(name, known, setting)
    return known[name]


def rows(experiment: Experiment) -> Iterator[tuple[str, Row]]:
    """Yields (name, row) for each row of the table; the name tells the row from the others."""
    axes: list[tuple[Any, ...]] = [
        experiment.architectures,
        experiment.sizes,
        experiment.pretraining,
        experiment.methods,
        tuple(experiment.decoding),
    ]
    for values in itertools.product(*axes):
        if values[4] not in experiment.decodings_of.get(values[3].name, experiment.decoding):
            continue
        names = [value.shown if isinstance(value, Method) else value for value in values]
        varying = [name for name, axis in zip(names, axes, strict=True) if len(axis) > 1]
        yield "/".join(varying or names[3:4]), Row(*values)
