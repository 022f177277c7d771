"""Guards against what ends a process: preemption, a hang, a full disk; each has an exit code."""

from __future__ import annotations

import errno
import faulthandler
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from diffusion_t5x.paths import is_remote

# Preempted after saving everything: restart to resume (sysexits' EX_TEMPFAIL).
PREEMPTED = 75
# Nothing can be written because the disk is full: restart once there is room (EX_IOERR).
DISK_FULL = 74
# No step came for too long, because a process or the network hangs: restart to resume from the last
# checkpoint; a hang usually ends with the processes (EX_UNAVAILABLE).
HUNG = 69
# Ended by Ctrl-C, as shells report it.
INTERRUPTED = 130
# Exit codes after which launchers restart a command, as often as they are allowed.
RESTARTABLE = {PREEMPTED: "preempted", HUNG: "hung"}


class Preempted(SystemExit):
    """Training ended because of SIGTERM and everything is saved; the exit code is `PREEMPTED`."""

    def __init__(self):
        super().__init__(PREEMPTED)


class Interrupted(SystemExit):
    """Training ended because of Ctrl-C and everything is saved; the exit code is `INTERRUPTED`."""

    def __init__(self):
        super().__init__(INTERRUPTED)


class Watchdog:
    """A thread that ends this process if no sign of life comes for too long.

    If one process of a run hangs, the others wait for it inside a collective, in compiled code that
    cannot be interrupted, so the thread ends the process itself, with its stacks on stderr and exit
    code `HUNG`. Time for which the whole process is stopped, as by a shell, does not count.

    The thread needs Python's global lock. In case native code holds the lock for ever, the thread
    keeps postponing a timer of `faulthandler`, which needs no lock: twice the limit after the
    thread's last tick, the timer writes the stacks and ends the process with exit code 1.
    """

    def __init__(self, timeout_seconds: float | None):
        if timeout_seconds is not None and timeout_seconds < 0:
            raise ValueError(
                f"step_timeout_seconds = {timeout_seconds}; expected seconds, or None for no limit."
            )
        self._timeout = self._left = timeout_seconds or 0.0
        self._awaited, self._process = "the first step", "this process"
        self._suspended = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, awaited: str) -> None:
        """Gives a sign of life, and names what is awaited next, such as 'step 3'."""
        self._awaited, self._left = awaited, self._timeout

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Suspends the limit for work that may take any time, such as an evaluation."""
        self._suspended = True
        try:
            yield
        finally:
            self.beat(self._awaited)
            self._suspended = False

    def _watch(self) -> None:
        tick = min(1.0, self._timeout / 4)
        before = time.monotonic()
        while not self._over.wait(tick):
            now = time.monotonic()
            if self._suspended:
                faulthandler.cancel_dump_traceback_later()
            else:
                # A tick that took much longer is one during which the process was stopped.
                self._left -= min(now - before, 2 * tick)
                if self._left <= 0:
                    self._end()
                faulthandler.dump_traceback_later(2 * self._timeout, exit=True, file=2)
            before = now
        faulthandler.cancel_dump_traceback_later()

    def _end(self) -> None:
        # Python's own streams and exit could wait for the thread that hangs.
        message = (
            f"\n{self._process}: {self._awaited} has not come for {self._timeout:g} seconds "
            "(trainer.train.step_timeout_seconds); this process, another one or the network hangs. "
            f"This process ends with exit code {HUNG}; its threads were here:\n"
        )
        os.write(2, message.encode())
        faulthandler.dump_traceback(2)
        os._exit(HUNG)

    def __enter__(self) -> Watchdog:
        import jax

        if self._timeout:
            self._process = f"process {jax.process_index()} of {jax.process_count()}"
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._timeout:
            self._thread.join()


class DiskFull(SystemExit):
    """Something could not be written for lack of room; the exit code is `DISK_FULL`.

    `message` names the directory, the disk and the original error.
    """

    def __init__(self, message: str):
        super().__init__(DISK_FULL)
        self.message = message


def find_full_disk(error: BaseException | None) -> tuple[str, BaseException] | None:
    """Finds a disk-full error in an exception's chain of causes.

    Returns the system's words, such as 'No space left on device', and the error that has them;
    None if there is none.
    """
    # No room, a quota that is used up, and a file larger than the shell's limit allows.
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for code in codes:
            # TensorFlow and TensorStore report the code as words only.
            words = os.strerror(code)
            if getattr(error, "errno", None) == code or words.lower() in str(error).lower():
                return words, error
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def stops_when_full(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Turns a disk-full error of any library into a message on stderr and `DiskFull`.

    With several processes, this one ends at once: an ordinary exit would wait for the others, which
    wait for it.
    """
    try:
        yield
    except Exception as error:
        if (found := find_full_disk(error)) is None:
            raise
        words, cause = found
        disk = pathlib.Path(tempfile.gettempdir() if is_remote(directory) else directory).absolute()
        while not disk.exists():
            disk = disk.parent
        free = f"{shutil.disk_usage(disk).free:,} bytes"
        files = os.statvfs(disk)
        if files.f_files and not files.f_favail:  # some have no limit, and say 0
            free = f"no file can be added, though {free}"
        while not disk.is_mount():
            disk = disk.parent
        message = (
            f"{directory} cannot be written to: {words}; {free} are free on the disk "
            f"mounted at {disk}. Everything that was finished before is whole. Make room (fewer "
            "checkpoints stay with checkpoints.SaveCheckpointConfig.keep) and start the same "
            f"command again.\nOriginal error: {type(cause).__name__}: {str(cause).strip()[:500]}"
        )
        with suppress(OSError):  # the log may be on the same disk
            print(message, file=sys.stderr, flush=True)
        import jax

        if jax.process_count() > 1:
            sys.stdout.flush()
            os._exit(DISK_FULL)
        raise DiskFull(message) from error
