"""A cache on disk for generated files, safe for several processes at once."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import babel

from diffusion_t5x import paths

CACHE_VARIABLE = "DIFFUSION_T5X_CACHE"
# Raise it whenever generated data change.
GENERATOR_VERSION = 3


def cache_dir() -> pathlib.Path:
    """Returns `$DIFFUSION_T5X_CACHE`, or `~/.cache/diffusion_t5x` if it is not set."""
    default = "~/.cache/diffusion_t5x"
    path = paths.as_path(os.environ.get(CACHE_VARIABLE) or default, CACHE_VARIABLE)
    if paths.is_remote(path):
        raise ValueError(f"{CACHE_VARIABLE} = '{path}'; expected a directory of this machine.")
    return pathlib.Path(path)


def _note(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}.checksum")


def checksum(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(path: pathlib.Path) -> bool:
    """Returns whether a file is as it was generated; says so if it is damaged."""
    if not path.exists() or not _note(path).exists():  # an older version wrote no note
        return False
    if _note(path).read_bytes() == checksum(path).encode():
        return True
    print(f"{path} is damaged; it is made again.", flush=True)
    return False


def cached_file(name: str, write: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """Returns the path of a generated file, and generates it if it is missing or damaged.

    Generated files depend on the versions of Python, of CLDR and of the generator, so the directory
    is named after these. A file appears whole or not at all: `write` is called with another path.
    A note beside it has its checksum. The name may be one in directories.
    """
    version = f"{platform.python_version()}/{babel.__version__}/{GENERATOR_VERSION}"
    digest = hashlib.blake2b(version.encode(), digest_size=6).hexdigest()
    path = cache_dir() / digest / name
    if _is_whole(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        temporary = pathlib.Path(directory) / path.name
        write(temporary)
        note = _note(temporary)
        note.write_text(checksum(temporary))
        os.replace(note, _note(path))
        os.replace(temporary, path)
    return path


def write_jsonl(path: pathlib.Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the objects of a JSON lines file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]
