"""Users' own files as SeqIO data sources, chosen by gin, instead of TFDS.

Each file is read once, checked, and written to the cache as a file of TensorFlow records (see
`records`); training reads those. A generator over the users' files would be simpler, but a run
could not resume from it at the exact example: tf.data saves the position of its own readers, and
not that of a Python generator. The check has to read everything before a run starts anyway.

What is read unshuffled comes from these files, in the order of files and lines. What is shuffled is
dealt into shards first, for tf.data shuffles a thousand examples at a time: in the order of files
the first steps would see the beginning of the first alone. The price is disk space: as much as the
uncompressed text, and twice that for a split that is shuffled. The cache may be emptied at any
time; a file that changed, or is read with other settings, is checked again. An interrupted check
resumes at the first file that it had not finished.
"""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

import gin
from diffusion_t5x import paths
from diffusion_t5x.data.files import readers, records
from diffusion_t5x.data.files.readers import Reader
from diffusion_t5x.data.files.records import Checked
from diffusion_t5x.names import did_you_mean, nearest

# Names of the sources that files may be given for.
_KNOWN: set[str] = set()
# The checked files of each split that this process has read, by all that their records depend on.
_CHECKED: dict[tuple[Any, ...], tuple[Checked, ...]] = {}
# The shards that this process has found whole, by the parts they were dealt from.
_DEALT: dict[tuple[str, ...], list[str]] = {}


@gin.configurable
@dataclasses.dataclass(frozen=True)
class LocalFiles:
    """The files to read, by source, and how to read them.

    A setting applies to all sources; with a source's name as its gin scope, to that source alone,
    e.g. `mc4_en/local_files.LocalFiles.documents = 'blank_line'`.

    Attributes:
      files: Files by source and split: a path or glob, or a tuple of them; for two parallel files,
        language -> files. E.g. `{'mbpp': {'test': '/data/mbpp.jsonl'}}`. For a source whose
        published file holds all splits, such as MBPP, the path of that file instead of the splits.
      documents: The extent of a document in plain text: a 'line', or the lines between blank ones
        ('blank_line').
      text_field: The field of the text in JSON lines and Parquet files of documents; None for the
        source's own.
      columns: The languages of a tab-separated file's columns; None for the source's order.
    """

    files: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    documents: str = "line"
    text_field: str | None = None
    columns: tuple[str, str] | None = None


def settings_of(name: str) -> LocalFiles:
    """Returns the settings of a source.

    Raises:
      ValueError: if files are given for a source that does not exist, with the nearest.
    """
    with gin.config_scope(name):
        settings = LocalFiles()
    if not isinstance(settings.files, Mapping):
        raise ValueError(
            f"LOCAL_FILES = {settings.files!r}; expected {{source: {{split: files}}}}."
        )
    for given in settings.files:
        if given not in _KNOWN:
            raise ValueError(
                f"LOCAL_FILES names {given!r}, which no task reads; "
                f"{did_you_mean(given, sorted(_KNOWN))}"
            )
    return settings


def _matches(pattern: object, setting: str) -> list[str]:
    """Returns the sorted paths that match a pattern; an error offers the nearest file name."""
    if not isinstance(pattern, str):
        raise ValueError(f"{setting} = {pattern!r}; expected a path, a glob or a tuple of them.")
    pattern = paths.expand(pattern, setting, pattern=True)
    if paths.is_remote(pattern):
        found = paths.glob(pattern, setting)
    elif os.path.isfile(pattern):  # a path may hold the characters of a glob
        found = [pattern]
    else:
        found = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    if found:
        return sorted(found)
    directory, name = os.path.split(pattern)
    others = os.listdir(directory or ".") if os.path.isdir(directory or ".") else []
    if name in others:
        raise ValueError(f"{setting} = {pattern!r} matches no file; {pattern + '/*'!r} would.")
    near = nearest(name, others, cutoff=0.6)
    hint = f"; did you mean {os.path.join(directory, near)!r}?" if near else "."
    raise ValueError(f"{setting} = {pattern!r} matches no file{hint}")


