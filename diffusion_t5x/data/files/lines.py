"""What is in users' files before anything is parsed: lines, pairs of lines, JSON values, rows.

Only this module opens them. It imports neither TensorFlow nor JAX: processes that parse start fast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from diffusion_t5x import paths

BATCH_ITEMS = 2048
BATCH_BYTES = 2**20
# As many carriage returns, and no line feed, are the ends of lines of an old system.
MANY_RETURNS = 8
# Starts of files that are compressed in a way that is not read here.
_COMPRESSED = {
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"\x04\x22\x4d\x18": "lz4",
}
_OTHER_UNICODE = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")


class Malformed(ValueError):
    """A defect because of which a record is refused, in the file of this index."""

    def __init__(self, reason: str, file: int = 0):
        super().__init__(reason)
        self.file = file


@dataclasses.dataclass(frozen=True)
class Batch:
    """Consecutive items of corresponding files, read and not parsed.

    Attributes:
      kind: 'line' (bytes), 'pair' (of lines), 'json' (a line that should be an object) or 'value'
        (a Python value, or the `Malformed` that there is instead).
      places: The number of each item's line or row from 1, or its place inside a JSON value.
      read: Bytes of the files, as they are stored, read by now.
    """

    files: tuple[str, ...]
    kind: str
    places: Sequence[int | str]
    items: list[Any]
    read: int


def open_file(path: str) -> BinaryIO:
    """Opens a file for reading bytes."""
    return paths.file_system(path).open(path) if paths.is_remote(path) else open(path, "rb")


def form_of(path: str) -> str:
    """Returns a file's last suffix in lower case without '.gz': '.jsonl' for 'a.jsonl.gz'."""
    name = path.rsplit("/", 1)[-1].lower().removesuffix(".gz")
    return f".{name.rsplit('.', 1)[1]}" if "." in name else ""


class Lines(contextlib.AbstractContextManager):
    """The lines of a file, plain or gzip, without their ends and without a byte order mark.

    A line ends with a line feed, perhaps after a carriage return. Any other carriage return becomes
    a space, as it separates words; all other characters stay.
    """

    def __init__(self, path: str):
        self._path, self._raw = path, open_file(path)

    def __exit__(self, *exception: object) -> None:
        self._raw.close()

    def read(self) -> int:
        """Returns how many bytes of the file, as it is stored, are read by now."""
        return self._raw.tell()

    def __iter__(self) -> Iterator[bytes]:
        """Yields the lines.

        Raises:
          ValueError: if the file is a damaged gzip stream, compressed otherwise, UTF-16 or -32, or
            one line of many carriage returns.
        """
        number = 0
        start = self._raw.read(8)
        self._raw.seek(0)
        for mark, name in _COMPRESSED.items():
            if start.startswith(mark):
                raise ValueError(f"{self._path} is compressed by {name}; expected plain or gzip.")
        zipped = start.startswith(b"\x1f\x8b")
        try:
            for line in gzip.GzipFile(fileobj=self._raw) if zipped else self._raw:
                number += 1
                if number == 1:
                    self._check_form(line)
                    line = line.removeprefix(b"\xef\xbb\xbf")  # noqa: PLW2901
                yield line.removesuffix(b"\n").removesuffix(b"\r").replace(b"\r", b" ")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{self._path} is damaged after line {number}: {error}") from error

    def _check_form(self, line: bytes) -> None:
        """Checks the first line for what would make a whole file another text, unseen."""
        if line.startswith(b"\x1f\x8b"):
            raise ValueError(f"{self._path} is compressed twice; expected plain or gzip.")
        if not line.endswith(b"\n") and line.count(b"\r") >= MANY_RETURNS:
            raise ValueError(
                f"{self._path}: its lines end with carriage returns alone, expected line feeds; "
                r"convert the file, e.g. tr '\r' '\n'."
            )
        if line.startswith(_OTHER_UNICODE) or 3 * line.count(0) > len(line) > 3:
            raise ValueError(
                f"{self._path}:1: is UTF-16 or UTF-32, expected UTF-8; convert the file, e.g. "
                "iconv -f UTF-16 -t UTF-8."
            )


