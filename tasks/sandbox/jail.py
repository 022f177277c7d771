"""What takes powers away from a process: namespaces, an empty root, Landlock, limits."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import struct
from collections.abc import Mapping, Sequence

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, NEWPID, _NEWNET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT = 1, 2, 4, 32
_MS_BIND, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 4096, 16384, 1 << 18, 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_SELF = 442, 444, 445, 446
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
# No such user has a name or owns a file; the process's number makes it one of its own.
_FIRST_UID = 0x40000000


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: int) -> None:
    _check(_LIBC.prctl(option, value, 0, 0, 0), f"prctl {option}")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    _check(_LIBC.mount(*encoded, ctypes.c_ulong(flags), data.encode()), f"mount {target}")


def die_with_parent(signal_number: int, parent: int) -> None:
    """Has the kernel send a signal when the parent ends.

    Raises:
      ProcessLookupError: if it has ended already.
    """
    _prctl(_PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != parent:
        raise ProcessLookupError(f"parent {parent} has ended")


def unshare(flags: int) -> None:
    """Leaves namespaces of the kernel that are shared with other processes.

    Raises:
      OSError: if the kernel does not allow it.
    """
    _check(_LIBC.unshare(flags), "unshare")


def enter_namespaces(as_root: bool) -> None:
    """New mounts, network, process numbers (of children), names and shared memory.

    Args:
      as_root: as the machine's root; otherwise a user namespace gives the right to do so.

    Raises:
      OSError: if the kernel does not allow it.
    """
    uid, gid = os.geteuid(), os.getegid()
    unshare(_NEWNS | _NEWUTS | _NEWIPC | NEWPID | _NEWNET | (0 if as_root else _NEWUSER))
    if as_root:
        return
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"),
                       ("gid_map", f"{gid} {gid} 1")):  # fmt: skip
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def private_uid(job: int) -> int:
    """A user of nobody's, for one job."""
    return _FIRST_UID + job


def readable_paths() -> list[str]:
    """What an interpreter reads while it runs: its standard library and the system's libraries."""
    paths = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]
    # With its neighbours: the shared libraries that some interpreters bring along.
    paths += [os.path.dirname(os.path.dirname(os.__file__))]
    return [path for path in paths if os.path.isdir(path)]


def _bind_read_only(source: str, target: str, devices: bool) -> None:
    _mount(source, target, None, _MS_BIND | _MS_REC)
    flags = _MS_RDONLY | _MS_NOSUID | (0 if devices else _MS_NODEV)
    attributes = struct.pack("=QQQQ", flags, 0, 0, 0)  # the same bits as MOUNT_ATTR_*
    recursive = 0x8000  # AT_RECURSIVE
    done = _LIBC.syscall(_MOUNT_SETATTR, -1, target.encode(), recursive, attributes, 32)
    if done < 0:  # before Linux 5.12: the mount itself, not what is mounted beneath it
        _mount(source, target, None, _MS_REMOUNT | _MS_BIND | flags)


