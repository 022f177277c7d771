"""The paper's tables as graphs of commands; killed and run again, each goes on where it was.

python -m diffusion_t5x.experiments --list
python -m diffusion_t5x.experiments --plan table2
python -m diffusion_t5x.experiments --run table2 --scale embedded
python -m diffusion_t5x.experiments --table table2 --scale embedded

An experiment is a file of gin/experiments, a scale one of gin/scales. Each stage is a command that
could be typed; the plan prints them all. `--gin.NAME=VALUE` is handed on to every stage. Stages lie
in ROOT/SCALE and are shared by experiments, results in ROOT/EXPERIMENT.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusion_t5x import eval as eval_command
from diffusion_t5x import sample, train
from diffusion_t5x.commands.flags import GIN_FLAG
from diffusion_t5x.evaluation.results import print_table
from diffusion_t5x.experiments import experiment_graph, report
from diffusion_t5x.experiments.experiment_graph import Experiment, Scale, Stage
from diffusion_t5x.runtime.files import write_atomically

COMMANDS: Mapping[str, Callable[[Sequence[str]], Any]] = {
    "train": train.main,
    "eval": eval_command.main,
    "sample": sample.main,
}


def names(kind: str) -> list[str]:
    """Names of the 'experiments' or 'scales' that there are gin files for."""
    from diffusion_t5x.gin_utils import config_dir

    return sorted(path.stem for path in (config_dir() / kind).glob("*.gin"))


def load(name: str, scale_name: str | None) -> tuple[Experiment, Scale, str]:
    """An experiment, a scale, and the scale's name; by default the experiment's own.

    Raises:
      ValueError: if there is no such experiment or scale.
    """
    import gin
    from diffusion_t5x import gin_utils

    experiment_graph.lookup(dict.fromkeys(names("experiments")), name, "experiment")

    def configured(*files: str) -> Any:
        gin.clear_config()
        gin_utils.parse_config(files, [])
        return gin.get_configurable(experiment_graph.configured)()

    file = f"experiments/{name}.gin"
    experiment, _ = configured(file)
    scale_name = scale_name or experiment.scale
    experiment_graph.lookup(dict.fromkeys(names("scales")), scale_name, "scale")
    _, scale = configured(file, f"scales/{scale_name}.gin")
    return experiment, scale, scale_name


class Run:
    """An experiment at a scale, under a directory."""

    def __init__(self, name: str, scale_name: str | None, root: str, gin_flags: Sequence[str] = ()):
        """Reads the gin files.

        Args:
          name: of the experiment.
          scale_name: None for the experiment's own.
          root: directory of all experiments.
          gin_flags: `--gin.NAME=VALUE` each, for every stage.

        Raises:
          ValueError: if there is no such experiment or scale, or the scale lacks something.
        """
        self.name = name
        self.experiment, self.scale, scale_name = load(name, scale_name)
        self.stages_dir = pathlib.Path(root) / scale_name
        own = scale_name == self.experiment.scale
        self.results_dir = pathlib.Path(root) / (name if own else f"{name}_{scale_name}")
        self.stages = [
            dataclasses.replace(stage, flags=tuple(gin_flags))
            for stage in experiment_graph.stages(self.experiment, self.scale, self.stages_dir)
        ]

    def plan(self) -> str:
        """Every stage: its dependencies, steps, tokens and command line."""
        lines = []
        for number, stage in enumerate(self.stages, 1):
            lines.append(f"# [{number}/{len(self.stages)}] {stage.name}")
            if stage.after:
                lines.append(f"# after: {', '.join(stage.after)}")
            if stage.steps:
                lines.append(f"# at most {stage.steps:,} steps, {stage.tokens:,} tokens")
            lines.append(_command_line(stage, self.stages_dir))
        steps = sum(stage.steps for stage in self.stages)
        tokens = sum(stage.tokens for stage in self.stages)
        lines.append(f"# {len(self.stages)} stages, {steps:,} training steps, {tokens:,} tokens")
        return "\n".join(lines)

    def run(self) -> dict[str, Any]:
        """Runs what is not finished, then writes and prints the results, and returns them."""
        for number, stage in enumerate(self.stages, 1):
            print(f"[{number}/{len(self.stages)}] {stage.name}", flush=True)
            run_stage(stage, self.stages_dir)
        results = report.collect(self.experiment, self.scale, self.stages_dir)
        report.write(self.results_dir, self.experiment, self.scale, results)
        self.show(results)
        self._show_trajectory(self.experiment, self.scale)
        where = ", ".join(str(self.results_dir / f"results.{kind}") for kind in ("json", "md"))
        print(f"\nresults of {self.name}: {where}")
        return results

    def show(self, results: Mapping[str, Any]) -> None:
        """Prints the results, and samples of them."""
        report.show(self.experiment, self.scale, results, self.stages_dir)

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Header and body of what is finished beside the paper's numbers."""
        results = report.collect(self.experiment, self.scale, self.stages_dir)
        return report.comparison(self.experiment, self.scale, results)

    def _show_trajectory(self, experiment: Experiment, scale: Scale) -> None:
        """Prints how one canvas was denoised by the model of the last row, if a text is given."""
        if experiment.trajectory is None:
            return
        [*_, (_, row)] = experiment_graph.rows(experiment)
        task = scale.tasks[experiment.tasks[0]]
        test = next(stage for stage in self.stages if stage.name == row.test(0, task))
        files = (*test.files[:2], "runs/sample.gin")
        kept = ("TASK_FEATURE_LENGTHS", "CHECKPOINT_PATH", "RANDOM_SEED")
        bindings = {
            **{name: test.bindings[name] for name in kept},
            **scale.model_bindings.get(row.size, {}),
            "INPUTS": (experiment.trajectory,),
            "SHOW_TRAJECTORY": True,
        }
        stage = Stage("", "sample", files, bindings, chosen_by=test.chosen_by, flags=test.flags)
        print("\none canvas, step by step ('_' padding, '|' end of text, '·' a byte):")
        COMMANDS["sample"](stage.argv(self.stages_dir))


