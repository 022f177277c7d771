"""Readers take what is well formed and say of the rest where it is and what is wrong."""

import bz2
import gzip
import json
import lzma
import re

import pyarrow as pa
import pyarrow.parquet
import pytest

from diffusion_t5x.data.files import lines, readers
from diffusion_t5x.data.files.readers import (
    OPTIONAL_TEXT,
    TEXT,
    TEXTS,
    Documents,
    JsonLines,
    ParallelText,
    Refusal,
    Squad,
)

FIELDS = {"text": TEXT, "tests": TEXTS, "setup": OPTIONAL_TEXT}
GOOD = {"text": "t", "tests": ["a", "b"], "setup": ""}
PARALLEL = ParallelText(("en", "fr"), ("en", "fr"))
PAIRS = [{"en": "the cat", "fr": "le chat"}, {"en": "a\u2028b", "fr": "été"}]


def _read(tmp_path, data, reader, name="file.jsonl", split=None):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(readers.read(reader, (str(path),), split))


def _lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_json_lines_give_the_fields_asked_for_in_order(tmp_path):
    rows = [
        {**GOOD, "other": 1},
        {"text": "Ünï\u2028cödé\n", "tests": ["é"], "setup": "x = 1"},
        {"tests": ["c"], "text": "u"},
    ]
    expected = [
        GOOD,
        {"text": "Ünï\u2028cödé\n", "tests": ["é"], "setup": "x = 1"},
        {"text": "u", "tests": ["c"], "setup": ""},
    ]
    assert _read(tmp_path, _lines(*rows), JsonLines(FIELDS)) == expected
    # Characters that end lines elsewhere, but not here; other line ends; no end at the end.
    raw = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert _read(tmp_path, raw, JsonLines(FIELDS)) == expected
    assert _read(tmp_path, raw.replace("\n", "\r\n\r\n"), JsonLines(FIELDS)) == expected
    assert _read(tmp_path, b"\xef\xbb\xbf" + raw.encode(), JsonLines(FIELDS)) == expected


def test_gzip_is_seen_in_the_file_whatever_its_name(tmp_path):
    data = gzip.compress(_lines(GOOD, GOOD).encode())
    for name in ("a.jsonl.gz", "a.jsonl", "a"):
        assert _read(tmp_path, data, JsonLines(FIELDS), name) == [GOOD, GOOD]


