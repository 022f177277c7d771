"""Runs generated programs against assertions, where they can do no harm.

A program runs in one process and the assertions in another. The assertions call the program's
functions through a pipe and get results back as plain data, so the program is told arguments and
never an assertion, the value it expects, or the verdict. Whatever the program does to its own
interpreter (ends it, overrides comparison, replaces built-in functions, looks through its frames
or memory), it passes only if what its functions gave back satisfies the assertions.

What is guaranteed, what is not, and on which kernel: docs/sandbox.md.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from tasks.sandbox.values import Encoder

_BOOT = "import sys; sys.path.insert(0, sys.argv.pop(1)); from sandbox import launch; launch.main()"
# What a launcher takes to start and to stop, on a machine that is busy.
_GRACE_SECONDS = 10.0
_NAMESPACES = ("root", "user")
_LOST = {
    "landlock": "namespaces: the program sees metadata of files and the machine's processes; "
    "network, signals and other files are refused by system-call filter and Landlock instead",
    "bare": "namespaces and Landlock: the program may read and write whatever this user may",
}


class SandboxError(RuntimeError):
    """The kernel cannot keep programs in, or the sandbox itself failed."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
      wall_seconds: for the program and its assertions together.
      cpu_seconds: of one process.
      memory_bytes: address space of one process.
      total_memory_bytes: resident memory of all its processes.
      file_bytes: size of one file; also all that is printed.
      scratch_bytes: of all files.
      processes: processes and threads at once.
      open_files: of one process.
      allow_unprotected: run even where nothing keeps a program from the user's files.
    """

    wall_seconds: float = 5.0
    cpu_seconds: int = 3
    memory_bytes: int = 512 * 2**20
    total_memory_bytes: int = 2**30
    file_bytes: int = 2**20
    scratch_bytes: int = 16 * 2**20
    processes: int = 64
    open_files: int = 32
    allow_unprotected: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0 and field.name != "allow_unprotected":
                raise ValueError(
                    f"{field.name} = {getattr(self, field.name)}; expected more than 0."
                )


_limits = Limits()


def configure(**limits: Any) -> Limits:
    """Changes the limits of all programs that run from now on, and returns them.

    Args:
      **limits: fields of `Limits`.

    Raises:
      TypeError: if there is no such field.
      ValueError: if a value is not positive.
    """
    global _limits  # noqa: PLW0603
    _limits = dataclasses.replace(_limits, **limits)
    return _limits


def run(program: str, tests: Sequence[str], wall_seconds: float | None = None) -> bool:
    """Whether `program` satisfies every one of its assertions within its limits.

    Args:
      program: Python source.
      tests: source of statements that must not raise.
      wall_seconds: after which it is killed; None for the configured limit.

    Raises:
      SandboxError: if programs cannot be kept in on this machine.
    """
    limits = _limits if wall_seconds is None else _replace_wall(wall_seconds)
    return _run(_mode(limits.allow_unprotected), program, tests, limits)


def run_all(programs: Sequence[tuple[str, Sequence[str]]]) -> list[bool]:
    """`run` for each (program, tests), as many at once as there are cores for.

    Raises:
      SandboxError: if programs cannot be kept in on this machine.
    """
    _mode(_limits.allow_unprotected)  # found out once, before many ask
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda job: run(*job), programs))


def _replace_wall(wall_seconds: float) -> Limits:
    return dataclasses.replace(_limits, wall_seconds=wall_seconds)


@functools.cache
def _warn(text: str) -> None:
    """Says once what is missing."""
    warnings.warn(f"the sandbox for generated code lacks {text}.", stacklevel=4)


@functools.cache
def _mode(allow_unprotected: bool) -> str:
    """The best protection that works here, found by running a program under it.

    Raises:
      SandboxError: if there is none.
    """
    if sys.platform != "linux":
        raise SandboxError(f"generated code runs on Linux only; this is {sys.platform!r}.")
    modes = ["root" if os.geteuid() == 0 else "user", "landlock"] + ["bare"] * allow_unprotected
    reasons = []
    for mode in modes:
        try:
            if not _run(mode, "x = 1", ["assert x == 1"], Limits(wall_seconds=30)):
                raise SandboxError("a program that should pass did not")
        except SandboxError as error:
            reasons.append(f"{mode}: {error}")
            continue
        if mode in _LOST:
            _warn(f"{_LOST[mode]} ({'; '.join(reasons)})")
        return mode
    raise SandboxError(
        "nothing here keeps generated code from your files: neither namespaces nor Landlock work "
        f"({'; '.join(reasons)}). tasks.code_execution.configure(allow_unprotected=True) runs it "
        "nevertheless; do so only on a machine that holds nothing of worth."
    )


@contextlib.contextmanager
def _directory() -> Iterator[str]:
    """A directory that is removed afterwards, whatever was put into it."""
    directory = tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True)
    try:
        yield directory.name
    finally:
        try:
            directory.cleanup()
        except RecursionError:  # directories in directories in directories
            subprocess.run(["rm", "-rf", "--", directory.name], check=False)


def _run(mode: str, program: str, tests: Sequence[str], limits: Limits) -> bool:
    """`run` under a given protection."""
    job = Encoder(None, [])
    job.encode((program, tuple(tests)))
    settings = json.dumps(_settings(limits))
    with (
        _directory() as directory,
        tempfile.TemporaryFile() as text,
        tempfile.TemporaryFile() as verdict,
        tempfile.TemporaryFile() as complaints,
    ):
        text.write(job.out)
        text.seek(0)
        here = str(pathlib.Path(__file__).parent)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _BOOT, here, mode, directory, str(os.getpid()),
             settings],
            stdin=text,
            stdout=verdict,
            stderr=complaints,
            cwd="/",
            env={},
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limits.wall_seconds + _GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.kill()
            process.wait()
        complaints.seek(0)
        lines = complaints.read().decode("utf-8", "replace").splitlines()
        failures = [line for line in lines if not line.startswith("missing: ")]
        if failures or code not in (0, None):
            raise SandboxError("; ".join(failures) or f"the launcher ended with {code}")
        for line in lines:
            _warn(line.removeprefix("missing: "))
        verdict.seek(0)
        return code == 0 and verdict.read(16) == b"passed"


def _settings(limits: Limits) -> dict[str, object]:
    """What the launcher is told."""
    return {
        "wall_seconds": limits.wall_seconds,
        "processes": limits.processes,
        "total_memory_bytes": limits.total_memory_bytes,
        "scratch_bytes": limits.scratch_bytes,
        "limits": {
            "CPU": limits.cpu_seconds,
            "AS": limits.memory_bytes,
            "FSIZE": limits.file_bytes,
            "NOFILE": limits.open_files,
            "CORE": 0,
        },
    }
