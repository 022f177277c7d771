"""The embedded text as SeqIO data sources, generated once, in splits that do not overlap."""

from __future__ import annotations

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
    """Returns the split of an example, which depends on its own text alone.

    Args:
      key: The text that must not occur in two splits, e.g. the source of a translation.
    """
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % 1000
    if number < HELD_OUT:
        return "validation"
    return "test" if number < 2 * HELD_OUT else "train"


def _by_split(
    name: str, generate: Callable[[], Iterator[Record]], key: Callable[[Record], str]
) -> dict[str, str]:
    """Returns the path of each split's cached JSON lines, whose order is a hash's.

    Args:
      name: The name of the family, and the beginning of the files' names.
      generate: Yields the records of all splits; called if a file is missing.
      key: Returns the part of a record that must not occur in two splits.
    """

    def shuffled(record: Record) -> bytes:
        return hashlib.blake2b(
            json.dumps(record, sort_keys=True).encode(), digest_size=8, salt=b"order"
        ).digest()

    records: dict[str, list[Record]] = {}

    def write(split: str) -> Callable[[Any], None]:
        def write_split(path: Any) -> None:
            if not records:
                for record in sorted(generate(), key=shuffled):
                    records.setdefault(split_of(key(record)), []).append(record)
            file_cache.write_jsonl(path, records[split])

        return write_split

    return {
        split: str(file_cache.cached_file(f"{name}-{split}.jsonl", write(split)))
        for split in SPLITS
    }


def translation_files(source_locale: str, target_locale: str) -> dict[str, str]:
    """Returns split -> file of `{'source', 'target'}`; a source text is in one split only."""
    return _by_split(
        f"translation-{source_locale}-{target_locale}",
        lambda: translation.generate(source_locale, target_locale),
        lambda record: record["source"],
    )


def question_files() -> dict[str, str]:
    """Returns split -> file of `{'context', 'question', 'answer'}`, each context in one split."""
    return _by_split("questions", python.generate_questions, lambda record: record["context"])


def code_files() -> dict[str, str]:
    """Returns split -> file of `{'text', 'code', 'tests'}`; a problem is in one split only."""
    return _by_split("code", code.generate, lambda record: record["text"])


def prose_files() -> dict[str, str]:
    """Returns split -> file of `{'text'}`, docstrings of the standard library."""
    return _by_split("prose", python.generate_prose, lambda record: record["text"])


def source_files() -> dict[str, str]:
    """Returns split -> file of `{'text'}`, functions of the standard library."""
    return _by_split("source", python.generate_source, lambda record: record["text"])


class EmbeddedDataSource(seqio.FunctionDataSource):
    """The examples of a cached family, whose fields are strings or vectors of strings.

    Attributes:
      files: Generates the files if they are missing, and returns split -> path.
    """

    def __init__(self, files: Callable[[], Mapping[str, str]]):
        self.files = files
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
