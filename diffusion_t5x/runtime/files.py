"""Files that are whole or absent, and lines of JSON."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from etils import epath

from diffusion_t5x import paths


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file so that it is whole or absent, whenever the process ends.

    Its directory is created. An object of a bucket appears only when it is whole.

    Raises:
      OSError: If it cannot be written; `filename` is set.
    """
    target = epath.Path(path)
    content = content.encode() if isinstance(content, str) else content
    if paths.is_remote(target):
        paths.file_system(target).pipe_file(str(target), content)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    try:
        temporary.write_bytes(content)
    except OSError as error:
        error.filename = error.filename or os.fspath(temporary)  # which the system leaves out
        raise
    temporary.replace(target)


@contextmanager
def writing(path: epath.Path) -> Iterator[IO[bytes]]:
    """Opens a large file to write, which appears when the block has ended without an error."""
    if paths.is_remote(path):
        with tempfile.NamedTemporaryFile() as copy:
            yield copy
            copy.flush()
            paths.file_system(path).put_file(copy.name, str(path))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        yield file
    temporary.replace(path)


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the lines of a JSONL file that have a `step`; damaged lines are left out.

    A file that does not exist has no lines.
    """
    file = epath.Path(path)
    if not file.exists():
        return []
    lines = []
    for text in file.read_bytes().decode("utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def rewind_lines(path: str | os.PathLike[str], last_step: int) -> list[dict[str, Any]]:
    """Returns the lines up to `last_step`; the first process drops the others from the file."""
    import jax

    lines = [line for line in read_lines(path) if line["step"] <= last_step]
    if epath.Path(path).exists() and jax.process_index() == 0:
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


class LineLog:
    """The lines of a JSONL file, which the first process alone writes.

    A line is appended at once. In a bucket, where nothing can be appended, the object is written
    anew by `flush`, and every minute: what a killed process had not flushed is lost.

    Attributes:
      lines: The lines so far, of earlier processes too.
    """

    SECONDS = 60.0

    def __init__(self, path: epath.Path, last_step: int):
        """Opens a file, from which lines after `last_step` are dropped."""
        self.lines = rewind_lines(path, last_step)
        self._path, self._written, self._flushed = path, len(self.lines), time.monotonic()

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes a line, which has a `step`."""
        self.lines.append(dict(line))
        if not paths.is_remote(self._path) or time.monotonic() > self._flushed + self.SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the lines that are not written yet."""
        import jax

        new, self._written = self.lines[self._written :], len(self.lines)
        self._flushed = time.monotonic()
        if not new or jax.process_index() != 0:
            return
        if paths.is_remote(self._path):
            write_atomically(self._path, "".join(json.dumps(x) + "\n" for x in self.lines))
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in new))
