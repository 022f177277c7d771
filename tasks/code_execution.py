"""Runs generated programs: each in a process of its own, with limits, far from the trainer's."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

WALL_SECONDS = 5.0
CPU_SECONDS = 3
MEMORY_BYTES = 512 * 2**20
FILE_BYTES = 2**20
OPEN_FILES = 32


# The child limits itself, then reads the program from standard input: an argument may be no longer
# than 128 KiB, and is public to every process of the machine.
_PRELUDE = f"""import os as _o, resource as _r, sys as _s
for _what, _most in ((_r.RLIMIT_CPU, {CPU_SECONDS}), (_r.RLIMIT_AS, {MEMORY_BYTES}),
                     (_r.RLIMIT_FSIZE, {FILE_BYTES}), (_r.RLIMIT_NOFILE, {OPEN_FILES}),
                     (_r.RLIMIT_CORE, 0)):
    _r.setrlimit(_what, (_most, _most))
_program = compile(_s.stdin.buffer.read().decode(), "<program>", "exec")
_o.dup2(_o.open(_o.devnull, _o.O_RDONLY), 0)
del _o, _r, _s, _what, _most
exec(globals().pop("_program"))
"""


def run(program: str, tests: Sequence[str], wall_seconds: float = WALL_SECONDS) -> bool:
    """Whether `program` followed by its assertions runs to the very end.

    It runs in an isolated interpreter with an empty environment in a directory that is removed
    afterwards, in a process group that is killed at the end, without standard input and within
    limits on time, memory, file size and open files. Success is a secret that is printed after
    the last assertion, so leaving early is none.

    Args:
      program: Python source.
      tests: statements that must not raise.
      wall_seconds: after which it is killed.
    """
    secret = secrets.token_hex(16)
    source = "\n".join([program, *tests, f"print({secret!r})"])
    with (
        tempfile.TemporaryDirectory() as directory,
        tempfile.TemporaryFile() as text,
        tempfile.TemporaryFile() as output,
    ):
        text.write(source.encode("utf-8", "surrogatepass"))
        text.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PRELUDE],
            stdin=text,
            stdout=output,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env={},
            start_new_session=True,
        )
        try:
            code = process.wait(wall_seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0, os.SEEK_END)
        output.seek(max(0, output.tell() - len(secret) - 2))
        return code == 0 and output.read().strip().endswith(secret.encode())


def run_all(programs: Sequence[tuple[str, Sequence[str]]]) -> list[bool]:
    """`run` for each (program, tests), as many at once as there are cores."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: run(*job), programs))
