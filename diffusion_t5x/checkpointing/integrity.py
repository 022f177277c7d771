"""Whether a checkpoint is as it was written: the size and CRC-32 of each file, kept beside them.

Orbax finds a checkpoint that is cut short, but not all that is changed: the bytes of its arrays
have no checksum, so that one wrong bit is one wrong parameter. Each of our items (`params`,
`optimizer`, `dataset`) therefore has a `checksums.json`. It is written before Orbax renames the
whole checkpoint to its name, so no finished checkpoint of ours is without it, whenever the run is
killed. Where it is missing (a checkpoint of T5X, or of an older version) there is nothing to
compare, and the item is taken as it is.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

CHECKSUMS = "checksums.json"
DAMAGED = "damaged"
_BLOCK_BYTES = 1 << 22
_THREADS = 8
# What a process tells the others of the damage it found, in bytes.
_MESSAGE_BYTES = 2048
# Files that this process has found whole: where a checkpoint is chosen and then restored, it is
# read for its checksums once.
_whole: dict[str, tuple[Any, int, str]] = {}


class DamagedCheckpointError(ValueError):
    """A file of a checkpoint is missing, cut short or changed; the message names it."""


def _checksum(file: epath.Path) -> tuple[int, str]:
    """Size in bytes and CRC-32."""
    size, crc = 0, 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, f"{crc:08x}"


def _files(directory: epath.Path, prefix: str = "") -> list[str]:
    """Paths of all files, relative to `directory`."""
    names = []
    for child in sorted(directory.iterdir()):
        name = f"{prefix}{child.name}"
        names += _files(child, f"{name}/") if child.is_dir() else [name]
    return names


def write_checksums(directory: epath.Path) -> None:
    """Writes `checksums.json` of all files in an item's directory that is not yet in use."""
    names = _files(directory)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(lambda name: _checksum(directory / name), names)
        listed = {
            name: {"bytes": size, "crc32": crc}
            for name, (size, crc) in zip(names, sums, strict=True)
        }
    (directory / CHECKSUMS).write_text(json.dumps(listed, indent=1) + "\n")


def _damage_of_file(item: epath.Path, name: str, size: int, crc: str) -> str | None:
    file = item / name
    if not file.exists():
        return "is missing"
    version = _version(file)
    if version is not None and _whole.get(str(file)) == (version, size, crc):
        return None
    # The length tells of a cut without reading what is left.
    if (there := file.stat().length) != size:
        return f"has {there} bytes, expected {size}"
    if (found := _checksum(file)[1]) != crc:
        return f"has the CRC-32 {found}, expected {crc}"
    _whole[str(file)] = version, size, crc
    return None


def _version(file: epath.Path) -> tuple[int, int, int] | None:
    """What changes when a local file is written to; None for one that is elsewhere."""
    try:
        stat = os.stat(file)
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _listed(item: epath.Path) -> list[tuple[str, int, str]]:
    """(name, bytes, CRC-32) of an item's files, the largest first.

    Raises:
      ValueError: if `checksums.json` is not what was written.
    """
    try:
        listed = json.loads((item / CHECKSUMS).read_text())
        files = [(name, int(entry["bytes"]), str(entry["crc32"])) for name, entry in listed.items()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"is not readable: {error!r}") from error
    return sorted(files, key=lambda file: (-file[1], file[0]))


def _find_damage(path: epath.Path, items: Sequence[str]) -> list[str]:
    """Lines that say which files are damaged; each process looks at its share of them."""
    lines, jobs = [], []
    for name in items:
        item = path / name
        if not (item / CHECKSUMS).exists():
            continue
        try:
            files = _listed(item)
        except ValueError as error:
            lines.append(f"  {name}/{CHECKSUMS} {error}")
            continue
        jobs += [(item, *file) for file in files[jax.process_index() :: jax.process_count()]]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for job, damage in zip(
            jobs, pool.map(lambda job: _damage_of_file(*job), jobs), strict=True
        ):
            if damage is not None:
                lines.append(f"  {job[0].name}/{job[1]} {damage}")
    return lines


def _of_all_processes(lines: list[str]) -> list[str]:
    """The lines of all processes, so that all of them come to the same conclusion."""
    if jax.process_count() == 1:
        return lines
    text = "\n".join(lines).encode()[:_MESSAGE_BYTES]
    message = np.zeros(_MESSAGE_BYTES, np.uint8)
    message[: len(text)] = np.frombuffer(text, np.uint8)
    told = multihost_utils.process_allgather(message)
    texts = [row.tobytes().rstrip(b"\0").decode("utf-8", "replace") for row in np.asarray(told)]
    return sorted({line for text in texts for line in text.splitlines()})


def verify(path: str | epath.Path, items: Sequence[str]) -> None:
    """Compares the files of a checkpoint's items with their checksums, where it has some.

    All processes of a run call this together and share the work.

    Raises:
      FileNotFoundError: if the whole checkpoint went away meanwhile.
      DamagedCheckpointError: if a file is missing, cut short or changed.
    """
    path = epath.Path(path)
    lines = _of_all_processes(_find_damage(path, items))
    if not lines:
        return
    if not path.exists():
        raise FileNotFoundError(f"{path} is gone.")
    raise DamagedCheckpointError(f"{path} is damaged:\n" + "\n".join(lines))


def set_aside(path: epath.Path) -> epath.Path:
    """Renames a damaged directory to `{name}.damaged`, or with a number if that is taken.

    Nothing is deleted, and a checkpoint's step can be saved again. One process alone calls this.
    """
    number, target = 1, path.with_name(f"{path.name}.{DAMAGED}")
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.{DAMAGED}_{number}")
    return path.rename(target)


def forget_unreadable_metrics(directory: epath.Path) -> None:
    """Renames the metrics of a run's checkpoints that Orbax could not read, and says so.

    Orbax reads those of all checkpoints, which say which is the best, before anything else; one
    that has none is kept. One process alone calls this.
    """
    for file in directory.glob("*/metrics/metrics"):
        try:
            json.loads(file.read_text())
        except ValueError:
            kept = set_aside(file.parent)
            print(f"{file} is not readable, so it does not count for the best; kept as {kept}.")
