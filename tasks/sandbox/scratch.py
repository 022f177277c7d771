"""Directories on this machine's disk for programs that have no file system of their own."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import functools
import itertools
import os
import pathlib
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_PREFIX, _LOCK = "generated-code-", "lock"
MOST_FILES = 1024
_MOST_DEPTH = 100
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_numbers = itertools.count()


class ScratchDirectory(NamedTuple):
    """A directory of one job, below that of this process, which is locked while it lives."""

    path: str

    @classmethod
    @contextlib.contextmanager
    def create(cls, uid: int | None) -> Iterator[ScratchDirectory]:
        """Creates a directory that a user owns, None for oneself, and removes it afterwards."""
        path = own().joinpath(str(next(_numbers)))
        path.mkdir(mode=0o700)
        try:
            if uid is not None:
                os.chown(path, uid, uid)
            yield cls(str(path))
        finally:
            _remove(path)

    @staticmethod
    def clear_leftovers() -> None:
        """Removes the directories of processes that were killed."""
        for directory in pathlib.Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):
                found = directory.lstat()
                if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                    continue  # others may write to the same place
                lock = os.open(directory / _LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(directory)
                finally:
                    os.close(lock)

    def usage(self, pid: int, file_bytes: int) -> tuple[int, int, bool]:
        """Counts the bytes and the files of a process, also those that it removed and still holds.

        Args:
          pid: The process.
          file_bytes: What a removed file that it maps may have; the kernel does not tell.

        Returns:
          Both, and False if the directory changed meanwhile, so that some may be missing.

        Raises:
          OSError: if a directory cannot be looked into.
        """
        sizes: dict[int, int] = {}  # by inode
        whole = True
        top = os.open(self.path, _DIRECTORY)
        try:
            for found in _walk(top):
                if isinstance(found, os.stat_result):
                    sizes[found.st_ino] = found.st_blocks * 512
                elif found:
                    whole = False
                else:
                    sizes[-len(sizes)] = file_bytes
                if len(sizes) > MOST_FILES:
                    break
        finally:
            os.close(top)
        # One that has ended, and whose end is not known yet, has no files.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(FileNotFoundError):
                    found = os.stat(f"/proc/{pid}/fd/{name}")
                    if stat.S_ISREG(found.st_mode) and not found.st_nlink:
                        sizes[found.st_ino] = found.st_blocks * 512
            with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
                for line in maps:
                    if line.endswith("(deleted)\n"):
                        sizes.setdefault(int(line.split(maxsplit=5)[4]), file_bytes)
        return sum(sizes.values()), len(sizes), whole


def _walk(directory: int, depth: int = 0) -> Iterator[os.stat_result | bool]:
    """Yields what is below an open directory; for what vanished whether it was a directory.

    It goes through descriptors, so that nothing above or outside is taken for what is below.

    Raises:
      OSError: if a directory cannot be looked into, or is too deep.
    """
    if depth > _MOST_DEPTH:
        raise OSError(errno.ENAMETOOLONG, "too many directories in each other")
    for name in os.listdir(directory):
        try:
            found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            yield False
            continue
        yield found
        if stat.S_ISDIR(found.st_mode):
            try:
                child = os.open(name, _DIRECTORY, dir_fd=directory)
            except (FileNotFoundError, NotADirectoryError):
                yield True
                continue
            try:
                yield from _walk(child, depth + 1)
            finally:
                os.close(child)


def own() -> pathlib.Path:
    """Returns this process's directory, which others may enter and not list."""
    return _of_process(os.getpid())


@functools.cache
def _of_process(pid: int) -> pathlib.Path:
    # It gets the name that others look for once it is locked.
    new = tempfile.mkdtemp(prefix=f".{_PREFIX}")
    os.chmod(new, 0o711)
    lock = open(os.path.join(new, _LOCK), "xb")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
    _locks.append(lock)
    path = pathlib.Path(new).with_name(os.path.basename(new)[1:])
    os.rename(new, path)
    # A child of this process has one of its own.
    atexit.register(lambda: _remove(path) if os.getpid() == pid else None)
    return path


def link_all(paths: tuple[str, ...]) -> str:
    """Returns a directory with symbolic links to paths of different names, and nothing else."""
    return _linked(own(), paths)


@functools.cache
def _linked(place: pathlib.Path, paths: tuple[str, ...]) -> str:
    directory = tempfile.mkdtemp(prefix="links-", dir=place)
    os.chmod(directory, 0o755)
    for path in paths:
        os.symlink(path, os.path.join(directory, os.path.basename(path)))
    return directory


def own_device(path: str) -> str:
    """Returns a device like that at `path`, so that a program that touches it touches no other.

    Where root may not make one it is `path`.
    """
    return _device(own(), path)


@functools.cache
def _device(place: pathlib.Path, path: str) -> str:
    new = place / "devices" / os.path.basename(path)
    try:
        new.parent.mkdir(exist_ok=True)
        os.mknod(new, stat.S_IFCHR | 0o666, os.stat(path).st_rdev)
        os.chmod(new, 0o666)
        new.open("rb").close()
    except OSError:
        return path
    return str(new)


_locks: list[BinaryIO] = []  # unlocked when this process ends


def _remove(directory: pathlib.Path) -> None:
    """Removes a directory, also one that is too deep, or that its owner may not look into."""
    try:
        shutil.rmtree(directory)
    except (OSError, RecursionError):
        for command in (["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
            subprocess.run([*command, "--", directory], check=False, capture_output=True)
