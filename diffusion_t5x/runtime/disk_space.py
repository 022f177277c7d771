"""A full disk stops a command with a message that names it, and an exit code of its own."""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import jax

from diffusion_t5x.runtime.exit_codes import DISK_FULL

# No room, a quota that is used up, and a file larger than the shell's limit allows.
_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFull(SystemExit):
    """Something could not be written for lack of room; `message` says what and where."""

    def __init__(self, message: str):
        super().__init__(DISK_FULL)
        self.message = message


def find_full_disk(error: BaseException | None) -> tuple[str, BaseException] | None:
    """What the system said of a full disk, and the error that told, of all that led to `error`."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = str(error).lower()
        for code in _CODES:
            # TensorFlow and TensorStore tell of it in words alone.
            if getattr(error, "errno", None) == code or os.strerror(code).lower() in text:
                return os.strerror(code), error
        error = error.__cause__ or error.__context__
    return None


def _disk_of(directory: str) -> tuple[pathlib.Path, int]:
    """Where the disk of a directory is mounted, and how many bytes are free on it."""
    path = pathlib.Path(directory).absolute()
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    while not path.is_mount():
        path = path.parent
    return path, free


@contextmanager
def stops_when_full(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Turns the error of a full disk, in whatever library, into a message and `DiskFull`.

    Where several processes run, this one ends at once: an ordinary exit would wait for the others,
    which wait for it.

    Args:
      directory: that is written to.
    """
    try:
        yield
    except Exception as error:
        if (found := find_full_disk(error)) is None:
            raise
        (words, cause), (disk, free) = found, _disk_of(os.fspath(directory))
        message = (
            f"{directory} cannot be written to: {words}; {free:,} bytes are free on the disk "
            f"mounted at {disk}. What was finished before is whole. Make room (fewer checkpoints "
            "stay with checkpoints.SaveCheckpointConfig.keep) and start the same command again.\n"
            f"It was told of by {type(cause).__name__}: {str(cause).strip()[:500]}"
        )
        with suppress(OSError):  # the log may be on the same disk
            print(message, file=sys.stderr, flush=True)
        if jax.process_count() > 1:
            sys.stdout.flush()
            os._exit(DISK_FULL)
        raise DiskFull(message) from error
