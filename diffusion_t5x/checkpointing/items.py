"""The items of a checkpoint as Orbax writes them: arrays and data positions, with checksums."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import orbax.checkpoint as ocp
from etils import epath

from diffusion_t5x.checkpointing import integrity
from diffusion_t5x.checkpointing.fit import CheckpointMismatchError


class SavesPosition(Protocol):
    """An iterator that can write and read its position.

    Attributes:
      num_shards: data shards, over all processes.
    """

    num_shards: int

    def save(self, path: str) -> None:
        """Writes files that begin with `path`."""

    def restore(self, path: str) -> None:
        """Goes on where `save(path)` was called."""


class ArraysHandler(ocp.StandardCheckpointHandler):
    """Orbax's own, which adds checksums to what it wrote."""

    def __init__(self, checksums: bool):
        super().__init__()
        self._checksums = checksums

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        if self._checksums:
            integrity.write_checksums(directory)


# Orbax finds the handler of what is saved by the type of the arguments.
@ocp.args.register_with_handler(ArraysHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class ArraysArgs(ocp.args.StandardSave):
    """The arrays to save."""


class DatasetHandler(ocp.CheckpointHandler):
    """The position of each data shard, written by one process that reads it."""

    def __init__(self, checksums: bool = False):
        self._checksums = checksums

    def save(self, directory: epath.Path, args: DatasetArgs) -> None:
        args.iterator.save(str(directory / "shard"))

    def restore(self, directory: epath.Path, args: DatasetArgs) -> None:
        count = len(list(directory.glob("shard-*.index")))
        if count != args.iterator.num_shards:
            raise CheckpointMismatchError(
                f"{directory} has the data positions of {count} data shards, but this mesh has "
                f"{args.iterator.num_shards} data-parallel parts; start with a mesh that has as "
                "many, on however many processes, or set SaveCheckpointConfig.save_dataset = False "
                "to begin the data anew."
            )
        args.iterator.restore(str(directory / "shard"))

    def finalize(self, directory: epath.Path) -> None:
        if self._checksums:
            integrity.write_checksums(directory)


@ocp.args.register_with_handler(DatasetHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class DatasetArgs(ocp.args.CheckpointArgs):
    """The iterator to save or to move.

    Attributes:
      iterator: of this process.
    """

    iterator: SavesPosition
