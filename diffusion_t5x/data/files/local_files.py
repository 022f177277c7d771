"""Users' own files as SeqIO data sources, chosen by gin, instead of TFDS.

Each file is read once, checked, and written as a file of TensorFlow records to the cache (see
`file_cache.cache_dir`); training reads those. A generator over the users' files would be simpler,
but a run could not resume from it at the exact example: tf.data saves the position of its own
readers, and none of a Python generator. And the check has to read everything before a run starts
anyway.
The price is disk: as much as the text itself, unzipped. The cache may be emptied at any time; a
file that changed, or is read with other settings, is checked anew. A check that was killed goes
on with the first file that it had not finished.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import glob
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

import gin
from diffusion_t5x.data.embedded import file_cache
from diffusion_t5x.data.files import readers
from diffusion_t5x.data.files.readers import Reader, Record, Refusal

# Raise it whenever the records of the same file change.
FORMAT_VERSION = 1
REASONS_SHOWN = 3

# Names of the sources that files may be given for.
_KNOWN: set[str] = set()


@gin.configurable
@dataclasses.dataclass(frozen=True)
class LocalFiles:
    """Which files to read, for which sources, and how.

    A setting holds for all sources; under a source's name as a gin scope, for that source alone,
    e.g. `mc4_en/local_files.LocalFiles.documents = 'blank_line'`.

    Attributes:
      files: source -> split -> files, a path or glob or a tuple of them; for two parallel files,
        language -> files. E.g. `{'mbpp': {'test': '/data/mbpp.jsonl'}}`. A source that knows how
        its published file is split takes that file's path instead of splits.
      documents: what a document of plain text is: a 'line', or what stands between blank lines
        ('blank_line').
      text_field: where JSON lines and Parquet files of documents have the text; None for the
        source's own.
      columns: the languages of a tab-separated file's columns; None for the source's order.
    """

    files: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    documents: str = "line"
    text_field: str | None = None
    columns: tuple[str, str] | None = None


def settings_of(name: str) -> LocalFiles:
    """The settings of a source.

    Raises:
      ValueError: if files are given for a source that does not exist; it offers the nearest.
    """
    with gin.config_scope(name):
        settings = LocalFiles()
    if not isinstance(settings.files, Mapping):
        raise ValueError(
            f"LOCAL_FILES = {settings.files!r}; expected {{source: {{split: files}}}}."
        )
    for given in settings.files:
        if given not in _KNOWN:
            near = difflib.get_close_matches(given, _KNOWN, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"LOCAL_FILES names {given!r}, which no task reads; {hint}"
                f"Known: {', '.join(sorted(_KNOWN))}."
            )
    return settings


def _matches(pattern: Any, setting: str) -> list[str]:
    """Sorted paths.

    Raises:
      ValueError: if `pattern` is no text, or matches nothing; it offers the nearest file name.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"{setting} = {pattern!r}; expected a path, a glob or a tuple of them.")
    if "://" in pattern:
        paths = tf.io.gfile.glob(pattern)
    else:
        whole = os.path.isfile(pattern)  # a path may hold the characters of a glob
        paths = [pattern] if whole else glob.glob(pattern, recursive=True)
        paths = [path for path in paths if os.path.isfile(path)]
    if paths:
        return sorted(paths)
    directory, name = os.path.split(pattern)
    there = os.listdir(directory or ".") if os.path.isdir(directory or ".") else []
    near = difflib.get_close_matches(name, there, n=1)
    hint = f"; did you mean {os.path.join(directory, near[0])!r}?" if near else "."
    raise ValueError(f"{setting} = {pattern!r} matches no file{hint}")


