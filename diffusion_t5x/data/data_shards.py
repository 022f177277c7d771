"""How global batches are dealt to the data shards, and the data shards to processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class DataLayout:
    """What one process reads of each global batch.

    A global batch is the batches of all data shards, one after the other. Which examples a shard
    has depends on the number of shards alone, so neither the rows of a batch nor their order depend
    on how many processes there are.

    Attributes:
      batch_size: examples per global batch.
      num_shards: data shards; one for each data-parallel part of the mesh.
      shards: those that this process reads, ascending. Several processes read the same one where
        the devices of a data-parallel part belong to several.
      saved: those of `shards` whose position in the data this process saves.

    Raises:
      ValueError: if the batch does not divide among the shards.
    """

    batch_size: int
    num_shards: int = 1
    shards: tuple[int, ...] = (0,)
    saved: tuple[int, ...] = (0,)

    def __post_init__(self):
        if self.batch_size < 1 or self.batch_size % self.num_shards:
            nearest = max(1, round(self.batch_size / self.num_shards)) * self.num_shards
            raise ValueError(
                f"BATCH_SIZE = {self.batch_size} does not divide among the {self.num_shards} data "
                f"shards, one for each data-parallel part of the mesh; the nearest that does: "
                f"{nearest}."
            )

    @property
    def shard_size(self) -> int:
        """Examples of one shard in each global batch."""
        return self.batch_size // self.num_shards

    def local_rows(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """This process's rows of a global batch, shard by shard.

        Args:
          batch: `[batch_size, ...]` each.
        """
        size = self.shard_size
        rows = np.concatenate([np.arange(size) + shard * size for shard in self.shards])
        return {name: value[rows] for name, value in batch.items()}
