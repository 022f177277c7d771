"""Runs the paper's tables, and comparisons of your own, as graphs of commands; resumes killed runs.

python -m diffusion_t5x.experiments --list
python -m diffusion_t5x.experiments --plan table2
python -m diffusion_t5x.experiments --run table2 --scale embedded
python -m diffusion_t5x.experiments --run path/to/mine.gin --scale laptop
python -m diffusion_t5x.experiments --table table2 --scale embedded
python -m diffusion_t5x.experiments --run demo --sweep NUM_STEPS=2,5,10 --sweep NUM_SAMPLES=1,8

An experiment is a file of gin/experiments or a path, a scale a file of gin/scales or a path. Each
stage is a command that could be typed; the plan prints them all. `--gin.NAME=VALUE` is handed on to
every stage. `--sweep` decodes each fine-tuned model with every combination of the values instead,
and draws quality against cost. Stages lie in ROOT/SCALE and are shared by experiments, results in
ROOT/EXPERIMENT, those of a sweep in ROOT/EXPERIMENT_sweep.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, cast

from etils import epath

import gin
from diffusion_t5x import eval as eval_command
from diffusion_t5x import gin_utils, paths, sample, train
from diffusion_t5x.commands.flags import GIN_FLAG, comma_separated
from diffusion_t5x.experiments import experiment_graph, report, stages, sweeps
from diffusion_t5x.experiments.experiment_graph import Experiment, Scale
from diffusion_t5x.experiments.stages import Stage
from diffusion_t5x.names import check_known
from diffusion_t5x.runtime import resumable, terminal
from diffusion_t5x.runtime.files import write_atomically

COMMANDS: Mapping[str, Callable[[Sequence[str]], Any]] = {
    "train": train.main,
    "eval": eval_command.main,
    "sample": sample.main,
}


def names(kind: str) -> list[str]:
    """Returns the names of the 'experiments' or 'scales' that gin files of this project define."""
    stems = {path.stem for path in (gin_utils.config_dir() / kind).glob("*.gin")} - {"common"}
    return sorted(stem for stem in stems if not stem.endswith("_settings"))


def _file(kind: str, name: str, search_paths: Sequence[str]) -> str:
    """Returns the gin file of an experiment or a scale: `name` itself if it is a path."""
    known, what = names(kind), kind.removesuffix("s")
    if "/" not in name and not name.endswith(".gin"):
        check_known(name, known, what)
        return f"{kind}/{name}.gin"
    found = pathlib.Path(gin_utils.find(name, search_paths))
    if found.stem in known and found.parent.resolve() != gin_utils.config_dir() / kind:
        raise ValueError(
            f"{name} is named like the {what} {found.stem!r} of this project, and directories are "
            "named after the files; give it another name."
        )
    return name


def load(
    name: str, scale: str | None, search_paths: Sequence[str] = ()
) -> tuple[Experiment, Scale, str]:
    """Reads an experiment and a scale, each a name or a gin file; None is the experiment's scale.

    Returns:
      The experiment, the scale, and the scale's name.

    Raises:
      ValueError: if there is no such experiment or scale, or a file is named like another one's.
      FileNotFoundError: if a gin file is not found.
    """

    def parse(*files: str) -> tuple[Experiment, Scale]:
        gin.clear_config()
        gin_utils.parse_config(files, [], search_paths)
        return gin.get_configurable(experiment_graph.load)()

    file = _file("experiments", name, search_paths)
    scale = scale or parse(file)[0].scale
    return *parse(file, _file("scales", scale, search_paths)), pathlib.Path(scale).stem


class Run:
    """An experiment at a scale, under a directory.

    Attributes:
      experiment: What is compared.
      scale: The size of everything.
      stages: The commands, in the order in which they run.
      stages_dir: Directory of the stages.
      results_dir: Directory of the results.
    """

    def __init__(
        self,
        name: str,
        scale: str | None,
        root: str | pathlib.Path,
        gin_flags: Sequence[str] = (),
        search_paths: Sequence[str] = (),
        sweep: Sequence[str] = (),
    ):
        """Reads the gin files, as `load` does.

        Args:
          root: Directory of all experiments.
          gin_flags: `--gin.NAME=VALUE` each, for every stage.
          search_paths: Further directories of gin files, for every stage.
          sweep: `NAME=VALUE,VALUE` each: settings with which models are decoded.

        Raises:
          ValueError: if there is no such experiment or scale, the scale lacks something, or a sweep
            is refused (`sweeps.sweep`).
        """
        axes = sweeps.parse(sweep)
        self.name = pathlib.Path(name).stem
        self.experiment, self.scale, scale_name = load(name, scale, search_paths)
        directory = epath.Path(paths.expand(os.fspath(root), "--root"))
        self.stages_dir = directory / scale_name
        own = scale_name == pathlib.Path(self.experiment.scale).stem
        results = self.name if own else f"{self.name}_{scale_name}"
        self.results_dir = directory / (f"{results}_sweep" if axes else results)
        searched = [f"--gin_search_paths={','.join(search_paths)}"] if search_paths else []
        self._flags = [*searched, *gin_flags]
        self.stages = stages.make(self.experiment, self.scale, self.stages_dir)
        if axes:
            task = self.scale.tasks[self.experiment.tasks[0]]
            by_name = {stage.name: stage for stage in self.stages}
            tests = {
                row.method.name: by_name[row.test(task)]
                for _, row in experiment_graph.rows(self.experiment)
            }
            bindings = [flag.removeprefix(GIN_FLAG) for flag in gin_flags]
            self.experiment = sweeps.sweep(self.experiment, axes, tests, bindings, search_paths)
            self.stages = stages.make(self.experiment, self.scale, self.stages_dir)

    def argv(self, stage: Stage) -> list[str]:
        """Returns a stage's arguments, with the best checkpoint if it is chosen by now."""
        best = report.best_step(self.stages_dir / stage.after) if stage.after else None
        return [*stage.argv(best), *self._flags]

    def _command_line(self, stage: Stage) -> str:
        return f"python -m diffusion_t5x.{stage.command} {shlex.join(self.argv(stage))}"

    def plan(self) -> str:
        """Returns every stage's dependencies, steps, tokens and command line."""
        lines = []
        for number, stage in enumerate(self.stages, 1):
            lines.append(f"# [{number}/{len(self.stages)}] {stage.name}")
            if stage.after:
                lines.append(f"# after: {stage.after}")
            if stage.steps:
                lines.append(f"# at most {stage.steps:,} steps, {stage.tokens:,} tokens")
            lines.append(self._command_line(stage))
        steps = sum(stage.steps for stage in self.stages)
        tokens = sum(stage.tokens for stage in self.stages)
        lines.append(f"# {len(self.stages)} stages, {steps:,} training steps, {tokens:,} tokens")
        return "\n".join(lines)

    def run(self, show_commands: bool = False) -> dict[str, Any]:
        """Runs the stages that are not finished, then writes, prints and returns the results.

        Args:
          show_commands: Print each stage's command line and output, instead of one line per stage.
        """
        paths.writable(self.results_dir, "--root")
        commands = self.results_dir / "commands.sh"
        write_atomically(commands, self.plan() + "\n")
        try:
            for number, stage in enumerate(self.stages, 1):
                title = f"[{number}/{len(self.stages)}] {stage.title}"
                self._run_stage(stage, title, show_commands)
        finally:  # by now it is known which checkpoints the tests read
            write_atomically(commands, self.plan() + "\n")
        found = report.Report(self.experiment, self.scale, self.stages_dir)
        found.write(self.results_dir)
        found.show()
        self._show_trajectory()
        where = ", ".join(str(self.results_dir / f"results.{kind}") for kind in ("json", "md"))
        print(f"\nresults of {self.name}: {where}; the commands: {commands}")
        return found.results

    def _run_stage(self, stage: Stage, title: str, show_command: bool) -> None:
        """Runs a stage, or what is left of it, and prints its line.

        Raises:
          ValueError: if the stage's directory is of another command, so that resuming in it would
            mix the two.
        """
        directory, argv = self.stages_dir / stage.name, self.argv(stage)
        note = directory / "stage.json"
        known = resumable.read_object(note) or {"argv": argv, "finished": False}
        if known["argv"] != argv:
            raise ValueError(
                f"{directory} is of a stage with other settings; remove it, or choose another "
                "--root."
            )
        if known["finished"]:
            print(f"{title}: {report.outcome(stage, directory)}, finished before", flush=True)
            return
        resumable.save_object(note, known)
        started = time.monotonic()
        if show_command:
            print(f"{title}\n$ {self._command_line(stage)}", flush=True)
            COMMANDS[stage.command](argv)
        else:
            with terminal.titled(title), _output_to(directory / "output.txt"):
                COMMANDS[stage.command](argv)
        resumable.save_object(note, {**known, "finished": True})
        seconds = time.monotonic() - started
        print(f"{title}: {report.outcome(stage, directory)}, {seconds:.0f} s", flush=True)

    def table(self) -> report.Table:
        """Returns the results of finished stages beside the paper's numbers."""
        return report.Report(self.experiment, self.scale, self.stages_dir).comparison()

    def _show_trajectory(self) -> None:
        """Prints how the last row's model that has a canvas denoises one, if a text is given."""
        denoising = [
            row
            for _, row in experiment_graph.rows(self.experiment)
            if row.method.kind != "autoregressive"
        ]
        if self.experiment.trajectory is None or not denoising:
            return
        row, task = denoising[-1], self.scale.tasks[self.experiment.tasks[0]]
        test = next(stage for stage in self.stages if stage.name == row.test(task))
        kept = ("TASK_FEATURE_LENGTHS", "CHECKPOINT_PATH", "RANDOM_SEED")
        bindings = {
            **{name: test.bindings[name] for name in kept},
            **self.scale.model_bindings.get(row.size, {}),
            **row.method.bindings,
            "INPUTS": (self.experiment.trajectory,),
            "SHOW_TRAJECTORY": True,
        }
        files = (*test.files[:2], "runs/sample.gin")
        print("\none canvas, step by step ('_' padding, '|' end of text, '·' a byte):")
        COMMANDS["sample"](self.argv(Stage("", "sample", files, bindings, test.after)))


