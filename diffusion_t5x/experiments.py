"""The paper's comparison on embedded data, stage by stage; killed and run again, it goes on.

python -m diffusion_t5x.experiments demo       # translation, decoder-only: minutes on a laptop
python -m diffusion_t5x.experiments embedded   # three task families, both architectures

Each stage is a command that could be typed, and is printed before it runs. The demo is a part of
the larger comparison, which goes on from it with `--root runs/demo`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from diffusion_t5x import eval as eval_command
from diffusion_t5x import report, sample, train
from diffusion_t5x.metric_logs import write_atomically

COMMANDS: Mapping[str, Callable[[Sequence[str]], Any]] = {
    "train": train.main,
    "eval": eval_command.main,
    "sample": sample.main,
}
MODEL_FILES = {
    "decoder_only": "models/tiny.gin",
    "encoder_decoder": "models/encoder_decoder/tiny.gin",
}
# Relative to the size of each parameter, as Adafactor has it; near the best of a few that were
# tried for either objective from fresh parameters.
LEARNING_RATES = {"autoregressive": 0.03, "diffusion": 0.06}
CHECKPOINTS = 2  # of each fine-tuning, the last one among them
# method -> (objective, which run it is fine-tuned from)
METHODS = {
    "autoregressive": ("autoregressive", "pretrain_autoregressive"),
    "diffusion": ("diffusion", "pretrain_diffusion"),
    "ar2diff_0": ("diffusion", "pretrain_autoregressive"),
    "ar2diff_N": ("diffusion", "adapt_N"),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of a comparison.

    Attributes:
      name: its registered name.
      inputs: maximum prefix tokens.
      targets: maximum target tokens, the length of the canvas.
      metric: which picks the best checkpoint, on the validation split.
      finetune_steps: objective -> steps.
    """

    name: str
    inputs: int
    targets: int
    metric: str
    finetune_steps: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A comparison of AR, diffusion and AR2Diff.

    Attributes:
      architectures: keys of `MODEL_FILES`.
      tasks: what is fine-tuned and measured.
      pretrain_length: tokens of prefix and of target in pretraining.
      pretrain_steps: of the AR and of the diffusion model.
      adapt_steps: N of AR2Diff_N.
      validation_examples: per checkpoint, to pick the best.
      test_examples: to measure the best.
      trajectory: text whose denoising is shown at the end.
    """

    architectures: tuple[str, ...]
    tasks: tuple[Task, ...]
    pretrain_length: int
    pretrain_steps: int
    adapt_steps: int
    validation_examples: int
    test_examples: int
    trajectory: str


TRANSLATION = Task(
    "embedded_translation_en_fr",
    24,
    24,
    "exact_match",
    {"autoregressive": 2200, "diffusion": 2800},
)
DEMO = Recipe(
    architectures=("decoder_only",),
    tasks=(TRANSLATION,),
    pretrain_length=24,
    pretrain_steps=500,
    adapt_steps=500,
    validation_examples=64,
    test_examples=256,
    trajectory="Wednesday, November 17, 2021",
)
RECIPES = {
    "demo": DEMO,
    "embedded": dataclasses.replace(
        DEMO,
        architectures=("decoder_only", "encoder_decoder"),
        tasks=(
            TRANSLATION,
            Task("embedded_qa", 112, 32, "f1", {"autoregressive": 800, "diffusion": 700}),
            Task("embedded_code", 80, 48, "pass_at_1", {"autoregressive": 600, "diffusion": 600}),
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command of an experiment.

    Attributes:
      name: unique, and the directory of what it makes.
      command: key of `COMMANDS`.
      files: gin files.
      bindings: gin bindings; called when the stage starts, since some depend on earlier results.
    """

    name: str
    command: str
    files: tuple[str, ...]
    bindings: Callable[[], Mapping[str, Any]]

    def argv(self) -> list[str]:
        """The command's arguments."""
        files = [f"--gin_file={file}" for file in self.files]
        return files + [f"--gin.{name}={value!r}" for name, value in self.bindings().items()]


def stages(recipe: Recipe, root: pathlib.Path) -> Iterator[Stage]:
    """All stages of a recipe, in order, under the directory `root`."""
    for architecture in recipe.architectures:
        yield from _pretraining(recipe, root, architecture)
        for task in recipe.tasks:
            for method in METHODS:
                yield from _finetuning(recipe, root, architecture, task, method)


def _files(architecture: str, objective: str, run: str) -> tuple[str, ...]:
    return (
        MODEL_FILES[architecture],
        f"objectives/{objective}.gin",
        f"runs/{run}.gin",
        "experiments/laptop.gin",
    )


def _schedule(objective: str, before: int, steps: int) -> dict[str, Any]:
    """One cosine over the steps of a stage that begins at step `before`."""
    scheduler = "optimizers.create_learning_rate_scheduler"
    return {
        f"{scheduler}.base_learning_rate": LEARNING_RATES[objective],
        f"{scheduler}.step_offset": before,
        f"{scheduler}.steps_per_cycle": steps,
    }