def find_files(
    spec: Any, setting: str, languages: tuple[str, str] | None = None
) -> list[tuple[str, ...]]:
    """The files of one split, those that belong together in one tuple.

    Args:
      spec: a pattern, several, or language -> patterns.
      setting: its name, for errors.
      languages: of parallel text, in the order of a tuple's files.

    Raises:
      ValueError: if `spec` is malformed, a pattern matches nothing, or the languages have
        different numbers of files.
    """
    if isinstance(spec, Mapping):
        if languages is None or sorted(spec) != sorted(languages):
            expected = (
                f"{{{languages[0]!r}: FILES, {languages[1]!r}: FILES}}"
                if languages
                else ("a path, a glob or a tuple of them")
            )
            raise ValueError(f"{setting} = {dict(spec)!r}; expected {expected}.")
        columns = [
            [path for [path] in find_files(spec[name], f"{setting}[{name!r}]")]
            for name in languages
        ]
        if len(columns[0]) != len(columns[1]):
            raise ValueError(
                f"{setting}: {languages[0]!r} has {len(columns[0])} files, but {languages[1]!r} "
                f"has {len(columns[1])}; parallel files must correspond."
            )
        return list(zip(*columns, strict=True))
    patterns = [spec] if isinstance(spec, str) else spec
    if not isinstance(patterns, Sequence) or not patterns:
        raise ValueError(f"{setting} = {spec!r}; expected a path, a glob or a tuple of them.")
    found = [path for pattern in patterns for path in _matches(pattern, setting)]
    return [(path,) for path in dict.fromkeys(found)]


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was found in files that belong together.

    Attributes:
      path: their records, in TensorFlow's record format.
      records: how many.
      refused: how many were refused.
      refusals: the first few of those, with file, line and reason.
    """

    path: str
    records: int
    refused: int
    refusals: tuple[str, ...]


def _example(record: Record) -> bytes:
    """A record as a serialised `tf.train.Example`."""
    features = {
        name: tf.train.Feature(
            bytes_list=tf.train.BytesList(
                value=[text.encode() for text in ([value] if isinstance(value, str) else value)]
            )
        )
        for name, value in record.items()
    }
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def _write_records(reader: Reader, files: tuple[str, ...], split: str | None, path: str) -> Checked:
    """Writes the good records of files to `path`, and counts."""
    kept, refused, refusals = 0, 0, []
    with tf.io.TFRecordWriter(path) as writer:
        for item in reader.read(files, split):
            if isinstance(item, Refusal):
                refused += 1
                if refused <= REASONS_SHOWN:
                    refusals.append(str(item))
            else:
                writer.write(_example(item))
                kept += 1
    return Checked(path, kept, refused, tuple(refusals))


def check_files(reader: Reader, files: tuple[str, ...], split: str | None = None) -> Checked:
    """Reads files that belong together once, and keeps their good records in the file_cache.

    Raises:
      ValueError: if a file cannot be read at all; see `file_readers`.
    """
    stats = [tf.io.gfile.stat(path) for path in files]
    versions = [
        (path if "://" in path else os.path.abspath(path), stat.length, stat.mtime_nsec)
        for path, stat in zip(files, stats, strict=True)
    ]
    key = json.dumps([FORMAT_VERSION, repr(reader), split, versions])
    name = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()

    def write(summary: pathlib.Path) -> None:
        records = summary.with_suffix(".tfrecord")
        checked = _write_records(reader, files, split, str(records))
        # The records first: where there is a summary there are records.
        os.replace(records, summary.parent.parent / records.name)
        values = [checked.records, checked.refused, checked.refusals]
        summary.write_text(json.dumps(values), encoding="utf-8")
        print(f"checked {' and '.join(files)}: {checked.records:,} records", flush=True)

    summary = file_cache.cached_file(f"local_files/{name}.json", write)
    kept, refused, refusals = json.loads(summary.read_text(encoding="utf-8"))
    return Checked(str(summary.with_suffix(".tfrecord")), kept, refused, tuple(refusals))


class _CheckedRecords(seqio.TFExampleDataSource):
    """Reads files of records whose paths are known, so that none is taken for a glob."""

    def list_shards(self, split: str) -> Sequence[str]:
        return list(self._split_to_filepattern[split])


def _description(fields: Mapping[str, str]) -> dict[str, Any]:
    text = tf.io.FixedLenFeature([], tf.string)
    texts = tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True)
    return {name: texts if kind == readers.TEXTS else text for name, kind in fields.items()}


class LocalFilesDataSource(seqio.DataSource):
    """Records of users' files where gin names some for this source, else those of `otherwise`.

    What is read is decided when it is asked for, not when a task is registered. Records are
    strings and vectors of strings under the names of the reader's fields, from either.

    Attributes:
      name: that the files are given under, in `LocalFiles.files`.
    """

    def __init__(
        self,
        name: str,
        make_reader: Callable[[LocalFiles], Reader],
        otherwise: seqio.DataSource | None = None,
        to_record: Callable[[Mapping[str, Any]], Mapping[str, tf.Tensor]] | None = None,
        default_files: Callable[[], Mapping[str, Any]] | None = None,
        splits: Sequence[str] = (),
    ):
        """Nothing is read yet.

        Args:
          name: names the files in `LocalFiles.files`.
          make_reader: settings -> reader.
          otherwise: read where there are no files.
          to_record: turns an example of `otherwise` into a record.
          default_files: where there is no `otherwise`: split -> files to read instead; raises
            ValueError where there are none, saying what to do.
          splits: the splits of `default_files`.
        """
        super().__init__(splits=splits)
        _KNOWN.add(name)
        self.name = name
        self._make_reader, self._otherwise, self._to_record = make_reader, otherwise, to_record
        self._default_files = default_files

    @property
    def splits(self) -> Sequence[str]:
        """Those that files are given for, or those of `otherwise`."""
        settings = settings_of(self.name)
        if self.name not in settings.files:
            return self._otherwise.splits if self._otherwise else self._splits
        given = settings.files[self.name]
        if isinstance(given, Mapping):
            return tuple(given)
        return tuple(getattr(self._make_reader(settings), "split_ranges", {}))

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """Sharded by files, else by examples."""
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        """A file of records for each file, or pair of files; or the shards of `otherwise`."""
        checked = self._check(split)
        if checked is None:
            return self._otherwise.list_shards(split)
        return [part.path for part in checked]

    def num_input_examples(self, split: str) -> int | None:
        """Records in the split."""
        checked = self._check(split)
        if checked is None:
            return self._otherwise.num_input_examples(split)
        return sum(part.records for part in checked)

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **kwargs: Any,
    ) -> tf.data.Dataset:
        """Records of a split; in the order of files and lines unless shuffled.

        Raises:
          ValueError: if there are no files where some are needed, none matches, or no record is
            good.
        """
        checked = self._check(split)
        if checked is None:
            dataset = self._otherwise.get_dataset(split, shuffle, seed, shard_info, **kwargs)
            return dataset.map(self._to_record) if self._to_record else dataset
        source = _CheckedRecords(
            {split: [part.path for part in checked]},
            _description(self._make_reader(settings_of(self.name)).fields),
            cycle_length=16 if shuffle else 1,
        )
        return source.get_dataset(split, shuffle, seed, shard_info)

    def _check(self, split: str) -> tuple[Checked, ...] | None:
        """The checked files of a split; None where `otherwise` is read."""
        settings = settings_of(self.name)
        reader, kept_split = self._make_reader(settings), None
        if self.name in settings.files:
            given, setting = settings.files[self.name], f"LOCAL_FILES[{self.name!r}]"
        elif self._otherwise is not None:
            return None
        else:
            given, setting = self._default_files(), f"the files of {self.name!r}"
        if isinstance(given, Mapping):
            if split not in given:
                raise ValueError(f"{setting} lacks the split {split!r}; it has {sorted(given)}.")
            given, setting = given[split], f"{setting}[{split!r}]"
        elif split in getattr(reader, "split_ranges", {}):
            kept_split = split
        else:
            raise ValueError(f"{setting} = {given!r}; expected {{split: files}}.")
        files = find_files(given, setting, getattr(reader, "languages", None))
        return _check_split(_Split(f"{self.name}:{split}", reader, tuple(files), kept_split))


@dataclasses.dataclass(frozen=True, eq=False)
class _Split:
    """The files of a split and how they are read; equal if that is written equally."""

    name: str
    reader: Reader
    files: tuple[tuple[str, ...], ...]
    kept_split: str | None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Split) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


@functools.cache
def _check_split(split: _Split) -> tuple[Checked, ...]:
    """Checks the files of a split, once in a process, and says what was refused.

    Raises:
      ValueError: if no record is good.
    """
    checked = tuple(check_files(split.reader, files, split.kept_split) for files in split.files)
    kept = sum(part.records for part in checked)
    refused = sum(part.refused for part in checked)
    reasons = [reason for part in checked for reason in part.refusals][:REASONS_SHOWN]
    shown = "".join(f"\n  {reason}" for reason in reasons)
    if not kept:
        raise ValueError(
            f"{split.name}: none of {refused:,} records of {len(checked)} files is good{shown}"
        )
    print(f"{split.name}: {kept:,} records, {refused:,} refused{shown}", flush=True)
    return checked