def _batched(
    files: tuple[str, ...],
    kind: str,
    placed: Iterable[tuple[int | str, Any]],
    opened: Sequence[Lines],
) -> Iterator[Batch]:
    """Groups items, which are or consist of bytes, up to `BATCH_ITEMS` or `BATCH_BYTES`."""
    places: list[int | str] = []
    items: list[Any] = []
    size = 0
    for place, item in placed:
        places.append(place)
        items.append(item)
        size += len(item) if kind != "pair" else len(item[0]) + len(item[1])
        if size >= BATCH_BYTES or len(items) >= BATCH_ITEMS:
            yield Batch(files, kind, places, items, sum(lines.read() for lines in opened))
            places, items, size = [], [], 0
    if items:
        yield Batch(files, kind, places, items, sum(lines.read() for lines in opened))


def line_batches(path: str) -> Iterator[Batch]:
    """Yields the lines of a file."""
    with Lines(path) as lines:
        yield from _batched((path,), "line", enumerate(lines, 1), [lines])


def paragraph_batches(path: str) -> Iterator[Batch]:
    """Yields the lines between blank ones, joined, under the number of the first."""
    with Lines(path) as lines:
        groups = itertools.groupby(enumerate(lines, 1), lambda item: not item[1].strip())
        kept = ([*group] for blank, group in groups if not blank)
        joined = ((group[0][0], b"\n".join(line for _, line in group)) for group in kept)
        yield from _batched((path,), "line", joined, [lines])


def pair_batches(first: str, second: str) -> Iterator[Batch]:
    """Yields the lines of two files side by side.

    Raises:
      ValueError: if one has more lines than the other, after the last pair.
    """
    counts = [0, 0]

    def pairs() -> Iterator[tuple[int, tuple[bytes, bytes]]]:
        for pair in itertools.zip_longest(ours, theirs):
            counts[0] += pair[0] is not None
            counts[1] += pair[1] is not None
            if None not in pair:
                yield counts[0], pair

    with Lines(first) as ours, Lines(second) as theirs:
        yield from _batched((first, second), "pair", pairs(), [ours, theirs])
    if counts[0] != counts[1]:
        raise ValueError(
            f"{first} has {counts[0]:,} lines, but {second} has {counts[1]:,}; lines of parallel "
            "files must correspond."
        )


def json_batches(path: str, may_be_one: bool = False) -> Iterator[Batch]:
    """Yields the objects of JSON lines, blank lines among them, or the entries of a JSON array.

    Args:
      may_be_one: The file may be one object, over several lines, which is then the only entry.

    Raises:
      ValueError: if an array, or the one object, is no JSON.
    """
    with Lines(path) as lines:
        numbered = enumerate(lines, 1)
        written = (item for item in numbered if item[1].strip())
        head = list(itertools.islice(written, 1))
        start = head[0][1].lstrip()[:1] if head else b""
        if start == b"[" or (may_be_one and start == b"{"):
            whole = _is_json(head[0][1])
            if whole or start == b"{":
                head += itertools.islice(written, 1)
            if (len(head) == 1) if whole else (start == b"[" or not _is_json(head[-1][1])):
                yield _one_value(path, head[0][0], [*head, *numbered], lines)
                return
        yield from _batched((path,), "json", itertools.chain(head, numbered), [lines])


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _one_value(path: str, first: int, numbered: list[tuple[int, bytes]], lines: Lines) -> Batch:
    try:
        value = json.loads(b"\n".join(line for _, line in numbered).decode("utf-8"))
    except json.JSONDecodeError as error:
        place = f"{path}:{first + error.lineno - 1}"
        raise ValueError(f"{place}: not JSON at column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    items = value if isinstance(value, list) else [value]
    places = [f"[{index}]" for index in range(len(items))]
    return Batch((path,), "value", places, items, lines.read())


def parquet_batches(path: str, columns: Sequence[str]) -> Iterator[Batch]:
    """Yields the rows of a Parquet file, those of `columns` that it has, under their numbers.

    Raises:
      ValueError: if the file is not Parquet, or has none of the columns.
    """
    import pyarrow
    from pyarrow import parquet

    with open_file(path) as raw:
        try:
            file = parquet.ParquetFile(raw)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not a Parquet file: {error}") from error
        present = file.schema_arrow.names
        if not (wanted := [name for name in columns if name in present]):
            raise ValueError(
                f"{path} lacks the column {columns[0]!r}; it has {present}. "
                "LocalFiles.text_field names the column of documents."
            )
        size, row = raw.seek(0, 2), 1
        for batch in file.iter_batches(columns=wanted, batch_size=1024):
            items = batch.to_pylist()
            places = range(row, row + len(items))
            row += len(items)
            yield Batch((path,), "value", places, items, size * (row - 1) // file.metadata.num_rows)
