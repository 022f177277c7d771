"""Starts a command on many hosts, or in several processes of this one.

python -m diffusion_t5x.launch local --processes=4 --devices=2 train --gin_file=... --gin.NAME=VALUE
python -m diffusion_t5x.launch tpu-vm --name=my-tpu --zone=us-east5-a train --gin_file=...
python -m diffusion_t5x.launch xpk --cluster=C --workload=W --tpu_type=v5p-128 --image=I train ...
python -m diffusion_t5x.launch slurm --nodes=4 --sbatch=--gpus-per-node=8 train --gin_file=...

The flags after the command's name are passed to it unchanged. --print_only prints what would run,
and runs nothing. A run that was preempted, or that hung, is restarted.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence

from diffusion_t5x.commands import launch_local
from diffusion_t5x.runtime.guards import RESTARTABLE

COMMANDS = ("train", "eval", "infer", "convert")
# A shell's test for an exit code after which the command is restarted.
_RESTARTABLE = " || ".join(f"[ $code -eq {code} ]" for code in RESTARTABLE)


def make_parser() -> argparse.ArgumentParser:
    """Returns a parser with one sub-command per kind of place, each followed by the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    places = parser.add_subparsers(dest="place", required=True)

    def place(name: str, text: str) -> argparse.ArgumentParser:
        return places.add_parser(name, help=text, description=text, allow_abbrev=False)

    local = place("local", "processes on this machine")
    local.add_argument("--processes", type=int, default=1, help="number of processes")
    local.add_argument("--devices", type=int, help="simulated CPU devices per process")

    tpu_vm = place("tpu-vm", "all workers of a TPU VM, by gcloud")
    tpu_vm.add_argument("--name", required=True, help="name of the TPU VM")
    tpu_vm.add_argument("--zone", required=True)
    tpu_vm.add_argument("--project", help="default: gcloud's")
    tpu_vm.add_argument("--directory", default="~/diffusion_t5x", help="checkout on the workers")

    xpk = place("xpk", "a GKE cluster, by xpk")
    xpk.add_argument("--cluster", required=True)
    xpk.add_argument("--workload", required=True, help="name of the job")
    xpk.add_argument("--tpu_type", required=True, help="such as v5p-128")
    xpk.add_argument("--num_slices", type=int, default=1)
    xpk.add_argument("--image", required=True, help="container with diffusion_t5x installed")
    xpk.add_argument("--zone")
    xpk.add_argument("--project")

    slurm = place("slurm", "a Slurm cluster, by sbatch")
    slurm.add_argument("--nodes", type=int, required=True)
    slurm.add_argument("--tasks_per_node", type=int, default=1)
    slurm.add_argument("--sbatch", action="append", default=[], help="option of sbatch; repeatable")

    for sub in (local, tpu_vm, xpk, slurm):
        sub.add_argument("--python", default="python", help="the interpreter to run")
        sub.add_argument("--max_restarts", type=int, default=10, help="after preemption or a hang")
        sub.add_argument("--print_only", action="store_true", help="print what would run")
        sub.add_argument("command", choices=COMMANDS, help="module of diffusion_t5x")
        sub.add_argument("flags", nargs=argparse.REMAINDER, help="its flags, passed unchanged")
    return parser


def _restarting(command: str, max_restarts: int) -> str:
    """Returns a shell line that runs `command`, and again after each preemption or hang."""
    return (
        f"for i in $(seq 0 {max_restarts}); do {command}; code=$?; "
        f"{_RESTARTABLE} || exit $code; done; exit $code"
    )


def _tpu_vm_argv(args: argparse.Namespace, command: Sequence[str]) -> list[str]:
    # The tilde of a home directory must reach the workers' shell unquoted.
    shell = f"cd {args.directory} && {_restarting(shlex.join(command), args.max_restarts)}"
    project = [f"--project={args.project}"] if args.project else []
    return [
        "gcloud", "compute", "tpus", "tpu-vm", "ssh", args.name,
        f"--zone={args.zone}", *project, "--worker=all", f"--command={shell}",
    ]  # fmt: skip


def _xpk_argv(args: argparse.Namespace, command: Sequence[str]) -> list[str]:
    optional = {"zone": args.zone, "project": args.project}
    given = [f"--{name}={value}" for name, value in optional.items() if value]
    return [
        "xpk", "workload", "create",
        f"--cluster={args.cluster}", f"--workload={args.workload}",
        f"--tpu-type={args.tpu_type}", f"--num-slices={args.num_slices}",
        f"--docker-image={args.image}", *given,
        f"--max-restarts={args.max_restarts}",
        f"--restart-on-exit-codes={','.join(map(str, RESTARTABLE))}",
        f"--command={shlex.join(command)}",
    ]  # fmt: skip


def _slurm_script(args: argparse.Namespace, command: Sequence[str]) -> str:
    """Returns a script for sbatch that requeues the job after preemption or a hang."""
    options = [f"--nodes={args.nodes}", f"--ntasks-per-node={args.tasks_per_node}", "--requeue"]
    restarts = f"[ ${{SLURM_RESTART_COUNT:-0}} -lt {args.max_restarts} ]"
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in [*options, *args.sbatch]),
        f"srun --kill-on-bad-exit=1 {shlex.join(command)}",
        "code=$?",
        f"if {{ {_RESTARTABLE}; }} && {restarts}; then",
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        "exit $code",
    ]
    return "\n".join(lines) + "\n"


def _run(argv: Sequence[str], print_only: bool, text: str = "") -> int:
    """Runs or prints a launcher's command line, whose standard input is `text`."""
    if print_only:
        print(f"{shlex.join(argv)}\n{text}", end="")
        return 0
    try:
        return subprocess.run(argv, input=text, text=True, check=False).returncode
    except FileNotFoundError:
        message = f"{argv[0]} is not installed here; --print_only shows its command."
        raise SystemExit(message) from None


def _run_here(args: argparse.Namespace, command: Sequence[str]) -> int:
    if args.processes < 1 or args.max_restarts < 0 or (args.devices or 1) < 1:
        raise SystemExit(
            f"--processes={args.processes}, --devices={args.devices}, --max_restarts="
            f"{args.max_restarts}; expected at least 1, 1 and 0."
        )
    if not args.print_only:
        return launch_local.run(command, args.processes, args.devices, args.max_restarts)
    for index in range(args.processes):
        print(shlex.join(launch_local.process_argv(command, args.processes, index, 0)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Starts what the command line asks for, and returns the exit code."""
    args = make_parser().parse_args(argv)
    command = [args.python, "-m", f"diffusion_t5x.{args.command}", *args.flags]
    if args.place == "local":
        command[0] = sys.executable if args.python == "python" else args.python
        return _run_here(args, command)
    command.append("--distributed")
    if args.place == "tpu-vm":
        return _run(_tpu_vm_argv(args, command), args.print_only)
    if args.place == "xpk":
        return _run(_xpk_argv(args, command), args.print_only)
    return _run(["sbatch"], args.print_only, _slurm_script(args, command))


if __name__ == "__main__":
    sys.exit(main())
