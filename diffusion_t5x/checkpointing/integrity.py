"""Checksums of checkpoints: written with each item, verified before it is restored.

Orbax notices a truncated checkpoint but not every changed byte: it keeps no checksum of the data of
arrays, so one flipped bit is one wrong parameter. Each item (`params`, `average`, `optimizer`,
`dataset`) therefore gets a `checksums.json` with the size and CRC-32 of its files, before Orbax
renames the checkpoint to its final name: no finished checkpoint lacks it, however the run ends. An
item without the file (T5X's, or saved with `checksums = False`) is accepted unverified.

Each item also gets a stamp, `checkpoint.json`, with the step and the items of its checkpoint and a
number drawn for this one save. So an item that is missing or of another one is found as well.
"""

from __future__ import annotations

import concurrent.futures
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from diffusion_t5x.interop import hf_models, t5x_checkpoints
from diffusion_t5x.runtime import orbax_buckets

PREFIX = "checkpoint"
ITEMS = ("params", "average", "optimizer", "dataset")
NAME = re.compile(rf"^{PREFIX}_(-?\d+)$")
MAX_STEP = 2**31 - 1
STAMP = "checkpoint.json"
CHECKSUMS = "checksums.json"
DAMAGED = "damaged"
_READ_BYTES = 1 << 22
_THREADS = 8


class DamagedCheckpointError(ValueError):
    """A file or item of a checkpoint is missing, or not what was saved; the message names it."""


def _checksum(file: epath.Path) -> tuple[int, str]:
    """Returns the size in bytes and the CRC-32."""
    size, crc = 0, 0
    with file.open("rb") as stream:
        while data := stream.read(_READ_BYTES):
            size, crc = size + len(data), zlib.crc32(data, crc)
    return size, f"{crc:08x}"


def _files(directory: epath.Path, prefix: str = "") -> list[str]:
    """Returns the paths of all files, relative to `directory`."""
    names = []
    for child in sorted(directory.iterdir()):
        name = f"{prefix}{child.name}"
        names += _files(child, f"{name}/") if child.is_dir() else [name]
    return names


def write_checksums(item: epath.Path) -> None:
    """Writes `checksums.json` for all files of an item that is complete but not yet renamed."""
    names = _files(item)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(lambda name: _checksum(item / name), names)
        listed = {
            name: {"bytes": size, "crc32": crc}
            for name, (size, crc) in zip(names, sums, strict=True)
        }
    (item / CHECKSUMS).write_text(json.dumps(listed, indent=1) + "\n")


def write_stamp(item: epath.Path, stamp: Mapping[str, Any]) -> None:
    """Writes the stamp of an item: 'step', 'items' and the 'save' that they are of."""
    (item / STAMP).write_text(json.dumps(dict(stamp)) + "\n")


