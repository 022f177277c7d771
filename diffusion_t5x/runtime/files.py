"""Files that are whole or absent, and lines of JSON."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file so that it is whole or absent, whenever the process ends.

    Args:
      path: The file; its directory is created.
      content: The content; text is encoded as UTF-8.

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


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the lines of a JSONL file that have a `step`; damaged lines are left out.

    Args:
      path: The file; no lines if it does not exist.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