def find_files(
    spec: Any, setting: str, languages: tuple[str, str] | None = None
) -> list[tuple[str, ...]]:
    """Returns the files of one split; those that correspond are in one tuple.

    Args:
      spec: A pattern, several patterns, or language -> patterns.
      setting: The name of the setting, for errors.
      languages: The languages of parallel text, in the order of a tuple's files.

    Raises:
      ValueError: if `spec` is malformed, a pattern matches no file, or the languages have different
        numbers of files.
    """
    expected = "a path, a glob or a tuple of them"
    if isinstance(spec, Mapping):
        if languages is None or sorted(spec) != sorted(languages):
            if languages:
                expected = f"{{{languages[0]!r}: FILES, {languages[1]!r}: FILES}}"
            raise ValueError(f"{setting} = {dict(spec)!r}; expected {expected}.")
        first, second = (
            [path for [path] in find_files(spec[name], f"{setting}[{name!r}]")]
            for name in languages
        )
        if len(first) != len(second):
            raise ValueError(
                f"{setting}: {languages[0]!r} has {len(first)} files, but {languages[1]!r} has "
                f"{len(second)}; parallel files must correspond."
            )
        return list(zip(first, second, strict=True))
    patterns = [spec] if isinstance(spec, str) else spec
    if not isinstance(patterns, Sequence) or not patterns:
        raise ValueError(f"{setting} = {spec!r}; expected {expected}.")
    found = [path for pattern in patterns for path in _matches(pattern, setting)]
    return [(path,) for path in dict.fromkeys(found)]


def _versions(files: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """Returns name, size and time of change of each file, or an object's version for a time."""

    def version(path: str) -> tuple[Any, ...]:
        if paths.is_remote(path):
            return path, *paths.version(path)
        stat = os.stat(path)
        return os.path.abspath(path), stat.st_size, stat.st_mtime_ns

    return [version(path) for path in files]


def _check_split(
    name: str, reader: Reader, files: Sequence[tuple[str, ...]], split: str | None
) -> tuple[Checked, ...]:
    """Checks the files of a split, once per process, and prints what was refused.

    Raises:
      ValueError: if no record is good.
    """
    key = (name, repr(reader), tuple(files), split)
    if key in _CHECKED:
        return _CHECKED[key]
    versions = [_versions(corresponding) for corresponding in files]
    progress = records.Progress(sum(size for part in versions for _, size, _ in part))
    checked = tuple(
        records.check_files(reader, corresponding, version, split, progress)
        for corresponding, version in zip(files, versions, strict=True)
    )
    kept = sum(part.records for part in checked)
    refused = sum(part.refused for part in checked)
    reasons = [reason for part in checked for reason in part.refusals][: records.REASONS_SHOWN]
    shown = "".join(f"\n  {reason}" for reason in reasons)
    if not kept:
        raise ValueError(
            f"{name}: none of {refused:,} records of {len(files)} files is good{shown}"
        )
    print(f"{name}: {kept:,} records, {refused:,} refused{shown}", flush=True)
    return _CHECKED.setdefault(key, checked)


class _CheckedRecords(seqio.DataSource):
    """The records of one split's checked files, in their order, or shuffled."""

    def __init__(self, name: str, split: str, parts: Sequence[Checked], fields: Mapping[str, str]):
        super().__init__((split,), {split: sum(part.records for part in parts)})
        self._name, self._parts, self._fields = name, parts, fields

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        return records.shard_names(self._parts)

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **kwargs: Any,
    ) -> tf.data.Dataset:
        dealt = shuffle and len(self.list_shards(split)) > 1
        names = [part.path for part in self._parts]
        if dealt:
            if (key := tuple(names)) not in _DEALT:
                _DEALT[key] = records.deal(self._parts, f"{self._name}:{split}")
            names = _DEALT[key]
        files = tf.data.Dataset.from_tensor_slices(names)
        # Data shards that cannot have equally many files divide the records instead.
        divides = dealt and shard_info is not None and len(names) % shard_info.num_shards == 0
        if shard_info is not None and divides:
            files = files.shard(shard_info.num_shards, shard_info.index)
        if shuffle:
            files = files.shuffle(len(names), seed)
        dataset = files.interleave(
            tf.data.TFRecordDataset, cycle_length=16 if shuffle else 1, block_length=16
        )
        if shard_info is not None and not divides:
            dataset = dataset.shard(shard_info.num_shards, shard_info.index)
        return self._parse(dataset)

    def _parse(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        text = tf.io.FixedLenFeature([], tf.string)
        texts = tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True)
        features = {n: texts if k == readers.TEXTS else text for n, k in self._fields.items()}
        if texts in features.values():  # lists of a batch would be padded
            return dataset.map(lambda data: tf.io.parse_single_example(data, features))
        # A fifth of the time.
        return dataset.batch(64).map(lambda data: tf.io.parse_example(data, features)).unbatch()


