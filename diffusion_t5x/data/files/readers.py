"""Readers of users' files, which check each record and refuse a malformed one by file and line.

A reader says how files are divided into items (`batches`) and turns an item into a record, a
dictionary of texts and lists of texts (`record`). Items are independent, so several processes can
parse at once. A file that cannot be read as a whole, such as a damaged gzip stream or two parallel
files of different lengths, is an error. All are streamed, except for a JSON value that is a file.

JSON and tab-separated lines are parsed one by one, as pyarrow's readers stop at the first line that
is malformed and do not give its number.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from diffusion_t5x.data.files import lines
from diffusion_t5x.data.files.lines import Batch, Malformed, form_of

Record = dict[str, str | list[str]]

TEXT = "a text that is not empty"
OPTIONAL_TEXT = "a text or a list of lines, perhaps empty or missing"
TEXTS = "a list of texts that are not empty"
JSON_FORMS = (".jsonl", ".json", ".ndjson", ".parquet")
DOCUMENT_UNITS = ("line", "blank_line")


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A malformed record, which is left out."""

    file: str
    place: int | str  # a line or row, from 1, or a place inside a JSON value, such as '[2]'
    reason: str

    def __str__(self) -> str:
        space = "" if isinstance(self.place, int) else " "
        return f"{self.file}:{space}{self.place}: {self.reason}"


class Reader(Protocol):
    """A way to read files of one kind; its `repr` determines the records of a given file."""

    @property
    def fields(self) -> Mapping[str, str]:
        """The fields of every record, name -> `TEXT`, `OPTIONAL_TEXT` or `TEXTS`."""

    def batches(self, files: tuple[str, ...]) -> Iterator[Batch]:
        """Yields the items of corresponding files, mostly one, or two of parallel text.

        Raises:
          ValueError: if a file cannot be read as a whole.
        """

    def record(self, item: Any, kind: str, split: str | None) -> Record | None:
        """Returns the record of an item; None if there is none, or it is of another split.

        If the files hold several splits, only the records of `split` are kept, unless it is None.

        Raises:
          Malformed: if the item is refused.
        """


def parse(reader: Reader, batch: Batch, split: str | None = None) -> Iterator[Record | Refusal]:
    """Yields the records of a batch, and what is refused."""
    for place, item in zip(batch.places, batch.items, strict=True):
        try:
            if isinstance(item, Malformed):
                raise item
            record = reader.record(item, batch.kind, split)
        except Malformed as error:
            yield Refusal(batch.files[error.file], place, str(error))
        else:
            if record is not None:
                yield record


def read(
    reader: Reader, files: tuple[str, ...], split: str | None = None
) -> Iterator[Record | Refusal]:
    """Yields the records of corresponding files, and what is refused, in order.

    Raises:
      ValueError: if a file cannot be read as a whole.
    """
    for batch in reader.batches(files):
        yield from parse(reader, batch, split)


def _decode(line: bytes, file: int = 0) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start + 1} of its text"
        raise Malformed(f"{reason}; iconv converts other encodings", file) from error


