"""Readers of users' files, which check each record and refuse a malformed one by file and line.

A reader turns files into records, dictionaries of texts and lists of texts, and into `Refusal`s. A
file that cannot be read as a whole, such as a damaged gzip stream or two parallel files of
different lengths, is an error. Files may be gzip, whatever their names, and may be anywhere that
`tf.io.gfile` reads, e.g. `gs://`. All are streamed, except for SQuAD's single JSON object.

JSON and tab-separated lines are parsed one by one, as pyarrow's readers stop at the first line that
is malformed and do not give its number.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import tensorflow as tf

Record = dict[str, str | list[str]]

TEXT = "a text that is not empty"
OPTIONAL_TEXT = "a text, perhaps empty or missing"
TEXTS = "a list of texts that are not empty"
JSON_LINES = (".jsonl", ".json", ".ndjson")
DOCUMENT_UNITS = ("line", "blank_line")


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A malformed record, which is left out."""

    file: str
    line: int | None  # from 1, or a Parquet file's row; None inside an object that is the file
    reason: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.reason}"


class Reader(Protocol):
    """A way to read files of one kind; its `repr` determines the records of a given file."""

    @property
    def fields(self) -> Mapping[str, str]:
        """The fields of every record, name -> `TEXT`, `OPTIONAL_TEXT` or `TEXTS`."""

    def read(self, files: tuple[str, ...], split: str | None) -> Iterator[Record | Refusal]:
        """Yields the records of corresponding files, mostly one, or two of parallel text.

        If the files hold several splits, only the records of `split` are kept, unless it is None.

        Raises:
          ValueError: if a file cannot be read as a whole.
        """


class Malformed(ValueError):
    """A defect because of which a record is refused."""


