"""Files that are whole or absent, and lines of JSON."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file so that it is whole or absent, whenever the process ends.

    Its directory is created.

    Raises:
      OSError: If it cannot be written; `filename` is set.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        error.filename = error.filename or os.fspath(temporary)  # which the system leaves out
        raise
    os.replace(temporary, path)


def check_writable(directory: str | os.PathLike[str], setting: str) -> None:
    """Writes and removes a small file, so that a long work ends with its results.

    Raises:
      OSError: If the directory cannot be made or written to; the message names the setting.
    """
    probe = pathlib.Path(directory) / ".writable"
    try:
        write_atomically(probe, "")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise type(error)(
            f"{setting} = {os.fspath(directory)} cannot be written to: {error}"
        ) from error


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the lines of a JSONL file that have a `step`; damaged lines are left out.

    A file that does not exist has no lines.
    """
    if not os.path.exists(path):
        return []
    lines = []
    for text in pathlib.Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
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
    if os.path.exists(path) and jax.process_index() == 0:
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines
