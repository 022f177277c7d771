"""TFDS data sets as SeqIO sources that prepare themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import seqio
import tensorflow as tf


class TfdsDataSource(seqio.TfdsDataSource):
    """SeqIO's, which asks a data set for its shards before it is there; this one prepares it first.

    Nothing is looked up, read or downloaded before a split is asked for.
    """

    def _prepare(self) -> None:
        """Downloads and prepares the data set unless it is there.

        Raises:
          RuntimeError: if that fails; the message says where it was looked for.
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
        """The files of a split."""
        self._prepare()
        return super().list_shards(split)

    def num_input_examples(self, split: str) -> int | None:
        """Examples of a split."""
        self._prepare()
        return super().num_input_examples(split)

    def get_dataset(self, *args: Any, **kwargs: Any) -> tf.data.Dataset:
        """See `seqio.DataSource`."""
        self._prepare()
        return super().get_dataset(*args, **kwargs)
