"""Runs a program and its tests in the process that they get; only a jail starts it.

The jail passes this module's code, with the job, to an interpreter that has no other module of this
project. The harness gives up what it can, runs the parts in order as one module, and writes to a
descriptor `READY` when it begins and the job's token when the last part is through. What ends,
raises or hangs before that has not passed. It imports little, since each program pays for it.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

READY, PASSED, FAILED = b"R", b"+", b"-"
MODULE = "program"
MOST_WORDS = 300
# What stands in filters for the process that installs them.
PID = 0x7E57ED1D

_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 8, 22, 38
_CAPSET = {"x86_64": 126, "aarch64": 91}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_SELF = 444, 445, 446
_CAP_DAC_READ_SEARCH = 2
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REFER = 1, 2, 4, 8, 1 << 13


def main(job: dict[str, Any], verdict: int) -> NoReturn:
    """Runs a job, as `jails` describes it; the verdict goes to a descriptor."""
    # What C libraries read of it stays; the program sees none.
    os.environ._data.clear()  # type: ignore[attr-defined]
    sys.argv = sys.orig_argv[:] = [MODULE]
    sys.path += job["paths"]
    _add_built_in_names()
    if job["uid"] is not None:
        _become(job["uid"], job["reads_all"])
    if job["landlock"] is not None:
        _die_with(job["judge"])
    null = os.open(
        os.devnull, os.O_RDWR
    )  # Landlock would forbid to ask it whether it is a terminal
    _limit(job["limits"])
    if job["landlock"] is not None:
        _landlock(job["landlock"], ".")
        _filter(job["filter"])
    # Not before: a thread that a module starts would not be confined.
    for name in job["imports"]:
        __import__(name)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    _run(job["parts"], job["token"], verdict)


def _add_built_in_names() -> None:
    """Adds names such as `exit`, as starting the module `site` would, which takes long."""
    import site

    site.setquit()
    site.setcopyright()
    site.sethelper()


def _run(parts: list[tuple[str, str]], token: bytes, verdict: int) -> NoReturn:
    """Runs the parts, and ends the process with a verdict."""
    # The program may replace functions, and continue in a child.
    write, leave, getpid, this = os.write, os._exit, os.getpid, os.getpid()
    module = type(sys)(MODULE)
    module.__file__ = parts[0][0]  # which `inspect` wants, and the loader reads
    setattr(module, "__loader__", _Source(parts[0][1]))  # noqa: B010
    sys.modules[MODULE] = module
    write(verdict, READY)
    try:
        for name, text in parts:
            exec(compile(text, name, "exec", dont_inherit=True), module.__dict__)
        answer = token + PASSED
    except BaseException as error:
        words = ": ".join(filter(None, (type(error).__name__, _words(error))))
        answer = token + FAILED + words.encode("utf-8", "replace")[:MOST_WORDS]
    if getpid() == this:
        write(verdict, answer)
    leave(0)


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:
        return ""


class _Source:
    """Lets `inspect` find the lines of the program, as of a module's loader."""

    def __init__(self, text: str):
        self._text = text

    def get_source(self, name: str) -> str:
        return self._text


def _limit(limits: dict[str, tuple[int, int]]) -> None:
    """Sets resource limits by the ends of their names, e.g. `{'CPU': (3, 4)}`."""
    import resource

    for name, most in limits.items():
        what = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(what)[1]
        allowed = [n if hard == resource.RLIM_INFINITY else min(n, hard) for n in most]
        resource.setrlimit(what, (allowed[0], allowed[1]))


def _become(uid: int, reads_all: bool) -> None:
    """Becomes a user without rights; one that `reads_all` may open what Landlock allows."""
    if reads_all:
        _prctl(_PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if reads_all:
        import struct

        header = struct.pack("=Ii", 0x20080522, 0)
        rights = struct.pack(
            "=IIIIII", 1 << _CAP_DAC_READ_SEARCH, 1 << _CAP_DAC_READ_SEARCH, *[0] * 4
        )
        _call(_CAPSET[os.uname().machine], header, rights)


def _die_with(parent: int) -> None:
    """Ends with the judge; a change of user, which comes before, would undo it."""
    import signal

    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _landlock(readable: list[tuple[str, bool]], scratch: str) -> None:
    """Forbids all files but those `readable`, and `scratch`; also signals, TCP and sockets.

    Args:
      readable: Paths, and whether all below them may be read, or their names listed alone.
      scratch: The directory that may be written to.
    """
    import struct

    version = _call(_LANDLOCK_CREATE, None, 0, 1)
    # Rights came with versions: 13, then REFER, TRUNCATE, (network), IOCTL_DEV.
    files = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    # Without REFER nothing moves between directories, where whoever counts files may miss it.
    own = files & ~_REFER
    rules = struct.pack("=QQQ", files, 0b11 * (version >= 4), 0b11 * (version >= 6))
    rule_set = _call(_LANDLOCK_CREATE, rules, 8 + 8 * (version >= 4) + 8 * (version >= 6), 0)
    allowed = {path: _EXECUTE | _READ_FILE | _READ_DIR for path, whole in readable if whole}
    allowed |= {path: _READ_DIR for path, whole in readable if not whole}
    devices = {"/dev/null": _READ_FILE | _WRITE_FILE}
    devices |= dict.fromkeys(("/dev/random", "/dev/urandom"), _READ_FILE)
    for path, rights in {**allowed, **devices, scratch: own}.items():
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        possible = files if os.path.isdir(path) else _EXECUTE | _READ_FILE | _WRITE_FILE
        _call(_LANDLOCK_ADD, rule_set, 1, struct.pack("=Qi", rights & possible, fd), 0)
        os.close(fd)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _call(_LANDLOCK_SELF, rule_set, 0)
    os.close(rule_set)


def _filter(code: bytes) -> None:
    """Installs a filter of system calls; `PID` in it becomes this process."""
    import ctypes
    import struct

    placed = code.replace(struct.pack("=I", PID), struct.pack("=I", os.getpid()))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

    program = Program(len(placed) // 8, placed)
    _prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(program))


def _prctl(option: int, *values: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    arguments = [ctypes.c_ulong(value) for value in (*values, *[0] * (4 - len(values)))]
    if libc.prctl(option, *arguments):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def _call(number: int, *arguments: Any) -> int:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}")
    return result