class LocalFilesDataSource(seqio.DataSource):
    """The records of users' files if gin names any for this source, else those of `otherwise`.

    Files are looked up when they are read, not when a task is registered. In both cases records
    are strings and vectors of strings under the names of the reader's fields.
    """

    def __init__(
        self,
        name: str,
        make_reader: Callable[[LocalFiles], Reader],
        otherwise: seqio.DataSource | None = None,
        to_record: Callable[[Mapping[str, Any]], Mapping[str, tf.Tensor]] | None = None,
        default_files: Callable[[], Mapping[str, Any]] = dict,
        splits: Sequence[str] = (),
    ):
        """Registers the name; nothing is read yet.

        Args:
          name: The name of the source in `LocalFiles.files`.
          make_reader: Returns the reader for given settings.
          otherwise: The source to read if gin names no files.
          to_record: Turns an example of `otherwise` into a record; None if it is one.
          default_files: Without `otherwise`, returns split -> files to read if gin names none, or
            raises a ValueError that says what to do.
          splits: The splits of `default_files`.
        """
        super().__init__(splits=splits)
        _KNOWN.add(name)
        self.name = name
        self._make_reader, self._otherwise, self._to_record = make_reader, otherwise, to_record
        self._default_files = default_files

    @property
    def splits(self) -> Sequence[str]:
        """The splits that files are given for, or those of `otherwise`."""
        settings = settings_of(self.name)
        if self.name not in settings.files:
            return self._otherwise.splits if self._otherwise else self._splits
        given = settings.files[self.name]
        if isinstance(given, Mapping):
            return tuple(given)
        return tuple(getattr(self._make_reader(settings), "split_ranges", {}))

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """False: data is sharded by shards if there are enough, else by examples."""
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        """Lists the shards into which records are dealt, or `otherwise`'s shards."""
        return self._source(split).list_shards(split)

    def num_input_examples(self, split: str) -> int | None:
        """Returns the number of records of a split; None if `otherwise` does not know it."""
        return self._source(split).num_input_examples(split)

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **kwargs: Any,
    ) -> tf.data.Dataset:
        """Returns the records of a split, in the order of files and lines unless shuffled.

        Raises:
          ValueError: if files are needed and none are given, a pattern matches no file, or no
            record is good.
        """
        source = self._source(split)
        dataset = source.get_dataset(split, shuffle, seed, shard_info, **kwargs)
        if source is self._otherwise and self._to_record is not None:
            return dataset.map(self._to_record)
        return dataset

    def _source(self, split: str) -> seqio.DataSource:
        """Returns `otherwise` if it is to be read, else the files of a split, checked."""
        settings = settings_of(self.name)
        if self.name in settings.files:
            given, setting = settings.files[self.name], f"LOCAL_FILES[{self.name!r}]"
        elif self._otherwise is not None:
            return self._otherwise
        else:
            given, setting = self._default_files(), f"the files of {self.name!r}"
        reader, kept_split = self._make_reader(settings), None
        if isinstance(given, Mapping):
            if split not in given:
                raise ValueError(f"{setting} lacks the split {split!r}; it has {sorted(given)}.")
            given, setting = given[split], f"{setting}[{split!r}]"
        elif split in getattr(reader, "split_ranges", {}):
            kept_split = split
        else:
            raise ValueError(f"{setting} = {given!r}; expected {{split: files}}.")
        files = find_files(given, setting, getattr(reader, "languages", None))
        checked = _check_split(f"{self.name}:{split}", reader, files, kept_split)
        return _CheckedRecords(self.name, split, checked, reader.fields)
