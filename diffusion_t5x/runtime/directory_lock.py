"""A lock on a directory that two commands must not write to, which no dead process leaves behind.

On a disk it is the system's own (`flock`), released by the kernel however a process ends. A bucket
has none: there it is a lease, an object that its holder writes anew every few seconds.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from diffusion_t5x import paths

FILE = ".lock"
RENEWAL_SECONDS = 10.0
# Systems that cannot lock files say one of these.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)

_held: set[int] = set()  # file descriptors


class InUseError(RuntimeError):
    """Another process writes to the directory; the message says which, and since when."""


def _close_in_child() -> None:
    while _held:
        os.close(_held.pop())  # else the lock would last as long as a forked process


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def hold(directory: str, setting: str) -> Iterator[None]:
    """Keeps other processes from writing to a directory, which is created.

    All processes of a run call this together; the first one has the lock. Where neither the file
    system nor its kind knows locks, a line says so.

    Args:
      directory: On a disk, or in a bucket.
      setting: The name under which users set the directory.

    Raises:
      InUseError: If another process has the lock.
    """
    path = epath.Path(directory) / FILE
    lock: _Flock | _Lease | None = None
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            lock = (_Lease if paths.is_remote(path) else _Flock)(path)
        except Exception as failed:
            error = failed
    try:
        _raise_on_all(error, directory, setting)
        yield
    finally:
        if lock is not None:
            lock.release()


def check(directory: str, setting: str) -> None:
    """Raises InUseError if another process writes to a directory on a disk; writes nothing.

    A lease is looked at only by `hold`, since that may take `RENEWAL_SECONDS`.
    """
    path, error = epath.Path(directory) / FILE, None
    if jax.process_index() == 0 and not paths.is_remote(path) and path.exists():
        try:
            _Flock(path, create=False).release()
        except OSError as failed:  # of any other, `hold` says what is wrong
            error = failed if isinstance(failed, BlockingIOError) else None
    _raise_on_all(error, directory, setting)


def _raise_on_all(error: Exception | None, directory: str, setting: str) -> None:
    """Raises the first process's error on all, since the others would wait for it."""
    failed = error is not None
    if jax.process_count() > 1:
        failed = bool(np.any(multihost_utils.process_allgather(np.array(failed))))
    if not failed:
        return
    if error is not None and not isinstance(error, BlockingIOError):
        raise error
    holder = f" ({error})" if error else "; the output of process 0 says which"
    raise InUseError(
        f"{setting} = {directory!r} is being written to by another process{holder}. Two would mix "
        f"their files: wait for it, end it, or set another {setting}."
    )


def _describe(**more: Any) -> str:
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": now, **more})


def _held_by(text: str) -> BlockingIOError:
    try:
        found = json.loads(text)
        words = f"host {found['host']}, process {found['process']}, since {found['since']}"
    except (ValueError, TypeError, KeyError):
        words = "an unknown one"
    return BlockingIOError(words)


class _Flock:
    """The system's lock on a file, which holds a description of the process."""

    def __init__(self, path: epath.Path, create: bool = True):
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        # Reading is enough to lock, and all that `check` may do to another user's file.
        flags = os.O_RDWR | os.O_CREAT if create else os.O_RDONLY
        self._file = os.open(path, flags | os.O_CLOEXEC, 0o666)
        _held.add(self._file)
        try:
            self._lock(path)
            if create:
                os.ftruncate(self._file, 0)
                os.pwrite(self._file, _describe().encode(), 0)
        except BaseException:
            self.release()
            raise

    def _lock(self, path: epath.Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held_by(os.pread(self._file, 4096, 0).decode(errors="replace")) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"{path} cannot be locked ({error.strerror}): see to it that no other process "
                "writes to this directory.",
                flush=True,
            )

    def release(self) -> None:
        if self._file in _held:
            _held.remove(self._file)
            os.close(self._file)


class _Lease:
    """An object that a thread writes anew again and again; one that stays as it is has no holder.

    Two processes that start within the same second are told apart by whose object stays. Clocks are
    not compared: who finds a lease waits for more than two renewals, unless its process was one of
    this host and is gone.
    """

    def __init__(self, path: epath.Path):
        self._path, self._token = path, secrets.token_hex(8)
        self._since = _describe(token=self._token)
        self._over = threading.Event()
        if (found := self._read()) and not _is_gone_here(found):
            seconds = 2.5 * RENEWAL_SECONDS
            print(
                f"{path} is of {_held_by(found)}: waits {seconds:g} s to see if it lives.",
                flush=True,
            )
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                time.sleep(RENEWAL_SECONDS / 10)
                if (now := self._read()) != found:
                    if now:
                        raise _held_by(now)
                    break
        self._write(0)
        time.sleep(RENEWAL_SECONDS / 10)
        if self._is_others(text := self._read()):
            raise _held_by(text)
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _read(self) -> str:
        try:
            return self._path.read_text()
        except Exception:  # of any library
            return ""

    def _write(self, number: int) -> None:
        self._path.write_text(json.dumps({**json.loads(self._since), "renewed": number}))

    def _is_others(self, text: str) -> bool:
        return bool(text) and self._token not in text

    def _renew(self) -> None:
        number = 0
        while not self._over.wait(RENEWAL_SECONDS):
            if self._is_others(text := self._read()):
                print(f"{self._path} was taken by another process ({_held_by(text)}).", flush=True)
                os._exit(1)
            number += 1
            try:
                self._write(number)
            except Exception as error:  # the next time may do better
                print(f"{self._path} could not be renewed: {error}", flush=True)

    def release(self) -> None:
        self._over.set()
        self._thread.join()
        if not self._is_others(self._read()):
            self._path.unlink(missing_ok=True)


def _is_gone_here(text: str) -> bool:
    """Returns whether the process of a lease was one of this host and has ended."""
    try:
        found = json.loads(text)
        if found["host"] == socket.gethostname():
            os.kill(int(found["process"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return False