@pytest.mark.parametrize(
    "line,reason",
    [
        (b"{", "not JSON at column 2"),
        (b'{"text": "t",}', "not JSON at column"),
        (b"[1]", "expected a JSON object, found list"),
        (b'"text"', "expected a JSON object, found str"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 11 of its text"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"tests": ["a"]}', r"lacks 'text'; it has \['tests'\]"),
        (b'{"text": 3, "tests": ["a"]}', "'text' is int, expected a text that is not empty"),
        (b'{"text": null, "tests": ["a"]}', "'text' is NoneType"),
        (b'{"text": " \\n", "tests": ["a"]}', "'text' is empty"),
        (b'{"text": "\\ud800", "tests": ["a"]}', "'text' holds half of a surrogate pair"),
        (b'{"text": "t", "tests": "a"}', "'tests' is 'a', expected a list of texts"),
        (b'{"text": "t", "tests": []}', r"'tests' is \[\], expected a list of texts"),
        (b'{"text": "t", "tests": ["a", ""]}', "'tests' is empty"),
        (b'{"text": "t", "tests": ["a", 1]}', "'tests' is int"),
        (b'{"text": "t", "tests": ["a"], "setup": [1]}', "'setup' is int"),
    ],
)
def test_a_malformed_record_is_refused_with_its_line_and_the_others_are_kept(
    line, reason, tmp_path
):
    data = _lines(GOOD).encode() + b"\n" + line + b"\n" + _lines(GOOD).encode()
    first, refusal, last = _read(tmp_path, data, JsonLines(FIELDS))
    assert first == last == GOOD
    assert isinstance(refusal, Refusal)
    assert (refusal.file, refusal.place) == (str(tmp_path / "file.jsonl"), 3)
    assert str(refusal).startswith(f"{tmp_path / 'file.jsonl'}:3: ")
    assert re.search(reason, refusal.reason), refusal.reason


def test_a_damaged_gzip_stream_is_an_error_and_no_shorter_file(tmp_path):
    whole = gzip.compress(b"".join(_lines({**GOOD, "text": str(i)}).encode() for i in range(5000)))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{path} is damaged after line \d\d+"):
        list(readers.read(JsonLines(FIELDS), (str(path),)))


def test_a_file_that_is_compressed_twice_is_named_so(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(gzip.compress(_lines(GOOD).encode())))
    with pytest.raises(ValueError, match=rf"{path} is compressed twice"):
        list(readers.read(JsonLines(FIELDS), (str(path),)))


def test_rows_of_two_forms_in_one_table_have_null_for_each_others_fields(tmp_path):
    kinds = {"text": TEXT, "setup": readers.OPTIONAL_TEXT}
    reader = JsonLines(kinds, other_names={"text": "prompt", "setup": "imports"})
    rows = [
        {"text": "a", "setup": "x", "prompt": None, "imports": None},
        {"text": None, "setup": "", "prompt": "b", "imports": ["y", "z"]},
        {"text": None, "setup": None, "prompt": "c", "imports": None},
    ]
    expected = [{"text": "a", "setup": "x"}, {"text": "b", "setup": "y\nz"}]
    assert _read(tmp_path, _lines(*rows), reader) == [*expected, {"text": "c", "setup": ""}]


def test_one_file_may_hold_all_splits(tmp_path):
    reader = JsonLines({"text": TEXT}, "id", {"test": (11, 20), "train": (21, 30)})
    rows = [{"text": f"t{i}", "id": i} for i in (10, 11, 20, 21, 31)]
    bad = [{"text": "x"}, {"text": "x", "id": "11"}, {"text": "x", "id": True}]
    data = _lines(*rows, *bad)
    assert [r["text"] for r in _read(tmp_path, data, reader, split="test")[:2]] == ["t11", "t20"]
    assert [r["text"] for r in _read(tmp_path, data, reader, split="train")[:1]] == ["t21"]
    refused = _read(tmp_path, data, reader, split="train")[1:]
    assert [r.place for r in refused] == [6, 7, 8]
    assert all("'id' is" in r.reason and "whole number" in r.reason for r in refused)
    assert len(_read(tmp_path, _lines(*rows), reader)) == 5


@pytest.mark.parametrize(
    "name,form",
    [
        ("/a.b/c.jsonl.gz", ".jsonl"),
        ("c.TXT", ".txt"),
        ("gs://x/y.tsv", ".tsv"),
        ("/a.b/c", ""),
        ("c.gz", ""),
    ],
)
def test_the_form_of_a_file_is_in_its_name(name, form):
    assert readers.form_of(name) == form


def _squad(*questions, context="The tower is tall."):
    return {"version": "1.1", "data": [{"title": "T", "paragraphs": [
        {"context": context, "qas": list(questions)}
    ]}]}  # fmt: skip


def _question(number, *answers):
    return {
        "id": f"id{number}",
        "question": f"What is {number}?",
        "answers": [{"text": text, "answer_start": 0} for text in answers],
    }


def test_squad_gives_each_question_with_all_its_answers(tmp_path):
    document = _squad(_question(1, "The tower", "tower"), _question(2, "tall"))
    document["data"].append({"paragraphs": []})
    document["data"].append(_squad(_question(3, "é"), context="é")["data"][0])
    for data in (json.dumps(document), json.dumps(document, indent=1, ensure_ascii=False)):
        records = _read(tmp_path, data, Squad(), "train-v1.1.json")
        assert records == [
            {
                "context": "The tower is tall.",
                "question": "What is 1?",
                "answers": ["The tower", "tower"],
            },
            {"context": "The tower is tall.", "question": "What is 2?", "answers": ["tall"]},
            {"context": "é", "question": "What is 3?", "answers": ["é"]},
        ]
    zipped = gzip.compress(json.dumps(document).encode())
    assert _read(tmp_path, zipped, Squad(), "dev.json.gz") == records


HUGGING_FACE = [
    {"id": "a", "context": "In France.", "question": "Where?",
     "answers": {"text": ["France", "In France"], "answer_start": [3, 0]}},
    {"id": "b", "context": "In Spain.", "question": "Where?",
     "answers": {"text": ["Spain"], "answer_start": [3]}},
]  # fmt: skip


@pytest.mark.parametrize("form", ["lines", "one line", "array", "data", "parquet"])
def test_squad_may_have_hugging_faces_rows(form, tmp_path):
    rows = HUGGING_FACE[: 1 if form == "one line" else 2]
    name = "a.parquet" if form == "parquet" else "a.json"
    if form == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / name)
        data = (tmp_path / name).read_bytes()
    else:
        data = {
            "array": json.dumps(rows, indent=2),
            "data": json.dumps({"version": "1", "data": rows}),
        }.get(form, "\n" + _lines(*rows))
    assert _read(tmp_path, data, Squad(), name) == [
        {**{n: row[n] for n in ("context", "question")}, "answers": row["answers"]["text"]}
        for row in rows
    ]