def _command_line(stage: Stage, root: pathlib.Path) -> str:
    return f"python -m diffusion_t5x.{stage.command} {shlex.join(stage.argv(root))}"


def run_stage(stage: Stage, root: pathlib.Path) -> None:
    """Runs a stage, or what is left of it, unless it has finished before.

    Raises:
      ValueError: if the stage's directory was made by another command, so that going on in it
        would mix the two.
    """
    argv = stage.argv(root)
    note = root / stage.name / "stage.json"
    known = json.loads(note.read_text()) if note.exists() else {"argv": argv, "finished": False}
    if known["argv"] != argv:
        raise ValueError(
            f"{note.parent} was made with other settings; remove it, or choose another --root."
        )
    if known["finished"]:
        return
    write_atomically(note, json.dumps(known))
    print(f"\n$ {_command_line(stage, root)}", flush=True)
    COMMANDS[stage.command](argv)
    write_atomically(note, json.dumps({**known, "finished": True}))


def _print_list() -> None:
    body = []
    for name in names("experiments"):
        experiment, _, scale = load(name, None)
        body.append([name, experiment.title, scale])
    print_table(["experiment", "what", "scale"], body)


def main(argv: Sequence[str] | None = None) -> None:
    """Does what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="experiments and what they compare")
    action.add_argument("--plan", metavar="EXPERIMENT", help="print every stage, run nothing")
    action.add_argument("--run", metavar="EXPERIMENT", help="run what is not finished")
    action.add_argument("--table", metavar="EXPERIMENT", help="ours beside the paper's numbers")
    parser.add_argument("--scale", help="by default the experiment's own")
    parser.add_argument("--root", default="runs", help="directory for everything")
    args, others = parser.parse_known_args(argv)
    strange = [flag for flag in others if not flag.startswith(GIN_FLAG)]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if args.list:
        _print_list()
        return
    run = Run(args.plan or args.run or args.table, args.scale, args.root, others)
    if args.plan:
        print(run.plan())
    elif args.run:
        run.run()
    else:
        print_table(*run.table(), title=run.experiment.title)


if __name__ == "__main__":
    main()