@contextlib.contextmanager
def _output_to(path: epath.Path) -> Iterator[None]:
    """Appends what is printed to a file, which is named if the work fails."""
    remote = paths.is_remote(path)  # where it is written when the work has ended
    before = path.read_text() if remote and path.exists() else ""
    with io.StringIO(before) if remote else path.open("a") as file:
        file.seek(0, io.SEEK_END)
        try:
            with contextlib.redirect_stdout(cast(IO[str], file)):
                yield
        except BaseException:
            print(f"stopped; its output is in {path}", file=sys.stderr, flush=True)
            raise
        finally:
            if remote:
                write_atomically(path, cast(io.StringIO, file).getvalue())


def main(argv: Sequence[str] | None = None) -> None:
    """Lists, plans, runs or tabulates experiments; `argv` replaces the command line."""
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
    parser.add_argument("--scale", help="name or gin file; by default the experiment's own")
    parser.add_argument("--root", default="runs", help="directory for everything")
    parser.add_argument("--commands", action="store_true", help="print commands and their output")
    text = "NAME=VALUE,VALUE,...: decode with each value; repeat for every combination"
    parser.add_argument("--sweep", action="append", default=[], help=text)
    text = "comma-separated directories of gin files"
    parser.add_argument("--gin_search_paths", type=comma_separated, default=[], help=text)
    args, others = parser.parse_known_args(argv)
    strange = [flag for flag in others if not flag.startswith(GIN_FLAG)]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if args.list:
        body = []
        for name in names("experiments"):
            experiment, _, scale = load(name, None)
            body.append([name, experiment.title, scale])
        terminal.print_table(["experiment", "what", "scale"], body)
        return
    run = Run(
        args.plan or args.run or args.table,
        args.scale,
        args.root,
        others,
        args.gin_search_paths,
        args.sweep,
    )
    if args.plan:
        print(run.plan())
    elif args.run:
        run.run(args.commands)
    else:
        terminal.print_table(*run.table(), title=run.experiment.title)


if __name__ == "__main__":
    main()
