"""The items of a checkpoint as Orbax handles them: arrays and data positions, with checksums."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import TYPE_CHECKING, Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from diffusion_t5x import paths
from diffusion_t5x.checkpointing import integrity
from diffusion_t5x.checkpointing.reading import CheckpointMismatchError

if TYPE_CHECKING:
    from diffusion_t5x.data.datasets import DatasetIterator


class _Handler(ocp.CheckpointHandler):
    """A handler that writes the stamp and checksums of what it saved.

    Attributes:
      stamp: What `integrity.write_stamp` writes with the save that is next or in progress.
    """

    def __init__(self, checksums: bool):
        super().__init__()
        self._checksums = checksums
        self.stamp: dict[str, Any] = {}

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        integrity.write_stamp(directory, self.stamp)
        if self._checksums:
            integrity.write_checksums(directory)


class ArraysHandler(_Handler, ocp.StandardCheckpointHandler):
    """Orbax's handler of arrays, with checksums."""


# Orbax finds the handler of an item by the type of its arguments.
@ocp.args.register_with_handler(ArraysHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class ArraysArgs(ocp.args.StandardSave):
    """The arrays to save."""


class DatasetHandler(_Handler):
    """A handler of data positions, one per data shard, each written by a process that reads it.

    TensorFlow writes and reads them; it knows no buckets, so that copies on this machine serve.
    """

    def save(self, directory: epath.Path, args: DatasetArgs) -> None:
        if not paths.is_remote(directory):
            args.iterator.save(str(directory / "shard"))
            return
        with tempfile.TemporaryDirectory() as copy:
            args.iterator.save(f"{copy}/shard")
            for file in epath.Path(copy).iterdir():
                (directory / file.name).write_bytes(file.read_bytes())

    def restore(self, directory: epath.Path, args: DatasetArgs) -> None:
        count = len(list(directory.glob("shard-*.index")))
        # With a record beside it, a position is translated.
        if count != args.iterator.num_shards and not list(directory.glob("shard-*.json")):
            raise CheckpointMismatchError(
                f"{directory} has the positions of {count} data shards, but this mesh has "
                f"{args.iterator.num_shards} data-parallel shards; use a mesh with {count}, on any "
                "number of processes, or set SaveCheckpointConfig.save_dataset = False to start "
                "from the beginning of the data."
            )
        if not paths.is_remote(directory):
            args.iterator.restore(str(directory / "shard"))
            return
        with tempfile.TemporaryDirectory() as copy:
            for file in directory.glob("shard-*"):
                epath.Path(copy, file.name).write_bytes(file.read_bytes())
            args.iterator.restore(f"{copy}/shard")


@ocp.args.register_with_handler(DatasetHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class DatasetArgs(ocp.args.CheckpointArgs):
    """The iterator of this process whose position is saved."""

    iterator: DatasetIterator


def restore_position(path: str, iterator: DatasetIterator) -> None:
    """Moves an iterator to the position saved in a checkpoint, or says that none was saved.

    Raises:
      CheckpointMismatchError: If the checkpoint has another number of data shards.
    """
    item = epath.Path(path) / "dataset"
    if item.exists():
        DatasetHandler(checksums=False).restore(item, DatasetArgs(iterator))
    elif jax.process_index() == 0:
        print(f"{path} was saved without a position in the data, which start from the beginning.")
