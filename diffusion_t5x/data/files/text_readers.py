"""Readers of parallel text and of documents for pretraining; see `file_readers`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from diffusion_t5x.data.files.readers import (
    JSON_LINES,
    TEXT,
    Malformed,
    Record,
    Refusal,
    check_field,
    check_text,
    decode,
    form_of,
    parse_object,
    parse_records,
    read_lines,
)

DOCUMENT_UNITS = ("line", "blank_line")


@dataclasses.dataclass(frozen=True)
class ParallelText:
    """The same text in two languages: two files line by line, tab-separated, or JSON lines.

    JSON objects have the languages as keys, themselves or in their 'translation'.

    Attributes:
      languages: two names, the fields of the records.
      columns: which language stands in which column of a tab-separated file.
    """

    languages: tuple[str, str]
    columns: tuple[str, str]

    def __post_init__(self):
        """Raises ValueError if the columns are not the two languages."""
        if sorted(self.columns) != sorted(self.languages):
            raise ValueError(
                f"LocalFiles.columns = {self.columns}; expected {self.languages} in the order of "
                "the file."
            )

    @property
    def fields(self) -> Mapping[str, str]:
        """Both languages, as texts."""
        return dict.fromkeys(self.languages, TEXT)

    def read(self, files: tuple[str, ...], split: str | None) -> Iterator[Record | Refusal]:
        """See `Reader.read`; two files are those of `languages`.

        Raises:
          ValueError: if two files have different numbers of lines, or one has an unknown form.
        """
        if len(files) == 2:
            return parse_records(files[0], _aligned(*files), self._from_pair)
        [path] = files
        if form_of(path) == ".tsv":
            return parse_records(path, read_lines(path), self._from_columns)
        if form_of(path) in JSON_LINES:
            return parse_records(path, read_lines(path), self._from_object)
        raise ValueError(
            f"{path}: parallel text in one file is .tsv or .jsonl, each perhaps with .gz; two "
            f"files are given as {{{self.languages[0]!r}: FILE, {self.languages[1]!r}: FILE}}."
        )

    def _from_pair(self, pair: tuple[bytes, bytes]) -> Record:
        named = zip(self.languages, pair, strict=True)
        return {name: check_text(decode(line).strip(), name) for name, line in named}

    def _from_columns(self, line: bytes) -> Record | None:
        cells = line.split(b"\t")
        if len(cells) != 2:
            raise Malformed(f"has {len(cells)} columns, expected 2: {', '.join(self.columns)}")
        by_language = dict(zip(self.columns, cells, strict=True))
        return self._from_pair(tuple(by_language[name] for name in self.languages))

    def _from_object(self, line: bytes) -> Record | None:
        if not line.strip():
            return None
        value = parse_object(line)
        inner = value.get("translation")
        value = inner if isinstance(inner, dict) else value
        return {name: check_field(value, name, TEXT) for name in self.languages}


def _aligned(first: str, second: str) -> Iterator[tuple[bytes, bytes]]:
    """The lines of two files side by side."""
    counts, missing = [0, 0], object()
    pairs = itertools.zip_longest(read_lines(first), read_lines(second), fillvalue=missing)
    for pair in pairs:
        counts = [count + (line is not missing) for count, line in zip(counts, pair, strict=True)]
        if counts[0] == counts[1]:
            yield pair
    if counts[0] != counts[1]:
        raise ValueError(
            f"{first} has {counts[0]:,} lines, but {second} has {counts[1]:,}; lines of parallel "
            "files must correspond."
        )


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents for pretraining: plain text, JSON lines or Parquet.

    Attributes:
      field: the text's name in JSON objects, and its column in Parquet files.
      unit: what a document of plain text is: a 'line', or what stands between blank lines
        ('blank_line').
    """

    field: str
    unit: str = "line"

    fields = {"text": TEXT}

    def __post_init__(self):
        """Raises ValueError for an unknown unit."""
        if self.unit not in DOCUMENT_UNITS:
            raise ValueError(
                f"LocalFiles.documents = {self.unit!r}; expected one of {DOCUMENT_UNITS}."
            )

    def read(self, files: tuple[str, ...], split: str | None) -> Iterator[Record | Refusal]:
        """See `Reader.read`.

        Raises:
          ValueError: if the file's name has an unknown form.
        """
        [path] = files
        form = form_of(path)
        if form in JSON_LINES:
            return parse_records(path, read_lines(path), self._from_object)
        if form == ".parquet":
            return parse_records(path, _parquet_rows(path, self.field), self._from_value)
        if form != ".txt":
            raise ValueError(
                f"{path}: documents are read from .txt, .jsonl and .parquet, the first two perhaps "
                "with .gz."
            )
        if self.unit == "line":
            return parse_records(
                path, read_lines(path), lambda line: self._from_value(decode(line))
            )
        return self._paragraphs(path)

    def _from_value(self, value: Any) -> Record:
        return {"text": check_text(value, self.field)}

    def _from_object(self, line: bytes) -> Record | None:
        if not line.strip():
            return None
        return {"text": check_field(parse_object(line), self.field, TEXT)}

    def _paragraphs(self, path: str) -> Iterator[Record | Refusal]:
        numbered = enumerate(read_lines(path), 1)
        for blank, lines in itertools.groupby(numbered, lambda item: not item[1].strip()):
            if blank:
                continue
            numbers, texts = zip(*lines, strict=True)
            text = b"\n".join(texts)
            try:
                yield self._from_value(decode(text))
            except Malformed as error:
                yield Refusal(path, numbers[0], str(error).replace("the line", "the document"))


def _parquet_rows(path: str, column: str) -> Iterator[Any]:
    """The values of one column of a Parquet file.

    Raises:
      ValueError: if it lacks the column, or is no Parquet file.
    """
    import pyarrow
    from pyarrow import fs, parquet

    local = (fs.LocalFileSystem(), path)
    filesystem, name = fs.FileSystem.from_uri(path) if "://" in path else local
    with filesystem.open_input_file(name) as raw:
        try:
            file = parquet.ParquetFile(raw)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not a Parquet file: {error}") from error
        if column not in file.schema_arrow.names:
            raise ValueError(
                f"{path} lacks the column {column!r}; it has {file.schema_arrow.names}. "
                "LocalFiles.text_field names the column."
            )
        for batch in file.iter_batches(columns=[column], batch_size=1024):
            yield from batch.column(0).to_pylist()