def test_rows_of_questions_that_are_not_squads_are_refused_with_what_is_expected(tmp_path):
    rows = [{**HUGGING_FACE[0], "answers": value} for value in ({"text": []}, "France", {}, None)]
    refused = _read(tmp_path, _lines(HUGGING_FACE[0], *rows), Squad())[1:]
    assert [item.place for item in refused] == [2, 3, 4, 5]
    assert "SQuAD v2.0's" in refused[0].reason
    assert all("expected a list, or an object" in item.reason for item in refused[1:])
    [refusal] = _read(tmp_path, '{"text": "a"}', Squad())
    assert "rows with 'context', 'question' and 'answers'" in refusal.reason


@pytest.mark.parametrize(
    "question,reason",
    [
        ({"id": "bad", "question": "?", "answers": []}, "has no answer; .*v2.0"),
        ({"id": "bad", "question": "?"}, "'answers' is None, expected a list"),
        ({"id": "bad", "answers": [{"text": "a"}]}, "lacks 'question'"),
        ({"id": "bad", "question": "", "answers": [{"text": "a"}]}, "'question' is empty"),
        ({"id": "bad", "question": "?", "answers": [{"text": " "}]}, "'text' is empty"),
        ({"id": "bad", "question": "?", "answers": [{"start": 1}]}, "an entry without 'text'"),
        ({"id": "bad", "question": "?", "answers": ["a"]}, "an entry without 'text'"),
    ],
)
def test_a_question_is_refused_with_its_place(question, reason, tmp_path):
    document = _squad(_question(1, "tower"), question, _question(2, "tall"))
    data = json.dumps(document, indent=1)
    first, refusal, last = _read(tmp_path, data, Squad(), "dev.json")
    assert (first["question"], last["question"]) == ("What is 1?", "What is 2?")
    path = re.escape(str(tmp_path / "dev.json"))
    assert re.match(rf"{path}: data\[0\]\.paragraphs\[0\]\.qas\[1\]: .*{reason}", str(refusal))


def test_other_json_than_squads_is_refused_whole_or_in_part(tmp_path):
    assert "'data' is None" in _read(tmp_path, "{}", Squad())[0].reason
    with pytest.raises(ValueError, match=r"file\.jsonl:2: not JSON at column 3"):
        _read(tmp_path, '{"data":\n [}', Squad())
    with pytest.raises(ValueError, match=r"file\.jsonl: not JSON: 'utf-8' codec can't decode"):
        _read(tmp_path, b'{"data": "\xff"}', Squad())
    document = _squad(_question(1, "tower"))
    document["data"] += [{"title": "none"}, 3]
    document["data"][0]["paragraphs"] += [{"context": "c", "qas": 1}, {"qas": [_question(4, "a")]}]
    record, *refused = _read(tmp_path, json.dumps(document), Squad())
    assert record["question"] == "What is 1?"
    assert [refusal.place for refusal in refused] == [
        "data[0].paragraphs[1].qas",
        "data[0].paragraphs[2].qas[0]",
        "data[1].paragraphs",
        "data[2].paragraphs",
    ]