def read_lines(path: str) -> Iterator[bytes]:
    """Yields the lines of a file without their ends and without a byte order mark.

    Raises:
      ValueError: if the file is a damaged gzip stream.
    """
    number = 0
    with tf.io.gfile.GFile(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            lines = gzip.GzipFile(fileobj=raw) if zipped else raw
            for number, line in enumerate(lines, 1):
                text = line.removesuffix(b"\n").removesuffix(b"\r")
                yield text.removeprefix(b"\xef\xbb\xbf") if number == 1 else text
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is damaged after line {number}: {error}") from error


def form_of(path: str) -> str:
    """Returns a file's last suffix in lower case without '.gz': '.jsonl' for 'a.jsonl.gz'."""
    name = path.rsplit("/", 1)[-1].lower().removesuffix(".gz")
    return f".{name.rsplit('.', 1)[1]}" if "." in name else ""


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8 at byte {error.start + 1} of the line") from error


def _parse_object(line: bytes) -> Mapping[str, Any]:
    text = _decode(line)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise Malformed(f"not JSON at column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Malformed(f"expected a JSON object, found {type(value).__name__}")
    return value


def _check_text(value: Any, name: str, optional: bool = False) -> str:
    if not isinstance(value, str):
        raise Malformed(f"{name!r} is {type(value).__name__}, expected {TEXT}")
    if not optional and not value.strip():
        raise Malformed(f"{name!r} is empty, expected {TEXT}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Malformed(f"{name!r} holds half of a surrogate pair, which is no text") from error
    return value


def _check_field(record: Mapping[str, Any], name: str, kind: str) -> str | list[str]:
    if name not in record:
        if kind == OPTIONAL_TEXT:
            return ""
        raise Malformed(f"lacks {name!r}; it has {sorted(record)}")
    value = record[name]
    if kind != TEXTS:
        return _check_text(value, name, optional=kind == OPTIONAL_TEXT)
    if not isinstance(value, list) or not value:
        raise Malformed(f"{name!r} is {value!r:.40}, expected {TEXTS}")
    return [_check_text(text, name) for text in value]


def _parse_all(
    path: str, items: Iterator[Any], parse: Callable[[Any], Record | None]
) -> Iterator[Record | Refusal]:
    """Parses items, numbered from 1; skips those for which `parse` returns None."""
    for number, item in enumerate(items, 1):
        try:
            record = parse(item)
        except Malformed as error:
            yield Refusal(path, number, str(error))
        else:
            if record is not None:
                yield record


def _parse_json_lines(
    path: str, parse: Callable[[Mapping[str, Any]], Record | None]
) -> Iterator[Record | Refusal]:
    """Parses the objects of a JSON lines file, whose blank lines are skipped."""
    return _parse_all(
        path, read_lines(path), lambda line: parse(_parse_object(line)) if line.strip() else None
    )


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """A reader of one JSON object per line, as MBPP and HumanEval are published."""

    fields: Mapping[str, str]
    split_field: str = ""  # has a whole number that determines the split of a record
    # The first and last number of each split.
    split_ranges: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def read(self, files: tuple[str, ...], split: str | None) -> Iterator[Record | Refusal]:
        [path] = files

        def parse(value: Mapping[str, Any]) -> Record | None:
            if split is not None and not self._belongs(value, split):
                return None
            return {name: _check_field(value, name, kind) for name, kind in self.fields.items()}

        return _parse_json_lines(path, parse)

    def _belongs(self, record: Mapping[str, Any], split: str) -> bool:
        number = record.get(self.split_field)
        if not isinstance(number, int) or isinstance(number, bool):
            raise Malformed(f"{self.split_field!r} is {number!r:.40}, expected a whole number")
        first, last = self.split_ranges[split]
        return first <= number <= last


@dataclasses.dataclass(frozen=True)
class Squad:
    """A reader of SQuAD v1.1's JSON, one object per file: articles, paragraphs, questions.

    A refusal names the place of its question, such as `data[0].paragraphs[2].qas[1]`.
    """

    fields = {"context": TEXT, "question": TEXT, "answers": TEXTS}

    def read(self, files: tuple[str, ...], split: str | None) -> Iterator[Record | Refusal]:
        [path] = files
        try:
            document = _parse_object(b"\n".join(read_lines(path)))
        except Malformed as error:
            yield Refusal(path, getattr(error.__cause__, "lineno", 1), str(error))
            return
        for article_place, article in _entries(document, "data", ""):
            for paragraph_place, paragraph in _entries(article, "paragraphs", article_place):
                for place, question in _entries(paragraph, "qas", paragraph_place):
                    try:
                        yield _squad_record(paragraph, question)
                    except Malformed as error:
                        yield Refusal(path, None, f"{place}: {error}")


def _entries(value: Any, name: str, place: str) -> Iterator[tuple[str, Any]]:
    """Yields place and value of each entry of the list `value[name]`, or a `Malformed` instead."""
    if isinstance(value, Malformed):
        yield place, value
        return
    place = f"{place}.{name}".removeprefix(".")
    entries = value.get(name) if isinstance(value, dict) else None
    if isinstance(entries, list):
        yield from ((f"{place}[{index}]", entry) for index, entry in enumerate(entries))
    else:
        yield place, Malformed(f"{name!r} is {entries!r:.40}, expected a list")


def _squad_record(paragraph: Any, question: Any) -> Record:
    if isinstance(question, Malformed):
        raise question
    if not isinstance(question, dict):
        raise Malformed(f"expected an object, found {type(question).__name__}")
    answers = question.get("answers")
    if not isinstance(answers, list):
        raise Malformed(f"'answers' is {answers!r:.40}, expected a list")
    if not answers:
        raise Malformed("has no answer; questions without answers are SQuAD v2.0's")
    if not all(isinstance(answer, dict) and "text" in answer for answer in answers):
        raise Malformed("'answers' has an entry without 'text'")
    return {
        "context": _check_field(paragraph, "context", TEXT),
        "question": _check_field(question, "question", TEXT),
        "answers": [_check_text(answer["text"], "text") for answer in answers],
    }


@dataclasses.dataclass(frozen=True)
class ParallelText:
    """A reader of text in two languages: two files line by line, tab-separated, or JSON lines.

    JSON objects have the languages as keys, themselves or in their 'translation'.

    Raises:
      ValueError: if the columns are not the two languages.
    """

    languages: tuple[str, str]  # the fields of the records
    columns: tuple[str, str]  # the languages of a tab-separated file's columns, in order

    def __post_init__(self) -> None:
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
        """Yields pairs of texts; two files are those of `languages`.

        Raises:
          ValueError: if two files have different numbers of lines, or one has an unknown form.
        """
        path = files[0]
        if len(files) == 2:
            return _parse_all(path, _aligned(*files), lambda pair: self._record(*pair))
        if form_of(path) == ".tsv":
            return _parse_all(path, read_lines(path), self._from_columns)
        if form_of(path) in JSON_LINES:
            return _parse_json_lines(path, self._from_object)
        raise ValueError(
            f"{path}: parallel text in one file is .tsv or .jsonl, each perhaps with .gz; two "
            f"files are given as {{{self.languages[0]!r}: FILE, {self.languages[1]!r}: FILE}}."
        )

    def _record(self, *lines: bytes) -> Record:
        named = zip(self.languages, lines, strict=True)
        return {name: _check_text(_decode(line).strip(), name) for name, line in named}

    def _from_columns(self, line: bytes) -> Record:
        cells = line.split(b"\t")
        if len(cells) != 2:
            raise Malformed(f"has {len(cells)} columns, expected 2: {', '.join(self.columns)}")
        by_language = dict(zip(self.columns, cells, strict=True))
        return self._record(*(by_language[name] for name in self.languages))

    def _from_object(self, value: Mapping[str, Any]) -> Record:
        inner = value.get("translation")
        value = inner if isinstance(inner, dict) else value
        return {name: _check_field(value, name, TEXT) for name in self.languages}


def _aligned(first: str, second: str) -> Iterator[tuple[bytes, bytes]]:
    """Yields the lines of two files side by side."""
    ours = theirs = 0
    for one, other in itertools.zip_longest(read_lines(first), read_lines(second)):
        ours, theirs = ours + (one is not None), theirs + (other is not None)
        if one is not None and other is not None:
            yield one, other
    if ours != theirs:
        raise ValueError(
            f"{first} has {ours:,} lines, but {second} has {theirs:,}; lines of parallel files "
            "must correspond."
        )


@dataclasses.dataclass(frozen=True)
class Documents:
    """A reader of documents for pretraining: plain text, JSON lines or Parquet.

    Attributes:
      field: The name of the text in JSON objects, and its column in Parquet files.
      unit: The extent of a document in plain text: 'line', or 'blank_line' for the lines between
        blank ones.

    Raises:
      ValueError: if the unit is unknown.
    """

    field: str
    unit: str = "line"

    fields = {"text": TEXT}

    def __post_init__(self) -> None:
        if self.unit not in DOCUMENT_UNITS:
            raise ValueError(
                f"LocalFiles.documents = {self.unit!r}; expected one of {DOCUMENT_UNITS}."
            )

    def read(self, files: tuple[str, ...], split: str | None) -> Iterator[Record | Refusal]:
        """Yields documents.

        Raises:
          ValueError: if the file's form is unknown, or a Parquet file lacks the column.
        """
        [path] = files
        form = form_of(path)
        if form in JSON_LINES:
            return _parse_json_lines(path, self._from_object)
        if form == ".parquet":
            return _parse_all(path, _parquet_rows(path, self.field), self._record)
        if form != ".txt":
            raise ValueError(
                f"{path}: documents are read from .txt, .jsonl and .parquet, the first two perhaps "
                "with .gz."
            )
        if self.unit == "line":
            return _parse_all(path, read_lines(path), lambda line: self._record(_decode(line)))
        return self._paragraphs(path)

    def _record(self, value: Any) -> Record:
        return {"text": _check_text(value, self.field)}

    def _from_object(self, value: Mapping[str, Any]) -> Record:
        return {"text": _check_field(value, self.field, TEXT)}

    def _paragraphs(self, path: str) -> Iterator[Record | Refusal]:
        numbered = enumerate(read_lines(path), 1)
        for blank, lines in itertools.groupby(numbered, lambda item: not item[1].strip()):
            if blank:
                continue
            numbers, texts = zip(*lines, strict=True)
            try:
                yield self._record(_decode(b"\n".join(texts)))
            except Malformed as error:
                yield Refusal(path, numbers[0], str(error).replace("the line", "the document"))


def _parquet_rows(path: str, column: str) -> Iterator[Any]:
    """Yields the values of one column of a Parquet file."""
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
