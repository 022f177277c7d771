"""The embedded text as SeqIO data sources, generated once, in splits that do not overlap."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import seqio
import tensorflow as tf

from diffusion_t5x.data.embedded import code, file_cache, python, translation

Record = Mapping[str, Any]
SPLITS = ("train", "validation", "test")
# The number of validation examples per thousand, and also of test examples.
HELD_OUT = 50


def split_of(key: str) -> str:
    """Returns the split of an example by the text that must not occur in two, and by that alone."""
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % 1000
    if number < HELD_OUT:
        return "validation"
    return "test" if number < 2 * HELD_OUT else "train"


def _by_split(name: str, generate: Callable[[], Iterator[Record]], key: str) -> dict[str, str]:
    """Returns the path of each split's cached JSON lines, whose order is a hash's.

    Args:
      name: The name of the family, and the beginning of the files' names.
      generate: Yields the records of all splits; called if a file is missing.
      key: The field of which no text may occur in two splits.
    """

    def order(record: Record) -> bytes:
        text = json.dumps(record, sort_keys=True).encode()
        return hashlib.blake2b(text, digest_size=8, salt=b"order").digest()

    @functools.cache
    def records() -> dict[str, list[Record]]:
        by_split: dict[str, list[Record]] = {split: [] for split in SPLITS}
        for record in sorted(generate(), key=order):
            by_split[split_of(record[key])].append(record)
        return by_split

    def file(split: str) -> str:
        return str(
            file_cache.cached_file(
                f"{name}-{split}.jsonl", lambda path: file_cache.write_jsonl(path, records()[split])
            )
        )

    return {split: file(split) for split in SPLITS}


def translation_files(source_locale: str, target_locale: str) -> dict[str, str]:
    """Returns split -> file of what `translation.generate` yields."""
    generate = functools.partial(translation.generate, source_locale, target_locale)
    return _by_split(f"translation-{source_locale}-{target_locale}", generate, "source")


# Each returns split -> file of what a generator yields.
question_files = functools.partial(_by_split, "questions", python.generate_questions, "context")
code_files = functools.partial(_by_split, "code", code.generate, "text")
prose_files = functools.partial(_by_split, "prose", python.generate_prose, "text")
source_files = functools.partial(_by_split, "source", python.generate_source, "text")


class EmbeddedDataSource(seqio.FunctionDataSource):
    """The examples of a cached family, whose fields are strings or vectors of strings."""

    def __init__(self, files: Callable[[], Mapping[str, str]]):
        self.files = files  # generates the files if they are missing, and returns split -> path
        super().__init__(dataset_fn=self._dataset, splits=SPLITS)

    def _dataset(
        self, split: str, shuffle_files: bool = False, seed: int | None = None
    ) -> tf.data.Dataset:
        del shuffle_files, seed  # a split is one file; examples are shuffled later
        records = file_cache.read_jsonl(self.files()[split])
        columns = {name: [record[name] for record in records] for name in records[0]}
        lists = {name: values for name, values in columns.items() if isinstance(values[0], list)}
        columns |= {name: tf.ragged.constant(values) for name, values in lists.items()}
        return tf.data.Dataset.from_tensor_slices(columns)
