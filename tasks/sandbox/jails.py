"""The ways to keep a program in: namespaces made by bubblewrap, Landlock, or limits alone."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import marshal
import os
import pathlib
import platform
import re
import secrets
import signal
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from . import control_groups, harness, system_calls
from .control_groups import ControlGroup
from .interpreter import Interpreter
from .scratch import ScratchDirectory, link_all, own_device

# No such user has a name or owns a file; process and job make it one of their own.
_FIRST_UID = 0x40000000
_DEVICES = ("/dev/null", "/dev/random", "/dev/urandom")
_OTHER_PROCESSES = 4  # in a namespace or control group: bubblewrap's, and a shell before it
_FILES_IN_MEMORY = 2**20  # for semaphores
_JOIN = (
    'while [ "$1" != -- ]; do echo 0 > "$1/cgroup.procs" || exit 1; shift; done; shift; exec "$@"'
)
# The interpreter reads the harness and its job from a descriptor, which it closes.
_BOOT = """
import marshal, sys
with open(int(sys.argv[1]), "rb") as file: code, job = marshal.load(file)
names = {"__name__": "harness"}
exec(code, names)
names["main"](job, int(sys.argv[2]))
"""
_HARNESS = compile(pathlib.Path(harness.__file__).read_text(encoding="utf-8"), "harness.py", "exec")
# Programs see none of these. Arithmetic by several threads would take memory for each core of the
# machine, and each thread would reserve address space; sets have the same order each time.
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "PYTHONHASHSEED": "0",
}
_numbers = itertools.count()


class Bounds(NamedTuple):
    """What a program may use; see `diffusion_t5x.data.programs.Limits`."""

    cpu_seconds: int
    memory_bytes: int
    total_memory_bytes: int
    file_bytes: int
    scratch_bytes: int
    processes: int
    open_files: int


class Job(NamedTuple):
    """A program and its tests: names and texts that run in order, and modules loaded before."""

    parts: tuple[tuple[str, str], ...]
    imports: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Running:
    """A job that was started.

    Attributes:
      process: The process that ends when all that the job started has ended.
      verdict: The descriptor from which the verdict is read.
      token: What every verdict of the harness begins with.
      group: Its control group, or None.
      scratch: Its directory on this machine's disk, or None.
    """

    process: subprocess.Popen[bytes]
    verdict: int
    token: bytes
    complaints: Any
    group: ControlGroup | None = None
    scratch: ScratchDirectory | None = None

    def kill(self) -> None:
        """Kills all that the job started, and returns when it has ended."""
        if self.process.poll() is None and self.scratch is None:
            # Process 1 of the namespace takes all others with it, and bubblewrap waits for it.
            for pid in _children(self.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
        self.process.kill()
        self.process.wait()

    def complaint(self) -> str:
        """Returns what the jail wrote before the program began."""
        self.complaints.seek(0)
        return self.complaints.read().decode("utf-8", "replace").strip()[-1000:]


class Jail(Protocol):
    """A way to keep programs in."""

    def start(self, job: Job, bounds: Bounds) -> contextlib.AbstractContextManager[Running]:
        """Starts a job; nothing of it is left when the context ends.

        Raises:
          OSError: if it cannot be started.
        """


def _children(pid: int) -> list[int]:
    try:
        text = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except OSError:
        return []
    return [int(child) for child in text.split()]


class Namespaces:
    """Files, users, processes, network and IPC of the program's own, by bubblewrap.

    Started as root it needs no namespace of users: the harness becomes a user without rights.
    """

    def __init__(self, bubblewrap: str, interpreter: Interpreter):
        self._bubblewrap, self._interpreter = bubblewrap, interpreter
        self._root = os.geteuid() == 0
        control_groups.clear_leftovers()
        ScratchDirectory.clear_leftovers()  # with devices

    @contextlib.contextmanager
    def start(self, job: Job, bounds: Bounds) -> Iterator[Running]:
        group = control_groups.create(
            bounds.total_memory_bytes, bounds.processes + _OTHER_PROCESSES
        )
        code = system_calls.compile_filter(namespaces=True, processes=group is not None)
        uid = _private_uid() if self._root else None
        private = self._root or _kernel() >= (5, 14)
        payload = _payload(job, bounds, self._interpreter.folders, private, uid=uid)
        try:
            with _descriptors(payload, code) as (files, reader, writer, token):
                directories = [str(path) for path in group.directories] if group else []
                joins = ["/bin/sh", "-c", _JOIN, "sh", *directories, "--"] if group else []
                harnessed = _python(self._interpreter, files[0], writer)
                command = [*joins, *self._options(bounds, files[1]), "--", *harnessed]
                with _process(command, (*files, writer), "/") as (process, complaints):
                    os.close(writer)
                    running = Running(process, reader, token, complaints, group)
                    try:
                        yield running
                    finally:
                        running.kill()
        finally:
            if group:
                group.remove()

    def _options(self, bounds: Bounds, filter_file: int) -> list[str]:
        readable = self._interpreter.readable
        options = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
        options += ["--unshare-cgroup-try", "--die-with-parent", "--new-session"]
        options += ["--cap-drop", "ALL", "--seccomp", str(filter_file)]
        if self._root:
            options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        else:
            options += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
        above = {str(parent) for path, _ in readable for parent in pathlib.Path(path).parents}
        options += ["--perms", "0755", "--dir", "/dev"]
        # Before what may be read, some of which may lie in /tmp.
        for path, size in (("/tmp", bounds.scratch_bytes), ("/dev/shm", _FILES_IN_MEMORY)):
            options += ["--perms", "1777", "--size", str(size), "--tmpfs", path]
        # Where nothing else is.
        directory = "/tmp/program" if "/tmp" in above else "/tmp"
        options += ["--perms", "1777", "--dir", directory] * (directory != "/tmp")
        for path in sorted(above - {"/", "/tmp"}):
            options += ["--perms", "0755", "--dir", path]
        for path, hidden in readable:
            options += ["--ro-bind", path, path]
            for name in hidden:
                if os.path.isdir(f"{path}/{name}") and not os.path.islink(f"{path}/{name}"):
                    options += ["--tmpfs", f"{path}/{name}", "--remount-ro", f"{path}/{name}"]
        for name, target in self._interpreter.links:
            options += ["--symlink", target, f"/{name}"]
        for device in _DEVICES:
            options += ["--dev-bind", own_device(device) if self._root else device, device]
        return [self._bubblewrap, *options, "--remount-ro", "/", "--chdir", directory]


class Landlocked:
    """One process that can open no other files, and make no other system calls, than it needs.

    It sees sizes and names of files; started as root, it is a user without rights.
    """

    def __init__(self, interpreter: Interpreter, confined: bool = True):
        """Prepares the jail.

        Args:
          interpreter: What is run.
          confined: False for limits alone.
        """
        self._interpreter, self._confined = interpreter, confined
        self._root = os.geteuid() == 0
        ScratchDirectory.clear_leftovers()
        self._readable = [path for one in interpreter.readable for path in one.entries()]
        self._reads_all = self._root and not all(map(_others_may_read, self._readable))

    @contextlib.contextmanager
    def start(self, job: Job, bounds: Bounds) -> Iterator[Running]:
        interpreter = self._interpreter
        modules = link_all(interpreter.modules)
        uid = _private_uid() if self._root else None
        settings: dict[str, Any] = {"uid": uid, "reads_all": self._reads_all}
        if self._confined:
            listed = [readable.path for readable in interpreter.readable if readable.hidden]
            readable = [(path, True) for path in (*self._readable, modules)]
            readable += [(path, False) for path in listed]
            code = system_calls.compile_filter(namespaces=False, processes=False)
            settings |= {"landlock": readable, "filter": code, "judge": os.getpid()}
        payload = _payload(job, bounds, [modules], private=self._root, **settings)
        with (
            ScratchDirectory.create(uid) as scratch,
            _descriptors(payload) as (files, reader, writer, token),
        ):
            command = _python(interpreter, files[0], writer)
            with _process(command, (*files, writer), scratch.path) as (process, complaints):
                os.close(writer)
                running = Running(process, reader, token, complaints, scratch=scratch)
                try:
                    yield running
                finally:
                    running.kill()


def _payload(
    job: Job, bounds: Bounds, paths: list[str], private: bool, **settings: Any
) -> dict[str, Any]:
    """Returns what the harness reads.

    Args:
      paths: Directories of named modules.
      private: The user has no other processes that the kernel would count.
      **settings: Of the jail.
    """
    others = 0 if private else _tasks_of_user(os.geteuid())
    limits = {
        "CPU": (bounds.cpu_seconds, bounds.cpu_seconds + 1),  # a signal that names the cause
        "AS": (bounds.memory_bytes,) * 2,
        "FSIZE": (bounds.file_bytes,) * 2,
        "NOFILE": (bounds.open_files,) * 2,
        "NPROC": (others + bounds.processes + _OTHER_PROCESSES,) * 2,
        "SIGPENDING": (bounds.processes,) * 2,
        "CORE": (1, 1),  # nor does the machine's handler of crashes start, as it would for 0
    }
    none = {"uid": None, "reads_all": False, "landlock": None, "filter": None, "judge": None}
    own = {"parts": job.parts, "imports": job.imports, "paths": paths}
    return {**none, **settings, **own, "limits": limits}


@contextlib.contextmanager
def _descriptors(
    payload: Mapping[str, Any], *others: bytes
) -> Iterator[tuple[list[int], int, int, bytes]]:
    """Yields files in memory with the payload and the others, a channel's ends, and a token."""
    token = secrets.token_hex(16).encode()
    with contextlib.ExitStack() as opened:
        files = []
        for content in (marshal.dumps((_HARNESS, {**payload, "token": token})), *others):
            file = opened.enter_context(os.fdopen(os.memfd_create("job"), "w+b", buffering=0))
            file.write(content)
            file.seek(0)
            files.append(file.fileno())
        # Sockets, which no program can open once more by their names in /proc. They are of packets,
        # among which there are none out of band.
        ends = socket.socketpair(type=socket.SOCK_SEQPACKET)
        reader, writer = (end.detach() for end in ends)
        opened.callback(os.close, reader)
        os.set_blocking(reader, False)
        yield files, reader, writer, token


