"""Runs generated programs against assertions in a sandbox.

A program runs in one process and the assertions in another. The assertions call the program's
functions through a pipe and get results back as plain data, so the program sees arguments, but
never an assertion, an expected value or the verdict. Whatever the program does to its own
interpreter (ends it, overrides comparison, replaces built-in functions, searches its frames or
memory), it passes only if the results of its functions satisfy the assertions.

docs/sandbox.md lists what is guaranteed, what is not, and on which kernel.
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

from .sandbox.values import Encoder

_BOOT = "import sys; sys.path.insert(0, sys.argv.pop(1)); from sandbox import launch; launch.main()"
# The time that a launcher needs to start and to stop, on a busy machine.
_GRACE_SECONDS = 10.0
_NAMESPACES = ("root", "user")
_LOST = {
    "landlock": "namespaces: the program sees metadata of files and the machine's processes; "
    "network, signals and other files are refused by system-call filter and Landlock instead",
    "bare": "namespaces and Landlock: the program may read and write whatever this user may",
}


class SandboxError(RuntimeError):
    """An error of the sandbox: it failed, or the kernel cannot confine programs."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The resources that a program may use.

    Attributes:
      wall_seconds: Wall time of the program and its assertions together.
      cpu_seconds: CPU time of one process.
      memory_bytes: Address space of one process.
      total_memory_bytes: Resident memory of all processes of the program.
      file_bytes: Size of one file, and of the whole output.
      scratch_bytes: Size of all files.
      processes: Processes and threads at once.
      open_files: Open files of one process.
      allow_unprotected: Runs the program even if nothing protects the user's files from it.

    Raises:
      ValueError: if a limit is not positive.
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

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0 and field.name != "allow_unprotected":
                raise ValueError(
                    f"{field.name} = {getattr(self, field.name)}; expected more than 0."
                )


_limits = Limits()


def configure(**limits: Any) -> Limits:
    """Changes the limits of all later programs, and returns them.

    Args:
      **limits: Fields of `Limits`.

    Raises:
      TypeError: if a name is not a field.
      ValueError: if a value is not positive.
    """
    global _limits  # noqa: PLW0603
    _limits = dataclasses.replace(_limits, **limits)
    return _limits


def run(program: str, tests: Sequence[str], wall_seconds: float | None = None) -> bool:
    """Runs a program, and returns True if it satisfies all its assertions within its limits.

    Args:
      program: Python source.
      tests: Python source of statements that must not raise.
      wall_seconds: The time after which the program is killed; None for the configured limit.

    Raises:
      SandboxError: if this machine cannot confine programs.
    """
    limits = _limits if wall_seconds is None else _replace_wall(wall_seconds)
    return _run(_mode(limits.allow_unprotected), program, tests, limits)


def run_all(programs: Sequence[tuple[str, Sequence[str]]]) -> list[bool]:
    """Calls `run` for each (program, tests), as many at a time as there are cores.

    Raises:
      SandboxError: if this machine cannot confine programs.
    """
    _mode(_limits.allow_unprotected)  # cached before many threads need it
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda job: run(*job), programs))


def _replace_wall(wall_seconds: float) -> Limits:
    return dataclasses.replace(_limits, wall_seconds=wall_seconds)


@functools.cache
def _warn(text: str) -> None:
    """Warns once of a missing protection."""
    warnings.warn(f"the sandbox for generated code lacks {text}.", stacklevel=4)


@functools.cache
def _mode(allow_unprotected: bool) -> str:
    """Returns the best protection that works on this machine, found by running a program under it.

    Raises:
      SandboxError: if no protection works.
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
        f"({'; '.join(reasons)}). diffusion_t5x.tasks.code_execution.configure("
        "allow_unprotected=True) runs it nevertheless; use it only on a machine that holds "
        "nothing valuable."
    )


@contextlib.contextmanager
def _directory() -> Iterator[str]:
    """Creates a directory and removes it afterwards, whatever its contents."""
    directory = tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True)
    try:
        yield directory.name
    finally:
        try:
            directory.cleanup()
        except RecursionError:  # deeply nested directories
            subprocess.run(["rm", "-rf", "--", directory.name], check=False)


def _run(mode: str, program: str, tests: Sequence[str], limits: Limits) -> bool:
    """Runs a program under a given protection; see `run`."""
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
    """Returns the launcher's settings."""
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
