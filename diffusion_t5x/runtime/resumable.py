"""Finished work in files: each is whole or absent, and carries the key of the settings it is for.

A key is the digest of everything that decides a result. A file of another key is ignored, and a
damaged one (not what was written, by its checksum) is reported and ignored, so that its work is
done once more.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from diffusion_t5x.runtime.files import write_atomically

Path = str | os.PathLike[str]


def digest(settings: Any) -> str:
    """Returns the key of settings, a JSON value: 16 hexadecimal digits."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def report(path: Path) -> None:
    """Prints that a file is damaged."""
    print(f"{os.fspath(path)} is damaged; its work is done once more.", flush=True)


def read_object(path: Path, on_damage: Callable[[Path], None] = report) -> dict[str, Any] | None:
    """Returns what `save_object` wrote, or None if the file is absent or damaged."""
    if (text := _read(path)) is None:
        return None
    if (value := _parse(text)) is not None:
        checksum = value.pop("checksum", None)  # which older versions did not write
        if checksum in (None, digest(value)):
            return value
    on_damage(path)
    return None


def save_object(path: Path, values: Mapping[str, Any], indent: int | None = None) -> None:
    """Writes `values`, a JSON object, and their 'checksum', on the first process."""
    if jax.process_index() == 0:
        value = json.loads(json.dumps(dict(values)))  # keys that are numbers become texts
        text = json.dumps({**value, "checksum": digest(value)}, indent=indent)
        write_atomically(path, text + "\n")


def load(path: Path, key: str) -> dict[str, Any] | None:
    """Returns what `save` wrote for this key, or None if the file is absent or damaged."""
    value = read_object(path)
    return value if value is not None and value.get("digest") == key else None


def save(path: Path, key: str, values: Mapping[str, Any], indent: int | None = None) -> None:
    """Writes `values`, a JSON object, and their key as its 'digest', on the first process."""
    save_object(path, {**values, "digest": key}, indent)


def load_text(path: Path, key: str) -> str | None:
    """Returns what `save_text` wrote for this key, or None if the file is absent or damaged."""
    if (content := _read(path)) is None:
        return None
    header, _, text = content.partition("\n")
    value = _parse(header)
    if value is None or value.get("checksum") != digest(text):
        report(path)
        return None
    return text if value.get("digest") == key else None


def save_text(path: Path, key: str, text: str) -> None:
    """Writes a text after a line with its key and checksum, on the first process."""
    if jax.process_index() == 0:
        header = json.dumps({"digest": key, "checksum": digest(text)})
        write_atomically(path, f"{header}\n{text}")


def file_checksum(path: Path) -> str:
    """Returns the checksum of a file's bytes."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
