"""Watches a job in its jail until it has a verdict."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import signal
import time

from . import harness
from .jails import Bounds, Jail, Job, Running
from .scratch import MOST_FILES, ScratchDirectory

# The time that a jail needs to start, on a busy machine.
_START_SECONDS = 60.0
_POLL_SECONDS = 0.02
_TRIES = 3
_MOST_CHANGES = 5  # of directories, in a row, while they are counted
_NO_ANSWER = b"?"
_MOST_ANSWER = 4096  # bytes, far above what the harness writes


class JailError(RuntimeError):
    """A jail did not come up."""


class Interrupted(BaseException):
    """The job was ended because nobody waits for it any more."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a program passed its tests, and why not; true if it did.

    Attributes:
      passed: The last of the tests was reached and held.
      why: What ended the program, in the program's own words where it raised; '' if it passed.
    """

    passed: bool
    why: str = ""

    def __bool__(self) -> bool:
        return self.passed


def judge(jail: Jail, job: Job, bounds: Bounds, wall_seconds: float, stop: int = -1) -> Verdict:
    """Runs a job in a jail.

    Args:
      wall_seconds: The time from the program's first line to its verdict.
      stop: A descriptor that becomes readable when the job is to be given up; -1 for none.

    Raises:
      Interrupted: if it was given up.
      JailError: if the jail did not come up, several times.
    """
    problems = []
    for _ in range(_TRIES):
        try:
            with jail.start(job, bounds) as running:
                return _watch(running, bounds, wall_seconds, stop)
        except (JailError, OSError) as error:
            problems.append(str(error))
    raise JailError("; ".join(dict.fromkeys(problems)))


def _watch(running: Running, bounds: Bounds, wall_seconds: float, stop: int) -> Verdict:
    """Waits for the harness, a limit, or the end of the process."""
    with contextlib.ExitStack() as opened:
        process = os.pidfd_open(running.process.pid)
        opened.callback(os.close, process)
        poller = select.poll()
        for descriptor in (running.verdict, process, *([stop] if stop >= 0 else [])):
            poller.register(descriptor, select.POLLIN)
        answer, changes = b"", 0
        deadline = time.monotonic() + _START_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            wait = min(left, _POLL_SECONDS) if running.scratch else left
            ready = {descriptor for descriptor, _ in poller.poll(1000 * wait + 1)}
            verdict = None
            if stop in ready:
                raise Interrupted
            if running.verdict in ready:
                try:
                    part = os.read(running.verdict, _MOST_ANSWER)
                except BlockingIOError:  # something else than what can be read
                    part = _NO_ANSWER
                if not answer:
                    deadline = time.monotonic() + wall_seconds
                if not part:
                    poller.unregister(running.verdict)
                answer += part
                verdict = _read(answer, running.token)
            elif process in ready:
                verdict = _ended(running, answer, bounds)
            elif running.scratch:
                changes, verdict = _count_files(running, running.scratch, bounds, changes)
            if verdict is not None:
                return verdict
    if not answer:
        raise JailError(f"it did not come up in {_START_SECONDS:g} seconds")
    return Verdict(False, f"not done after {wall_seconds:g} seconds")


def _count_files(
    running: Running, scratch: ScratchDirectory, bounds: Bounds, changes: int
) -> tuple[int, Verdict | None]:
    """Returns how often in a row files moved while they were counted, and a verdict if too many."""
    try:
        size, count, whole = scratch.usage(running.process.pid, bounds.file_bytes)
    except (OSError, RecursionError) as error:  # too deep, or shut
        return changes, Verdict(False, f"its files cannot be counted ({type(error).__name__})")
    changes = 0 if whole else changes + 1
    if size > bounds.scratch_bytes:
        return changes, Verdict(False, f"more than {bounds.scratch_bytes:,} bytes of files")
    if count > MOST_FILES or changes > _MOST_CHANGES:
        return changes, Verdict(False, f"more than {MOST_FILES:,} files, or no end of moving them")
    return changes, None


def _read(answer: bytes, token: bytes) -> Verdict | None:
    """Returns the verdict of an answer, or None if there is none yet."""
    if answer == harness.READY + token + harness.PASSED:
        return Verdict(True)
    if answer.startswith(failed := harness.READY + token + harness.FAILED):
        words = answer.removeprefix(failed).decode("utf-8", "replace")
        return Verdict(False, "".join(c if c.isprintable() else " " for c in words))
    if not (harness.READY + token + harness.PASSED).startswith(answer):
        return Verdict(False, "it wrote where its verdict goes")
    return None


def _ended(running: Running, answer: bytes, bounds: Bounds) -> Verdict:
    """Returns why a process ended without a verdict."""
    code = running.process.wait()
    if not answer:
        raise JailError(running.complaint() or f"it ended with {code}")
    if running.group and running.group.ran_out_of_memory():
        return Verdict(False, f"more than {bounds.total_memory_bytes:,} bytes of memory")
    number = -code if code < 0 else code - 128  # bubblewrap's way to tell a signal
    if number == signal.SIGXCPU:
        return Verdict(False, f"more than {bounds.cpu_seconds} seconds of processor time")
    if 0 < number < signal.NSIG:
        names = {known.value: known.name for known in signal.Signals}
        return Verdict(False, f"ended by {names.get(number, f'signal {number}')}")
    return Verdict(False, f"ended with exit code {code} before its tests were through")
