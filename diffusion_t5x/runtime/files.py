"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file that is there whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        error.filename = error.filename or os.fspath(temporary)  # the system leaves it out
        raise
    os.replace(temporary, path)


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a JSONL file that tell of steps; one that is cut off or damaged is left out."""
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
