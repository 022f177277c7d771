"""Readers of users' files: each record checked, each refusal with its file, line and reason.

A reader turns files into records, dicts of texts and lists of texts, or into `Refusal`s where a
record is malformed. What cannot be read at all, such as a damaged gzip stream or parallel files of
different lengths, raises. Files may be gzip, whatever their names, and lie wherever
`tf.io.gfile` reads, e.g. `gs://`. They are streamed, except for SQuAD's single JSON object.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
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


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A record that is not used, and why.

    Attributes:
      file: its path.
      line: its line, from 1; a row, from 1, in a Parquet file.
      reason: what is wrong.
    """

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class Reader(Protocol):
    """How files of one kind are read; its `repr` is all that its records depend on.

    Attributes:
      fields: name -> `TEXT`, `OPTIONAL_TEXT` or `TEXTS`, the fields of every record.
    """

    fields: Mapping[str, str]

    def read(self, files: tuple[str, ...], split: str | None) -> Iterator[Record | Refusal]:
        """The records of files that belong together, in their order.

        Args:
          files: paths, mostly one.
          split: keep the records of this split alone, of files that hold several; None for all.
        """
        ...


class Malformed(ValueError):
    """A record that is to be refused."""


def read_lines(path: str) -> Iterator[bytes]:
    """The lines of a file without their ends; a byte order mark is left out.

    Raises:
      ValueError: if its gzip stream is damaged.
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
    """The last suffix of a file's name in lower case, '.gz' left out: '.jsonl' of 'a.jsonl.gz'."""
    name = path.rsplit("/", 1)[-1].lower().removesuffix(".gz")
    return f".{name.rsplit('.', 1)[1]}" if "." in name else ""


def decode(line: bytes) -> str:
    """The text of a line; raises Malformed if it is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8 at byte {error.start + 1} of the line") from error


def parse_object(line: bytes) -> Mapping[str, Any]:
    """The JSON object that a line is; raises Malformed if it is none."""
    text = decode(line)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise Malformed(f"not JSON at column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Malformed(f"expected a JSON object, found {type(value).__name__}")
    return value


def check_text(value: Any, name: str, optional: bool = False) -> str:
    """`value`; raises Malformed unless it is a text, and not empty or `optional`."""
    if not isinstance(value, str):
        raise Malformed(f"{name!r} is {type(value).__name__}, expected {TEXT}")
    if not optional and not value.strip():
        raise Malformed(f"{name!r} is empty, expected {TEXT}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Malformed(f"{name!r} holds half of a surrogate pair, which is no text") from error
    return value


def check_field(record: Mapping[str, Any], name: str, kind: str) -> str | list[str]:
    """The value of a field of an object; raises Malformed unless it is of `kind`."""
    if name not in record:
        if kind == OPTIONAL_TEXT:
            return ""
        raise Malformed(f"lacks {name!r}; it has {sorted(record)}")
    value = record[name]
    if kind != TEXTS:
        return check_text(value, name, optional=kind == OPTIONAL_TEXT)
    if not isinstance(value, list) or not value:
        raise Malformed(f"{name!r} is {value!r:.40}, expected {TEXTS}")
    return [check_text(text, name) for text in value]


def parse_records(
    path: str, items: Iterator[Any], parse: Callable[[Any], Record | None]
) -> Iterator[Record | Refusal]:
    """Parses items, counted from 1; an item that `parse` gives None for is none of the records."""
    for number, item in enumerate(items, 1):
        try:
            record = parse(item)
        except Malformed as error:
            yield Refusal(path, number, str(error))
        else:
            if record is not None:
                yield record


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """One JSON object a line, as MBPP and HumanEval are published; blank lines are skipped.

    Attributes:
      fields: name -> kind; other fields of the objects are left out.
      split_field: a whole number that says which split a record belongs to.
      split_ranges: split -> (first, last) value of `split_field`.
    """

    fields: Mapping[str, str]
    split_field: str | None = None
    split_ranges: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def read(self, files: tuple[str, ...], split: str | None) -> Iterator[Record | Refusal]:
        """See `Reader.read`."""
        [path] = files

        def parse(line: bytes) -> Record | None:
            if not line.strip():
                return None
            value = parse_object(line)
            if split is not None and not self._belongs(value, split):
                return None
            return {name: check_field(value, name, kind) for name, kind in self.fields.items()}

        return parse_records(path, read_lines(path), parse)

    def _belongs(self, record: Mapping[str, Any], split: str) -> bool:
        number = record.get(self.split_field)
        if not isinstance(number, int) or isinstance(number, bool):
            raise Malformed(f"{self.split_field!r} is {number!r:.40}, expected a whole number")
        first, last = self.split_ranges[split]
        return first <= number <= last


@dataclasses.dataclass(frozen=True)
class Squad:
    """SQuAD v1.1's JSON: articles of paragraphs of questions, in one object a file."""

    fields = {"context": TEXT, "question": TEXT, "answers": TEXTS}

    def read(self, files: tuple[str, ...], split: str | None) -> Iterator[Record | Refusal]:
        """See `Reader.read`; a refusal also says where in the object its question is."""
        [path] = files
        text = b"\n".join(read_lines(path))
        try:
            articles = _parse_list(parse_object(text), "data")
        except Malformed as error:
            cause = error.__cause__
            yield Refusal(path, getattr(cause, "lineno", 1), str(error))
            return
        for place, paragraph, question in _squad_questions(articles):
            try:
                yield self._record(paragraph, question)
            except Malformed as error:
                yield Refusal(path, _line_of(text, question, paragraph), f"{place}: {error}")

    def _record(self, paragraph: Any, question: Any) -> Record:
        for value in (paragraph, question):
            if not isinstance(value, dict):
                raise Malformed(f"expected an object, found {type(value).__name__}")
        answers = _parse_list(question, "answers")
        if not answers:
            raise Malformed("has no answer; questions that have none are SQuAD v2.0's")
        if not all(isinstance(answer, dict) and "text" in answer for answer in answers):
            raise Malformed("'answers' has an entry without 'text'")
        return {
            "context": check_field(paragraph, "context", TEXT),
            "question": check_field(question, "question", TEXT),
            "answers": [check_text(answer["text"], "text") for answer in answers],
        }


def _parse_list(value: Any, name: str) -> list[Any]:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise Malformed(f"{name!r} is {found!r:.40}, expected a list")
    return found


def _squad_questions(articles: list[Any]) -> Iterator[tuple[str, Any, Any]]:
    """(place in the object, paragraph, question); a place without questions stands for itself."""
    for i, article in enumerate(articles):
        try:
            paragraphs = _parse_list(article, "paragraphs")
        except Malformed:
            yield f"data[{i}].paragraphs", article, None
            continue
        for j, paragraph in enumerate(paragraphs):
            place = f"data[{i}].paragraphs[{j}].qas"
            try:
                questions = _parse_list(paragraph, "qas")
            except Malformed:
                yield place, paragraph, None
                continue
            for k, question in enumerate(questions):
                yield f"{place}[{k}]", paragraph, question


def _line_of(text: bytes, *values: Any) -> int:
    """The line where the first text of `values` that can be found stands; 1 if none can."""
    for value in values:
        for name in ("id", "question", "context"):
            found = value.get(name) if isinstance(value, dict) else None
            if isinstance(found, str):
                for escaped in (True, False):
                    with contextlib.suppress(UnicodeEncodeError):
                        written = json.dumps(found, ensure_ascii=escaped).encode()
                        if (at := text.find(written)) >= 0:
                            return text.count(b"\n", 0, at) + 1
    return 1