def build_root(directory: str, scratch_bytes: int, uid: int | None) -> None:
    """Moves into a root of its own: read-only libraries, four devices, and a scratch `/tmp`.

    Args:
      directory: an empty one, which the new root is mounted on.
      scratch_bytes: what `/tmp` may hold.
      uid: owner of `/tmp`; None for whoever this is.

    Raises:
      OSError: if the kernel does not allow it.
    """
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("root", directory, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for path in readable_paths():
        target = directory + path
        if os.path.islink(path):  # /lib is usr/lib on many systems
            os.symlink(os.readlink(path), target)
        elif not os.path.exists(target):  # not within one that is there already
            os.makedirs(target)
            _bind_read_only(path, target, devices=False)
    os.mkdir(f"{directory}/dev")
    for path in _DEVICES:
        os.close(os.open(directory + path, os.O_CREAT | os.O_WRONLY, 0o666))
        _bind_read_only(path, directory + path, devices=True)
    os.mkdir(f"{directory}/tmp")
    owner = "" if uid is None else f",uid={uid},gid={uid}"
    options = f"size={scratch_bytes},nr_inodes=1024,mode=700{owner}"
    _mount("scratch", f"{directory}/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    flags = _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV
    _mount("root", directory, None, flags)
    os.chdir(directory)
    number = _PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(f"pivot_root: its number on {os.uname().machine} is not known here")
    _check(_LIBC.syscall(number, b".", b"."), "pivot_root")
    _check(_LIBC.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/tmp")


def landlock(directory: str) -> None:
    """Forbids all files but libraries, for reading, and `directory`; also signals and TCP.

    Metadata of other files, such as their size, can still be seen.

    Raises:
      OSError: if the kernel has no Landlock.
    """
    version = _check(_LIBC.syscall(_LANDLOCK_CREATE, None, 0, 1), "landlock")
    # Rights came with versions: 13, then REFER, TRUNCATE, (network), IOCTL_DEV.
    files = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    network = 0b11 if version >= 4 else 0
    scoped = 0b11 if version >= 6 else 0
    size = 8 + 8 * (version >= 4) + 8 * (version >= 6)
    rules = struct.pack("=QQQ", files, network, scoped)
    rule_set = _check(_LIBC.syscall(_LANDLOCK_CREATE, rules, size, 0), "landlock")
    execute, write_file, read_file, read_dir = 1, 2, 4, 8
    allowed = {path: execute | read_file | read_dir for path in readable_paths()}
    allowed |= {path: read_file | write_file for path in _DEVICES} | {directory: files}
    for path, access in allowed.items():
        with contextlib.closing(_Path(path)) as file:
            rule = struct.pack("=Qi", access, file.fd)
            _check(_LIBC.syscall(_LANDLOCK_ADD, rule_set, 1, rule, 0), f"landlock {path}")
    _check(_LIBC.syscall(_LANDLOCK_SELF, rule_set, 0), "landlock")
    os.close(rule_set)


class _Path:
    """A file descriptor that names a path and cannot read it."""

    def __init__(self, path: str):
        self.fd = os.open(path, os.O_PATH | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self.fd)


def others_may_enter(path: str) -> bool:
    """Whether a user who owns nothing can read the directory `path`."""
    path = os.path.realpath(path)
    readable = bool(os.stat(path).st_mode & 0o004)
    while readable and os.stat(path).st_mode & 0o001:
        if path == "/":
            return True
        path = os.path.dirname(path)
    return False


def become(uid: int | None) -> None:
    """Gives up the user, where `uid` is another, every capability, and the way back to them."""
    for capability in range(64):
        if _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
            break
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header = struct.pack("=Ii", 0x20080522, 0)
    _check(_LIBC.capset(header, bytes(24)), "capset")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose parents ended."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def limit(limits: Mapping[str, int]) -> None:
    """Sets resource limits by the ends of their names, e.g. `{'CPU': 3}`."""
    for name, most in limits.items():
        what = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(what)[1]
        most_allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most_allowed, most_allowed))


def tasks_of_user(uid: int) -> int:
    """Processes and threads of a user on the whole machine."""
    total = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid == uid:
                total += len(os.listdir(f"/proc/{name}/task"))
    return total


def descendants(proc: int, root: int) -> list[int]:
    """Processes below process `root`, as numbered by the /proc that is open as `proc`."""
    found, waiting = [], [root]
    while waiting:
        parent = waiting.pop()
        for task in _listdir(f"{parent}/task", proc):
            children = [int(pid) for pid in _read(f"{parent}/task/{task}/children", proc).split()]
            found += children
            waiting += children
    return found


def usage(proc: int, pids: Sequence[int]) -> tuple[int, int]:
    """Resident memory, in bytes, and tasks of processes."""
    pages = tasks = 0
    for pid in pids:
        fields = _read(f"{pid}/statm", proc).split()
        pages += int(fields[1]) if fields else 0
        tasks += len(_listdir(f"{pid}/task", proc))
    return pages * os.sysconf("SC_PAGE_SIZE"), tasks


def _read(path: str, proc: int) -> str:
    try:
        fd = os.open(path, os.O_RDONLY, dir_fd=proc)
    except OSError:
        return ""
    try:
        return os.read(fd, 2**16).decode()
    except OSError:
        return ""
    finally:
        os.close(fd)


def _listdir(path: str, proc: int) -> list[str]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=proc)
    except OSError:
        return []
    try:
        return os.listdir(fd)
    except OSError:
        return []
    finally:
        os.close(fd)
