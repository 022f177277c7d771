"""Limits of memory and processes for all that a program starts, by the kernel's control groups.

Version 1 has a hierarchy for memory and another for processes; version 2 has one for both.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pathlib
import re
import time
from typing import NamedTuple

_PREFIX = "generated-code"
# The processor is optional: with it, many processes get as much of it as one.
_CONTROLLERS, _OPTIONAL = ("memory", "pids", "cpu"), "cpu"
_numbers = itertools.count()


class ControlGroup(NamedTuple):
    """The directories of a group; a process that writes 0 to their `cgroup.procs` joins it."""

    directories: tuple[pathlib.Path, ...]

    def remove(self) -> None:
        """Removes the group, whose processes have ended; the kernel may take a moment to see it."""
        for directory in self.directories:
            wait = 0.0002
            while directory.exists() and wait < 1:
                with contextlib.suppress(OSError):
                    directory.rmdir()
                    break
                time.sleep(wait)
                wait *= 2

    def ran_out_of_memory(self) -> bool:
        """Returns whether the kernel ended a process for want of memory."""
        for directory in self.directories:
            for name in ("memory.events", "memory.oom_control"):
                text = _read(directory / name)
                if re.search(r"^oom_kill [1-9]", text, re.MULTILINE):
                    return True
        return False


def create(memory_bytes: int, processes: int) -> ControlGroup | None:
    """Creates a group below or beside that of this process; None where there is none to be had.

    Args:
      memory_bytes: What its processes may use together, with their files in memory.
      processes: Processes and threads.
    """
    parents = find_parents()
    name = f"{_PREFIX}-{os.getpid()}-{next(_numbers)}"
    group = ControlGroup(tuple(dict.fromkeys(parent / name for parent in parents)))
    if not parents:
        return None
    try:
        for directory in group.directories:
            directory.mkdir()
        limits = {
            "memory.limit_in_bytes": memory_bytes,
            "memory.max": memory_bytes,
            "memory.memsw.limit_in_bytes": memory_bytes,
            "memory.swap.max": 0,
            "pids.max": processes,
        }
        for file, most in limits.items():
            for directory in group.directories:
                if (directory / file).exists():
                    (directory / file).write_text(str(most))
    except OSError:
        group.remove()
        return None
    return group


def clear_leftovers() -> None:
    """Removes groups of judges that were killed."""
    for parent in find_parents():
        for directory in parent.glob(f"{_PREFIX}-*"):
            pid = directory.name.removeprefix(f"{_PREFIX}-").partition("-")[0]
            if not os.path.exists(f"/proc/{pid}"):
                with contextlib.suppress(OSError):
                    directory.rmdir()


@functools.cache
def find_parents(process: pathlib.Path = pathlib.Path("/proc/self")) -> tuple[pathlib.Path, ...]:
    """Returns where groups may be created: for memory and for processes; empty if they cannot.

    Args:
      process: The kernel's directory of the process whose own groups are looked for.
    """
    own = dict(line.split(":", 2)[1:] for line in _read(process / "cgroup").splitlines())
    mounts = _mounts(process)
    found = []
    for controller in _CONTROLLERS:
        needed = controller != _OPTIONAL
        [kind, *_] = [kind for kind in own if controller in kind.split(",")] or [""]
        version_1 = bool(kind)
        root, place = mounts.get(controller if version_1 else "", (None, None))
        if not (needed or version_1):
            continue  # in version 2 it comes with the others, or not at all
        if root is None or place is None or kind not in own:
            return ()
        start = place / os.path.relpath(own[kind], root)
        if ".." in start.parts:  # this process is outside what is mounted
            return ()
        parent = start if version_1 else _delegating(start, place, controller)
        if parent is not None and os.access(parent, os.W_OK):
            found.append(parent)
        elif needed:
            return ()
    return tuple(found)


def _delegating(start: pathlib.Path, top: pathlib.Path, controller: str) -> pathlib.Path | None:
    """Returns the nearest group of version 2 whose children have a controller."""
    for group in (start, *start.parents):
        if controller in _read(group / "cgroup.subtree_control").split():
            return group
        if group == top:
            return None
    return None


def _mounts(process: pathlib.Path) -> dict[str, tuple[str, pathlib.Path]]:
    """Returns controllers, '' for version 2 -> the group at the mount's root, and its place."""
    found = {}
    for line in _read(process / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        root, place = before.split()[3:5]
        kind, _, options = after.split()[:3]
        if kind == "cgroup2":
            found[""] = root, pathlib.Path(place)
        elif kind == "cgroup":
            for controller in _CONTROLLERS:
                if controller in options.split(","):
                    found[controller] = root, pathlib.Path(place)
    return found


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
