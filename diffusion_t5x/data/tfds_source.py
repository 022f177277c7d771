"""TFDS data sets as SeqIO data sources that prepare themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import seqio
import tensorflow as tf


class TfdsDataSource(seqio.TfdsDataSource):
    """A `seqio.TfdsDataSource` that prepares its data set before it reads it.

    Nothing is looked up, read or downloaded until a split is read.
    """

    def _prepare(self) -> None:
        """Downloads and prepares the data set unless it is prepared already.

        Raises:
          RuntimeError: if that fails; the message names the directory of the data set.
        """
        builder = self.tfds_dataset.builder
        if builder.is_prepared():
            return
        try:
            builder.download_and_prepare()
        except Exception as error:
            raise RuntimeError(
                f"TFDS data set {self.tfds_dataset.name!r} is not in {builder.data_dir}, and could "
                f"not be prepared: {type(error).__name__}: {error}. --tfds_data_dir names another "
                "directory; LOCAL_FILES reads your own files instead."
            ) from error

    def list_shards(self, split: str) -> Sequence[str]:
        self._prepare()
        return super().list_shards(split)

    def num_input_examples(self, split: str) -> int | None:
        self._prepare()
        return super().num_input_examples(split)

    def get_dataset(self, *args: Any, **kwargs: Any) -> tf.data.Dataset:
        self._prepare()
        return super().get_dataset(*args, **kwargs)