def _write(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def _read_files(reader, *files):
    return list(readers.read(reader, files))


# What separates words, ends lines, or does so elsewhere: bytes of a file -> its lines.
ENDS = {
    b"nine\rten\r\n\rx\r\r\n": ["nine ten", " x "],
    b"\xef\xbb\xbfa\xef\xbb\xbfb\nc": ["a\ufeffb", "c"],
    b"a\x0bb\x0cc\x1cd\x1ee\x00f\n": ["a\x0bb\x0cc\x1cd\x1ee\x00f"],
    "a\x85b\u2028c\u2029d\n\n".encode(): ["a\x85b\u2028c\u2029d", ""],
    b"a\r": ["a"],
    b"": [],
}


@pytest.mark.parametrize("data", ENDS)
def test_lines_are_the_same_in_plain_and_in_gzip_files(data, tmp_path):
    middle = len(data) // 2
    zipped = gzip.compress(data[:middle]) + gzip.compress(data[middle:])  # of several members
    for name, stored in (("plain", data), ("zipped", gzip.compress(data)), ("members", zipped)):
        with lines.Lines(_write(tmp_path, name, stored)) as read:
            assert [line.decode() for line in read] == ENDS[data]


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress])
def test_other_compression_is_refused_by_name(compress, tmp_path):
    path = _write(tmp_path, "a.tsv", compress(b"a\tb\n"))
    with pytest.raises(ValueError, match=r"a\.tsv is compressed by (bzip2|xz); expected plain or"):
        _read_files(PARALLEL, path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_unicode_is_refused_whole_and_names_the_file_of_a_pair(encoding, tmp_path):
    english = _write(tmp_path, "a.en", "one\ntwo\n")
    french = _write(tmp_path, "a.fr", "un\ndeux\n".encode(encoding))
    with pytest.raises(ValueError, match=r"a\.fr:1: is UTF-16 or UTF-32, expected UTF-8"):
        _read_files(PARALLEL, english, french)


def test_lines_that_end_with_carriage_returns_alone_are_refused(tmp_path):
    path = _write(tmp_path, "a.txt", "\r".join(f"line {number}" for number in range(20)))
    with pytest.raises(ValueError, match=r"a\.txt: its lines end with carriage returns alone"):
        _read_files(Documents("text"), path)


def test_a_reason_names_the_file_of_the_pair_that_is_at_fault(tmp_path):
    english = _write(tmp_path, "a.en", b"one\ntwo\n\nfour\n\xff\n")
    french = _write(tmp_path, "a.fr", "un\ndéjà\ntrois\n \ncinq".encode("latin-1"))
    refused = [str(item) for item in _read_files(PARALLEL, english, french)[1:]]
    assert [text.removeprefix(f"{tmp_path}/").split(" ")[0] for text in refused] == [
        "a.fr:2:",
        "a.en:3:",
        "a.fr:4:",
        "a.en:5:",
    ]
    assert "not UTF-8 at byte 2" in refused[0]


@pytest.mark.parametrize("indent", [None, 0, 1, 4])
def test_objects_are_lines_or_an_array_however_it_is_laid_out(indent, tmp_path):
    rows = [GOOD, {**GOOD, "text": ""}, 3, {**GOOD, "text": "last\n[\n"}]
    items = _read(tmp_path, json.dumps(rows, indent=indent), JsonLines(FIELDS), "a.json")
    assert [items[0], items[3]] == [GOOD, {**GOOD, "text": "last\n[\n"}]
    for number in (1, 2):
        assert str(items[number]).startswith(f"{tmp_path}/a.json: [{number}]: ")
    assert _read(tmp_path, json.dumps([GOOD], indent=indent), JsonLines(FIELDS)) == [GOOD]
    assert _read(tmp_path, "[]", JsonLines(FIELDS)) == []
    broken = json.dumps(rows, indent=indent).rstrip("]")
    with pytest.raises(ValueError, match=r"a\.json:\d+: not JSON at column"):
        _read(tmp_path, broken, JsonLines(FIELDS), "a.json")


def test_parallel_text_and_documents_may_be_arrays_and_parquet(tmp_path):
    array = _write(tmp_path, "a.json", json.dumps([{"translation": pair} for pair in PAIRS]))
    assert _read_files(PARALLEL, array) == PAIRS
    table = str(tmp_path / "a.parquet")
    pa.parquet.write_table(pa.table({"id": [1, 2], "translation": PAIRS}), table)
    assert _read_files(PARALLEL, table) == PAIRS
    documents = _write(tmp_path, "d.json.gz", gzip.compress(b'[{"text": "a"},\n{"text": "b"}]'))
    assert _read_files(Documents("text"), documents) == [{"text": "a"}, {"text": "b"}]


def _refused(items):
    return [(item.place, item.reason) for item in items if isinstance(item, Refusal)]


def test_two_files_are_read_side_by_side(tmp_path):
    english = _write(tmp_path, "a.en", "the cat\na\u2028b")
    french = _write(tmp_path, "a.fr.gz", gzip.compress("le chat\r\nété\r\n".encode()))
    assert _read_files(PARALLEL, english, french) == PAIRS


def test_pairs_that_lack_a_side_are_refused_and_the_others_stay_aligned(tmp_path):
    english = _write(tmp_path, "a.en", b"one\n \nth\xffree\nfour\n")
    french = _write(tmp_path, "a.fr", "un\ndeux\ntrois\nquatre\n")
    items = _read_files(PARALLEL, english, french)
    assert [i for i in items if not isinstance(i, Refusal)] == [
        {"en": "one", "fr": "un"},
        {"en": "four", "fr": "quatre"},
    ]
    assert _refused(items) == [
        (2, "'en' is empty, expected a text that is not empty"),
        (3, "not UTF-8 at byte 3 of its text; iconv converts other encodings"),
    ]


@pytest.mark.parametrize("english,french,counts", [("a\nb\nc\n", "d\n", "3 1"), ("", "d", "0 1")])
def test_files_of_different_lengths_are_refused_with_both_counts(tmp_path, english, french, counts):
    files = _write(tmp_path, "a.en", english), _write(tmp_path, "a.fr", french)
    first, second = counts.split()
    with pytest.raises(ValueError, match=rf"a\.en has {first} lines, but .*a\.fr has {second};"):
        _read_files(PARALLEL, *files)


def test_tab_separated_columns_are_in_the_order_that_is_set(tmp_path):
    path = _write(tmp_path, "a.tsv.gz", gzip.compress("the cat\tle chat\na\u2028b\tété".encode()))
    assert _read_files(PARALLEL, path) == PAIRS
    swapped = _read_files(ParallelText(("en", "fr"), ("fr", "en")), path)
    assert swapped[0] == {"en": "le chat", "fr": "the cat"}
    items = _read_files(PARALLEL, _write(tmp_path, "b.tsv", "one\nx\ty\nx\ty\tz\n\ty\n"))
    assert [number for number, _ in _refused(items)] == [1, 3, 4]
    assert _refused(items)[0][1] == "has 1 columns, expected 2: en, fr"
    with pytest.raises(ValueError, match=r"columns = \('en', 'de'\).*\('en', 'fr'\)"):
        ParallelText(("en", "fr"), ("en", "de"))


def test_json_lines_have_the_languages_themselves_or_in_translation(tmp_path):
    rows = [PAIRS[0], {"id": 7, "translation": PAIRS[1]}, {"en": "x"}, {"translation": {"fr": "y"}}]
    path = _write(tmp_path, "a.jsonl", "\n\n".join(map(json.dumps, rows)))
    items = _read_files(PARALLEL, path)
    assert items[:2] == PAIRS
    assert _refused(items) == [
        (5, "lacks 'fr'; it has ['en']"),
        (7, "lacks 'en'; it has ['fr']"),
    ]


def test_a_form_that_no_reader_knows_is_refused(tmp_path):
    path = _write(tmp_path, "a.csv", "x")
    with pytest.raises(ValueError, match=r"a\.csv: parallel text in one file is \.tsv, \.jsonl, "):
        _read_files(PARALLEL, path)
    with pytest.raises(ValueError, match=r"a\.csv: documents are read from \.txt, \.jsonl, "):
        _read_files(Documents("text"), path)


def test_plain_text_has_a_document_a_line(tmp_path):
    path = _write(tmp_path, "a.txt", b"first one\n\nsec\xc3\xa9ond\n\xff\n  indented")
    items = _read_files(Documents("text"), path)
    assert items[0] == {"text": "first one"}
    assert items[2] == {"text": "secéond"}
    assert items[4] == {"text": "  indented"}
    assert [number for number, _ in _refused(items)] == [2, 4]


def test_or_documents_between_blank_lines(tmp_path):
    text = b"\n\nfirst\n  one\n \t\n\nsecond\xff\nx\n\nthird\r\nlast"
    path = _write(tmp_path, "a.txt.gz", gzip.compress(text))
    first, refusal, third = _read_files(Documents("text", "blank_line"), path)
    assert first == {"text": "first\n  one"}
    assert third == {"text": "third\nlast"}
    assert (refusal.place, refusal.reason.split(";")[0]) == (7, "not UTF-8 at byte 7 of its text")
    with pytest.raises(ValueError, match=r"documents = 'blank'; expected one of \('line', 'blank_"):
        Documents("text", "blank")


def test_json_lines_and_parquet_have_documents_in_a_field(tmp_path):
    texts = ["def f():\n\treturn 1\n", "", None, "é"]
    lines = _write(tmp_path, "a.jsonl", "\n".join(json.dumps({"content": t}) for t in texts))
    parquet = str(tmp_path / "a.parquet")
    pa.parquet.write_table(pa.table({"content": texts, "size": [1, 2, 3, 4]}), parquet)
    for path in (lines, parquet):
        items = _read_files(Documents("content"), path)
        assert items[0] == {"text": texts[0]}
        assert items[3] == {"text": "é"}
        assert [number for number, _ in _refused(items)] == [2, 3]
    assert (
        _refused(_read_files(Documents("text"), lines))[0][1] == "lacks 'text'; it has ['content']"
    )
    message = r"lacks the column 'text'; it has \['content', 'size'\]. LocalFiles.text_field"
    with pytest.raises(ValueError, match=message):
        _read_files(Documents("text"), parquet)
    with pytest.raises(ValueError, match=r"b\.parquet is not a Parquet file"):
        _read_files(Documents("text"), _write(tmp_path, "b.parquet", "x" * 100))