def json_object(item: Any, kind: str) -> Mapping[str, Any]:
    """Returns the object that a line of JSON or a value is."""
    if kind == "value":
        if not isinstance(item, dict):
            raise Malformed(f"expected a JSON object, found {type(item).__name__}")
        return item
    text = _decode(item)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise Malformed(f"not JSON at column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Malformed(f"expected a JSON object, found {type(value).__name__}")
    return value


def check_text(value: Any, name: str, kind: str = TEXT, file: int = 0) -> str:
    """Returns a text, unless it is none, half a character, or empty where it may not be."""
    if not isinstance(value, str):
        raise Malformed(f"{name!r} is {type(value).__name__}, expected {kind}", file)
    if kind != OPTIONAL_TEXT and not (value and value.strip()):
        raise Malformed(f"{name!r} is empty, expected {kind}", file)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Malformed(f"{name!r} holds half of a surrogate pair, which is no text") from error
    return value


def _check_field(
    record: Mapping[str, Any], name: str, kind: str, names: Sequence[str] = ()
) -> str | list[str]:
    """Returns the field of the first of `names`, `name` before them, that has content.

    Rows of several forms in one table have null for each other's fields.
    """
    present = [one for one in (name, *names) if one in record]
    found = next((one for one in present if record[one]), present[0] if present else None)
    if found is None or (record[found] is None and kind == OPTIONAL_TEXT):
        if kind == OPTIONAL_TEXT:
            return ""
        raise Malformed(f"lacks {name!r}; it has {sorted(record)}")
    value = record[found]
    if kind == TEXTS:
        if not isinstance(value, list) or not value:
            raise Malformed(f"{found!r} is {value!r:.40}, expected {TEXTS}")
        return [check_text(text, found) for text in value]
    if kind == OPTIONAL_TEXT and isinstance(value, list):
        return "\n".join(check_text(text, found, kind) for text in value)
    return check_text(value, found, kind)


def object_batches(path: str, columns: Sequence[str]) -> Iterator[Batch]:
    """Yields the objects of JSON lines or an array, or the rows of a Parquet file."""
    parquet = form_of(path) == ".parquet"
    return lines.parquet_batches(path, columns) if parquet else lines.json_batches(path)


def is_blank(item: Any, kind: str) -> bool:
    """Returns whether an item is an empty line of JSON lines."""
    return kind == "json" and not item.strip()


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """A reader of objects, as MBPP and HumanEval are published: JSON lines, an array or Parquet.

    Attributes:
      fields: The fields of a record and their kinds.
      split_field: A whole number that determines the split of a record.
      split_ranges: The first and last number of each split.
      other_names: Further names of fields in files.
    """

    fields: Mapping[str, str]
    split_field: str = ""
    split_ranges: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    other_names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def batches(self, files: tuple[str, ...]) -> Iterator[Batch]:
        [path] = files
        return object_batches(path, [*self.fields, *self.other_names.values(), self.split_field])

    def record(self, item: Any, kind: str, split: str | None) -> Record | None:
        if is_blank(item, kind):
            return None
        value = json_object(item, kind)
        if split is not None and not self._belongs(value, split):
            return None
        names = ((name, [self.other_names.get(name, name)]) for name in self.fields)
        return {name: _check_field(value, name, self.fields[name], more) for name, more in names}

    def _belongs(self, record: Mapping[str, Any], split: str) -> bool:
        number = record.get(self.split_field)
        if not isinstance(number, int) or isinstance(number, bool):
            raise Malformed(f"{self.split_field!r} is {number!r:.40}, expected a whole number")
        first, last = self.split_ranges[split]
        return first <= number <= last


@dataclasses.dataclass(frozen=True)
class MultipleChoice:
    """A reader of questions with choices: JSON lines, an array or Parquet.

    Objects have 'question', the list 'choices', and 'answer', the number of a choice from 0 or its
    text; records have its number as a text.
    """

    fields = {"question": TEXT, "choices": TEXTS, "answer": TEXT}

    def batches(self, files: tuple[str, ...]) -> Iterator[Batch]:
        [path] = files
        return object_batches(path, tuple(self.fields))

    def record(self, item: Any, kind: str, split: str | None) -> Record | None:
        if is_blank(item, kind):
            return None
        value = json_object(item, kind)
        question = _check_field(value, "question", TEXT)
        choices = _check_field(value, "choices", TEXTS)
        if len(choices) < 2 or len({*choices}) < len(choices):
            raise Malformed(f"'choices' is {choices!r:.40}, expected two or more different texts")
        answer = value.get("answer")
        if isinstance(answer, str) and answer in choices:
            answer = choices.index(answer)
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise Malformed(
                f"'answer' is {answer!r:.40}, expected one of the choices, or its number from 0 to "
                f"{len(choices) - 1}"
            )
        return {"question": question, "choices": choices, "answer": str(answer)}


@dataclasses.dataclass(frozen=True)
class Squad:
    """A reader of SQuAD v1.1: its JSON, one object per file, or Hugging Face's rows.

    The former is articles, paragraphs, questions; a refusal names the place of its question, such
    as `data[0].paragraphs[2].qas[1]`. The latter are JSON lines, an array, Parquet, or the `data`
    of an object; they have 'context', 'question' and 'answers', which has the list 'text'.
    """

    fields = {"context": TEXT, "question": TEXT, "answers": TEXTS}

    def batches(self, files: tuple[str, ...]) -> Iterator[Batch]:
        [path] = files
        if form_of(path) == ".parquet":
            yield from lines.parquet_batches(path, tuple(self.fields))
            return
        for batch in lines.json_batches(path, may_be_one=True):
            first = batch.items[0] if batch.kind == "value" and len(batch.items) == 1 else None
            if isinstance(first, dict) and "context" not in first:
                found = dict(_questions(first))
                batch = dataclasses.replace(batch, places=[*found], items=[*found.values()])  # noqa: PLW2901
            yield batch

    def record(self, item: Any, kind: str, split: str | None) -> Record | None:
        if is_blank(item, kind):
            return None
        question = json_object(item, kind)
        answers = question.get("answers")
        if isinstance(answers, dict) and isinstance(answers.get("text"), list):
            texts = answers["text"]
        elif not isinstance(answers, list):
            raise Malformed(f"'answers' is {answers!r:.40}, expected a list, or an object with one")
        elif not all(isinstance(answer, dict) and "text" in answer for answer in answers):
            raise Malformed("'answers' has an entry without 'text'")
        else:
            texts = [answer["text"] for answer in answers]
        if not texts:
            raise Malformed("has no answer; questions without answers are SQuAD v2.0's")
        return {
            "context": _check_field(question, "context", TEXT),
            "question": _check_field(question, "question", TEXT),
            "answers": [check_text(text, "text") for text in texts],
        }


def _questions(document: Any) -> Iterator[tuple[str, Any]]:
    """Yields each question of SQuAD's JSON with its context, or a `Malformed`, under its place."""
    for place, article in _entries(document, "data", ""):
        if isinstance(article, dict) and "context" in article:  # a row of Hugging Face's form
            yield place, article
            continue
        for place, paragraph in _entries(article, "paragraphs", place):  # noqa: B020, PLW2901
            for place, question in _entries(paragraph, "qas", place):  # noqa: B020, PLW2901
                if isinstance(question, dict) and "context" in paragraph:
                    question = {**question, "context": paragraph["context"]}  # noqa: PLW2901
                yield place, question


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
        yield (
            place,
            Malformed(
                f"{name!r} is {entries!r:.40}, expected a list; SQuAD is {{'data': [{{'paragraphs':"
                " [{'context', 'qas'}]}]}, or rows with 'context', 'question' and 'answers'"
            ),
        )


@dataclasses.dataclass(frozen=True)
class ParallelText:
    """A reader of text in two languages: two files line by line, tab-separated, JSON or Parquet.

    Objects have the languages as keys, themselves or in their 'translation'.

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

    def batches(self, files: tuple[str, ...]) -> Iterator[Batch]:
        """Yields lines, pairs or objects; two files are those of `languages`.

        Raises:
          ValueError: if two files have different numbers of lines, or one has an unknown form.
        """
        if len(files) == 2:
            return lines.pair_batches(*files)
        [path] = files
        if form_of(path) == ".tsv":
            return lines.line_batches(path)
        if form_of(path) in JSON_FORMS:
            return object_batches(path, [*self.languages, "translation"])
        raise ValueError(
            f"{path}: parallel text in one file is .tsv, .jsonl, .json or .parquet, the first "
            f"three perhaps with .gz; two files are given as {{{self.languages[0]!r}: FILE, "
            f"{self.languages[1]!r}: FILE}}."
        )

    def record(self, item: Any, kind: str, split: str | None) -> Record | None:
        if kind == "pair":
            named = zip(self.languages, item, (0, 1), strict=True)
            return {name: self._text(line, name, file) for name, line, file in named}
        if kind == "line":
            cells = item.split(b"\t")
            if len(cells) != 2:
                raise Malformed(f"has {len(cells)} columns, expected 2: {', '.join(self.columns)}")
            by_language = dict(zip(self.columns, cells, strict=True))
            return {name: self._text(by_language[name], name) for name in self.languages}
        if is_blank(item, kind):
            return None
        value = json_object(item, kind)
        inner = value.get("translation")
        value = inner if isinstance(inner, dict) else value
        return {name: _check_field(value, name, TEXT) for name in self.languages}

    def _text(self, line: bytes, name: str, file: int = 0) -> str:
        return check_text(_decode(line, file).strip(), name, file=file)


@dataclasses.dataclass(frozen=True)
class Documents:
    """A reader of documents for pretraining: plain text, JSON or Parquet.

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

    def batches(self, files: tuple[str, ...]) -> Iterator[Batch]:
        """Yields documents.

        Raises:
          ValueError: if the file's form is unknown, or a Parquet file lacks the column.
        """
        [path] = files
        if form_of(path) in JSON_FORMS:
            return object_batches(path, [self.field])
        if form_of(path) != ".txt":
            raise ValueError(
                f"{path}: documents are read from .txt, .jsonl, .json and .parquet, the first "
                "three perhaps with .gz."
            )
        by_line = self.unit == "line"
        return lines.line_batches(path) if by_line else lines.paragraph_batches(path)

    def record(self, item: Any, kind: str, split: str | None) -> Record | None:
        if kind == "line":
            return {"text": check_text(_decode(item), self.field)}
        if is_blank(item, kind):
            return None
        return {"text": _check_field(json_object(item, kind), self.field, TEXT)}
