"""Starts a program and its assertions, each a process in a jail, and ends both.

    launcher ── supervisor ─┬─ examiner            the assertions; says 'passed', or nothing
      (as the caller)       └─ (init) ── program   the generated text; no way to the outside

The supervisor is process 1 of a process namespace, and init of one inside it: when either ends, the
kernel ends all that are in it, whatever they did. Without namespaces the supervisor adopts every
orphan and kills until there is none left.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from . import examiner, jail, program, seccomp

_POLL_SECONDS = 0.02
_KILL_SECONDS = 5.0
_FAILED = 3


class _Jail:
    """How this job is kept in.

    Attributes:
      namespaces: whether it has its own; else it sees the machine's processes.
      uid: of the job's processes; None to stay who this is.
    """

    def __init__(self, mode: str, directory: str, settings: Mapping[str, Any]):
        self.mode, self.directory, self.settings = mode, directory, settings
        self.namespaces = mode in ("root", "user")
        self.uid = None
        self.launcher = os.getpid()
        stdlib = os.path.dirname(os.__file__)
        if mode == "root" or (
            not self.namespaces and os.geteuid() == 0 and jail.others_may_enter(stdlib)
        ):
            self.uid = jail.private_uid(os.getpid())
        # A new user, or one in a user namespace of its own, has no other processes to count.
        private = self.uid is not None or (mode == "user" and _kernel() >= (5, 14))
        others = 0 if private else jail.tasks_of_user(os.geteuid())
        self.limits = {**settings["limits"], "NPROC": others + settings["processes"] + 4}

    def enter(self) -> None:
        """What examiner and program give up; what cannot be had is written to stderr."""
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        jail.become(self.uid)
        if self.mode == "landlock":
            jail.landlock(self.directory)
        jail.limit(self.limits)
        if not seccomp.supported():
            note(f"system-call filter: not written for processor {os.uname().machine}")
            return
        try:
            # The kernel counts the processes of every user but root.
            root = self.uid is None and os.geteuid() == 0
            seccomp.install(keep_signals=self.namespaces, keep_fork=not root)
        except OSError as error:
            note(f"system-call filter: {error}")


def note(text: str) -> None:
    """Tells the caller of a protection that is missing."""
    os.write(2, f"missing: {text}\n".encode())


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])


def _child(work: Callable[[], None]) -> int:
    """A process that does `work` and no more."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:
        _fail(error)


def _fail(error: BaseException) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    os._exit(_FAILED)


def _arrange(output: int, *kept: int) -> None:
    """Standard input from nowhere, all output to `output`; every other file but these is closed."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    last = 2
    for fd in sorted(kept):
        os.closerange(last + 1, fd)
        last = fd
    os.closerange(last + 1, 1024)


def _examine(job: _Jail, reader: int, writer: int) -> None:
    """The examiner's process; the verdict goes to what standard output was."""
    text = bytearray()
    while part := os.read(0, 2**20):
        text += part
    job.enter()
    verdict = os.dup(1)
    _arrange(os.open(os.devnull, os.O_WRONLY), reader, writer, verdict)
    examiner.examine(reader, writer, bytes(text), verdict)


def _serve(job: _Jail, reader: int, writer: int, output: int) -> None:
    """The program's process."""
    job.enter()
    _arrange(output, reader, writer)
    program.serve(reader, writer)


def _init(job: _Jail, *fds: int) -> None:
    """Process 1 of the program's namespace; its end is the end of all that the program started."""
    pid = _child(lambda: _serve(job, *fds))
    jail.become(job.uid)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.closerange(3, 1024)
    while os.wait()[0] != pid:
        pass