def save_number(path: str | epath.Path) -> str | None:
    """Returns the number drawn when a checkpoint was saved: another at the same path has another.

    It is None for one without stamps.
    """
    try:
        return str(json.loads((epath.Path(path) / "params" / STAMP).read_text())["save"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def has_valid_name(path: str | epath.Path) -> bool:
    """Returns False for `checkpoint_{number}` where the number is no step, as in checkpoint_04."""
    name = epath.Path(path).name
    match = NAME.match(name)
    return match is None or name == f"{PREFIX}_{min(abs(int(match[1])), MAX_STEP)}"


def is_foreign(path: str) -> bool:
    """Returns whether a checkpoint is T5X's, or a model of Hugging Face's."""
    return t5x_checkpoints.is_t5x_checkpoint(path) or hf_models.is_model(path)


def verify(path: str | epath.Path, items: Sequence[str], *, alone: bool = False) -> None:
    """Checks that a checkpoint has its own items, and compares files with their checksums.

    All processes of a run call this together. Each reads its share of the files and names the
    damage in it; all of them raise if one found damage.

    Args:
      path: The checkpoint; one of T5X or Hugging Face's has nothing to compare with.
      items: The items whose files are compared.
      alone: Whether other items may be missing.

    Raises:
      FileNotFoundError: If the checkpoint was deleted meanwhile.
      DamagedCheckpointError: If an item is missing or of another checkpoint, or a file is missing,
        truncated or changed.
    """
    path = epath.Path(path)
    damage = []
    if jax.process_index() == 0 and not is_foreign(str(path)):
        damage = _find_misfits(path, items if alone else ITEMS)
    damage += [line for item in items for line in _find_damage(path / item)]
    found = np.ravel(multihost_utils.process_allgather(np.array(bool(damage))))  # [processes]
    if not found.any():
        return
    # A link to nothing does not exist either, and is damage.
    if not path.exists() and path.name not in (child.name for child in path.parent.iterdir()):
        raise FileNotFoundError(f"{path} was deleted.")
    for process in np.flatnonzero(found):
        if process != jax.process_index():
            damage.append(f"  process {process} found damage; its output names the files")
    raise DamagedCheckpointError(f"{path} is damaged:\n" + "\n".join(damage))


def _find_misfits(path: epath.Path, needed: Sequence[str]) -> list[str]:
    """Returns a line for each thing wrong with the name of a checkpoint or the set of its items."""
    if not path.is_dir():
        return ["  it is no directory"]
    if not has_valid_name(path):
        return [f"  its name is not {PREFIX}_ and a step from 0 to {MAX_STEP}, such as {PREFIX}_40"]
    present = [item for item in ITEMS if (path / item).is_dir() and any((path / item).iterdir())]
    stamps: dict[str, Any] = {}
    for item in present:
        try:
            if (path / item / STAMP).exists():
                stamp = json.loads((path / item / STAMP).read_text())
                stamps[item] = str(stamp["save"]), int(stamp["step"]), list(stamp["items"])
        except (ValueError, TypeError, KeyError, IsADirectoryError) as error:
            return [f"  {item}/{STAMP} is not readable: {error!r}"]
    recorded = {"params", *(item for _, _, saved in stamps.values() for item in saved)}
    if not stamps:
        recorded |= _recorded_by_orbax(path)
    damage = [f"  {item} is missing" for item in ITEMS if item in recorded & {*needed} - {*present}]
    if stamps and len({stamps.get(item, ("",))[0] for item in present}) > 1:
        of = (f"{item} of step {stamps[item][1]}" for item in stamps)
        unknown = (f"{item} of an unknown one" for item in present if item not in stamps)
        damage.append(f"  its items are of different checkpoints: {', '.join([*of, *unknown])}")
    elif (match := NAME.match(path.name)) and any(
        step != int(match[1]) for _, step, _ in stamps.values()
    ):
        damage.append(f"  it is the checkpoint of step {next(iter(stamps.values()))[1]}")
    return damage


def _recorded_by_orbax(path: epath.Path) -> set[str]:
    """Returns the items of a checkpoint without stamps, as far as Orbax's own file says."""
    try:
        return set(json.loads((path / "_CHECKPOINT_METADATA").read_text())["item_handlers"])
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def _find_damage(item: epath.Path) -> list[str]:
    """Returns a line for each damaged file in this process's share of an item."""
    if not (item / CHECKSUMS).exists():
        return []
    try:
        files = _listed_files(item)
    except (ValueError, TypeError, KeyError, AttributeError, IsADirectoryError) as error:
        return [f"  {item.name}/{CHECKSUMS} is not readable: {error!r}"]
    share = files[jax.process_index() :: jax.process_count()]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        damages = list(pool.map(lambda file: _damage_of_file(item, *file), share))
    return [
        f"  {item.name}/{name} {damage}"
        for (name, _, _), damage in zip(share, damages, strict=True)
        if damage is not None
    ]


def _listed_files(item: epath.Path) -> list[tuple[str, int, str]]:
    """Returns (name, bytes, CRC-32) of an item's files, largest first, so that shares are even."""
    listed = json.loads((item / CHECKSUMS).read_text())
    files = [(name, int(entry["bytes"]), str(entry["crc32"])) for name, entry in listed.items()]
    return sorted(files, key=lambda file: (-file[1], file[0]))


def _damage_of_file(item: epath.Path, name: str, size: int, crc: str) -> str | None:
    file = item / name
    if not file.is_file():
        return "is missing"
    # A wrong length shows without reading the file.
    if (length := file.stat().length) != size:
        return f"has {length} bytes, expected {size}"
    if (found := _checksum(file)[1]) != crc:
        return f"has the CRC-32 {found}, expected {crc}"
    return None


def set_aside(path: epath.Path) -> epath.Path:
    """Renames a directory to `{name}.damaged`, numbered if that is taken; returns the new path.

    Nothing is deleted, and the step of a checkpoint can be saved again. Only one process may call
    this.
    """
    number, target = 1, path.with_name(f"{path.name}.{DAMAGED}")
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.{DAMAGED}_{number}")
    return orbax_buckets.move(path, target)


def set_aside_unreadable_metrics(directory: epath.Path) -> None:
    """Sets aside the metrics of a run's checkpoints that are not valid JSON, and prints which.

    Orbax reads the metrics of all checkpoints when it opens a run, and fails on such a file; a
    checkpoint without metrics counts as the worst. Only one process may call this.
    """
    for file in directory.glob("*/metrics/metrics"):
        try:
            json.loads(file.read_text())
        except ValueError:
            kept = set_aside(file.parent)
            print(f"{file} is not readable and is ignored for the best checkpoint; kept as {kept}.")
