"""Finished work in files: each is whole or absent, and carries the key of the settings it is for.

A key is the digest of everything that decides a result. A file of another key is ignored, and a
damaged one (cut off, or not what was written) is reported and ignored, so that its work is done
once more.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from diffusion_t5x.runtime.files import write_atomically

Path = str | os.PathLike[str]


def digest(settings: Any) -> str:
    """Returns the key of settings, a JSON value: 16 hexadecimal digits."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def read_object(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file, or None if the file is absent or damaged."""
    if (text := _read(path)) is None:
        return None
    if (value := _parse(text)) is None:
        report(path)
    return value


def load(path: Path, key: str) -> dict[str, Any] | None:
    """Returns what `save` wrote for this key, or None if the file is absent or damaged."""
    value = read_object(path)
    return value if value is not None and value.get("digest") == key else None


def save(path: Path, key: str, values: Mapping[str, Any], indent: int | None = None) -> None:
    """Writes `values`, a JSON object, and their key as its 'digest', on the first process."""
    if jax.process_index() == 0:
        write_atomically(path, json.dumps({**values, "digest": key}, indent=indent))


def load_text(path: Path, key: str) -> str | None:
    """Returns what `save_text` wrote for this key, or None if the file is absent or damaged.

    A text is damaged if its length is not the one that its first line gives.
    """
    if (content := _read(path)) is None:
        return None
    header, _, text = content.partition("\n")
    value = _parse(header)
    if value is None or value.get("characters") != len(text):
        report(path)
        return None
    return text if value.get("digest") == key else None


def save_text(path: Path, key: str, text: str) -> None:
    """Writes a text after a line with its key and length, on the first process."""
    if jax.process_index() == 0:
        header = json.dumps({"digest": key, "characters": len(text)})
        write_atomically(path, f"{header}\n{text}")


def _read(path: Path) -> str | None:
    try:
        return epath.Path(path).read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _parse(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def report(path: Path) -> None:
    """Prints that a file is damaged."""
    print(f"{os.fspath(path)} is damaged; its work is done once more.", flush=True)