class _Supervisor:
    """Watches a job until its assertions are through or a limit is passed."""

    def __init__(self, job: _Jail):
        self._job = job
        # The machine's own /proc, out of reach for everyone else once the root has changed.
        self._proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        self._pid = int(os.readlink("self", dir_fd=self._proc))
        self._deadline = time.monotonic() + job.settings["wall_seconds"]
        if not os.path.exists(f"/proc/{self._pid}/task/{self._pid}/children"):
            if not job.namespaces:
                raise OSError("this kernel does not list children, so that they cannot be ended")
            note("a limit on the memory of all processes: this kernel does not list children")

    def run(self) -> None:
        """Starts the two and waits."""
        job = self._job
        if job.namespaces:
            jail.build_root(job.directory, job.settings["scratch_bytes"], job.uid)
        else:
            jail.adopt_orphans()
            os.chown(job.directory, *(2 * [-1 if job.uid is None else job.uid]))
            os.chdir(job.directory)
        output = os.open("output", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.unlink("output")
        (from_program, to_examiner), (from_examiner, to_program) = os.pipe(), os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        self._examiner = _child(lambda: _examine(job, from_program, to_program))
        fds = from_examiner, to_examiner, output
        if job.namespaces:
            jail.unshare(jail.NEWPID)
            self._program = _child(lambda: _init(job, *fds))
        else:
            self._program = _child(lambda: _serve(job, *fds))
        for fd in (0, from_program, to_program, *fds):
            os.close(fd)
        jail.become(job.uid)
        while self._within_limits() and not self._ended():
            signal.sigtimedwait({signal.SIGCHLD}, _POLL_SECONDS)

    def _ended(self) -> bool:
        """Whether the examiner has; orphans and a program that ended are seen to."""
        with contextlib.suppress(ChildProcessError):
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                if pid == self._examiner:
                    return True
                if pid == self._program and not self._job.namespaces:
                    self.kill_all(but=self._examiner)
        return False

    def _within_limits(self) -> bool:
        settings = self._job.settings
        memory, tasks = jail.usage(self._proc, jail.descendants(self._proc, self._pid))
        return (
            time.monotonic() < self._deadline
            and memory <= settings["total_memory_bytes"]
            and tasks <= settings["processes"] + 4
            and (self._job.namespaces or self._scratch_fits(settings["scratch_bytes"]))
        )

    def _scratch_fits(self, most: int) -> bool:
        """Whether the scratch directory, which is of no bounded file system, holds that little."""
        size = count = 0
        folders = ["."]
        while folders and size <= most and count <= 1024:
            try:
                with os.scandir(folders.pop()) as entries:
                    for entry in entries:
                        count += 1
                        size += entry.stat(follow_symlinks=False).st_blocks * 512
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
            except FileNotFoundError:  # removed meanwhile
                continue
            except OSError:  # what cannot be looked into, or is too deep to be, may hold anything
                return False
        return size <= most and count <= 1024

    def kill_all(self, but: int = 0) -> None:
        """Kills every descendant, and those that they start meanwhile."""
        until = time.monotonic() + _KILL_SECONDS
        while time.monotonic() < until:
            pids = [pid for pid in jail.descendants(self._proc, self._pid) if pid != but]
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid in pids:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.001)


def _supervise(job: _Jail) -> None:
    if job.namespaces:
        # Its parent is outside, without a number here.
        jail.die_with_parent(signal.SIGKILL, 0)
        _Supervisor(job).run()
        return
    jail.die_with_parent(signal.SIGTERM, job.launcher)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_FAILED))
    supervisor = _Supervisor(job)
    try:
        supervisor.run()
    finally:
        supervisor.kill_all()


def main() -> None:
    """Runs the job on standard input: `launch MODE DIRECTORY PARENT SETTINGS`."""
    del sys.path[0]  # the way to these modules
    mode, directory, parent, settings = sys.argv[1:]
    try:
        jail.die_with_parent(signal.SIGKILL, int(parent))
        job = _Jail(mode, directory, json.loads(settings))
        if job.namespaces:
            jail.enter_namespaces(as_root=mode == "root")
        supervisor = _child(lambda: _supervise(job))
    except Exception as error:
        _fail(error)
    _, status = os.waitpid(supervisor, 0)
    os._exit(0 if os.waitstatus_to_exitcode(status) == 0 else _FAILED)