def _pretraining(recipe: Recipe, root: pathlib.Path, architecture: str) -> Iterator[Stage]:
    base = root / architecture
    common = {
        "MIXTURE_OR_TASK_NAME": "embedded_pretrain_prefix_lm",
        "TASK_FEATURE_LENGTHS": {
            "inputs": recipe.pretrain_length,
            "targets": recipe.pretrain_length,
        },
        "EVAL_PERIOD": recipe.pretrain_steps,
    }
    for objective in ("autoregressive", "diffusion"):
        name = f"{architecture}/pretrain_{objective}"
        bindings = {
            **common,
            "MODEL_DIR": str(root / name),
            "TRAIN_STEPS": recipe.pretrain_steps,
            **_schedule(objective, 0, recipe.pretrain_steps),
        }
        files = _files(architecture, objective, "pretrain")
        yield Stage(name, "train", files, lambda bindings=bindings: bindings)
    bindings = {
        **common,
        **_schedule("diffusion", recipe.pretrain_steps, recipe.adapt_steps),
        "MODEL_DIR": str(base / "adapt_N"),
        "INITIAL_CHECKPOINT_PATH": str(base / "pretrain_autoregressive"),
        "TRAIN_STEPS_RELATIVE": recipe.adapt_steps,
    }
    files = _files(architecture, "diffusion", "adapt")
    yield Stage(f"{architecture}/adapt_N", "train", files, lambda: bindings)


def _finetuning(
    recipe: Recipe, root: pathlib.Path, architecture: str, task: Task, method: str
) -> Iterator[Stage]:
    objective, start = METHODS[method]
    steps = task.finetune_steps[objective]
    before = recipe.pretrain_steps + (recipe.adapt_steps if start == "adapt_N" else 0)
    run = f"{architecture}/{task.name}/{method}"
    data = {
        "MIXTURE_OR_TASK_NAME": task.name,
        "TASK_FEATURE_LENGTHS": {"inputs": task.inputs, "targets": task.targets},
    }
    yield Stage(
        f"{run}/train",
        "train",
        _files(architecture, objective, "finetune"),
        lambda: {
            **data,
            "MODEL_DIR": str(root / run / "train"),
            "INITIAL_CHECKPOINT_PATH": str(root / architecture / start),
            "TRAIN_STEPS_RELATIVE": steps,
            "EVAL_PERIOD": steps,
            # The next stage decodes each checkpoint.
            "trainer.train.infer_eval_dataset_cfg": None,
            "CHECKPOINT_PERIOD": steps // CHECKPOINTS,
            **_schedule(objective, before, steps),
        },
    )
    evaluation = _files(architecture, objective, "eval")
    yield Stage(
        f"{run}/validation",
        "eval",
        evaluation,
        lambda: {
            **data,
            "CHECKPOINT_PATH": str(root / run / "train"),
            "EVAL_OUTPUT_DIR": str(root / run / "validation"),
            "EVALUATOR_NUM_EXAMPLES": recipe.validation_examples,
            "BEST_METRIC": task.metric,
            "datasets.DatasetConfig.split": "validation",
        },
    )
    yield Stage(
        f"{run}/test",
        "eval",
        evaluation,
        lambda: {
            **data,
            "CHECKPOINT_PATH": f"{root / run}/train/checkpoint_{_best_step(root / run)}",
            "EVAL_OUTPUT_DIR": str(root / run / "test"),
            "EVALUATOR_NUM_EXAMPLES": recipe.test_examples,
        },
    )


def _best_step(run: pathlib.Path) -> int:
    """The checkpoint that was best on the validation split."""
    return json.loads((run / "validation" / "results.json").read_text())["best"]["step"]


def run_stage(stage: Stage, root: pathlib.Path) -> None:
    """Runs a stage, or what is left of it, unless it has finished before.

    Raises:
      ValueError: if the stage's directory was made by another command, so that going on in it
        would mix the two.
    """
    argv = stage.argv()
    note = root / stage.name / "stage.json"
    known = json.loads(note.read_text()) if note.exists() else {"argv": argv, "finished": False}
    if known["argv"] != argv:
        raise ValueError(
            f"{note.parent} was made with other settings; remove {root}, or choose another --root."
        )
    if known["finished"]:
        return
    write_atomically(note, json.dumps(known))
    print(f"\n$ python -m diffusion_t5x.{stage.command} {shlex.join(argv)}", flush=True)
    COMMANDS[stage.command](argv)
    write_atomically(note, json.dumps({**known, "finished": True}))


def run(name: str, recipe: Recipe, root: pathlib.Path) -> dict[str, Any]:
    """Runs all stages, then writes and prints the comparison.

    Args:
      name: of the experiment.
      recipe: what to compare.
      root: directory of the experiment.

    Returns:
      What `results.json` holds.
    """
    plan = list(stages(recipe, root))
    for number, stage in enumerate(plan, 1):
        print(f"[{number}/{len(plan)}] {stage.name}", flush=True)
        run_stage(stage, root)
    results = report.collect(root, recipe.architectures, [t.name for t in recipe.tasks], METHODS)
    report.write(root, results)
    report.show(results, root)
    _show_trajectory(recipe, root)
    print(f"\nresults of {name}: {root / 'results.json'}, {root / 'results.md'}")
    return results


def _show_trajectory(recipe: Recipe, root: pathlib.Path) -> None:
    """Prints how one canvas was denoised."""
    architecture, task = recipe.architectures[0], recipe.tasks[0]
    base = root / architecture / task.name / "ar2diff_N"
    bindings = {
        "CHECKPOINT_PATH": f"{base}/train/checkpoint_{_best_step(base)}",
        "INPUTS": (recipe.trajectory,),
        "TASK_FEATURE_LENGTHS": {"inputs": task.inputs, "targets": task.targets},
        "SHOW_TRAJECTORY": True,
    }
    stage = Stage("", "sample", _files(architecture, "diffusion", "sample")[:3], lambda: bindings)
    print("\none canvas, step by step ('_' padding, '|' end of text, '·' a byte):")
    COMMANDS["sample"](stage.argv())


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=sorted(RECIPES))
    parser.add_argument("--root", help="directory for everything; by default runs/EXPERIMENT")
    args = parser.parse_args(argv)
    root = pathlib.Path(args.root or f"runs/{args.experiment}")
    run(args.experiment, RECIPES[args.experiment], root)


if __name__ == "__main__":
    main()