@contextlib.contextmanager
def _process(
    command: Sequence[str], descriptors: Sequence[int], directory: str
) -> Iterator[tuple[subprocess.Popen[bytes], Any]]:
    with tempfile.TemporaryFile() as complaints:
        yield (
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=complaints,
                pass_fds=descriptors,
                cwd=directory,
                env=_ENVIRONMENT,
                start_new_session=True,
            ),
            complaints,
        )


def _python(interpreter: Interpreter, job: int, verdict: int) -> list[str]:
    return [interpreter.executable, "-s", "-S", "-c", _BOOT, str(job), str(verdict)]


def _private_uid() -> int:
    return _FIRST_UID + ((os.getpid() & 0x3FFFFF) << 8) + next(_numbers) % 256


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])


def _others_may_read(path: str) -> bool:
    """Returns whether a user who owns nothing can read a path."""
    try:
        while os.stat(path).st_mode & (stat.S_IXOTH if os.path.isdir(path) else stat.S_IROTH):
            if path == "/":
                return True
            path = os.path.dirname(path)
    except OSError:
        pass
    return False


def _tasks_of_user(uid: int) -> int:
    """Returns the processes and threads of a user on the whole machine."""
    total = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid == uid:
                total += len(os.listdir(f"/proc/{name}/task"))
    return total
