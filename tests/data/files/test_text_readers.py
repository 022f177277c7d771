"""Parallel text and documents in the forms that users have them."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from diffusion_t5x.data.files.readers import Refusal
from diffusion_t5x.data.files.text_readers import Documents, ParallelText

PARALLEL = ParallelText(("en", "fr"), ("en", "fr"))
PAIRS = [{"en": "the cat", "fr": "le chat"}, {"en": "a\u2028b", "fr": "été"}]


def _write(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def _read(reader, *files):
    return list(reader.read(files, None))


def _refused(items):
    return [(item.line, item.reason) for item in items if isinstance(item, Refusal)]


def test_two_files_are_read_side_by_side(tmp_path):
    english = _write(tmp_path, "a.en", "the cat\na\u2028b")
    french = _write(tmp_path, "a.fr.gz", gzip.compress("le chat\r\nété\r\n".encode()))
    assert _read(PARALLEL, english, french) == PAIRS


def test_pairs_that_lack_a_side_are_refused_and_the_others_stay_aligned(tmp_path):
    english = _write(tmp_path, "a.en", b"one\n \nth\xffree\nfour\n")
    french = _write(tmp_path, "a.fr", "un\ndeux\ntrois\nquatre\n")
    items = _read(PARALLEL, english, french)
    assert [i for i in items if not isinstance(i, Refusal)] == [
        {"en": "one", "fr": "un"},
        {"en": "four", "fr": "quatre"},
    ]
    assert _refused(items) == [
        (2, "'en' is empty, expected a text that is not empty"),
        (3, "not UTF-8 at byte 3 of the line"),
    ]


@pytest.mark.parametrize("english,french,counts", [("a\nb\nc\n", "d\n", "3 1"), ("", "d", "0 1")])
def test_files_of_different_lengths_are_refused_with_both_counts(tmp_path, english, french, counts):
    files = _write(tmp_path, "a.en", english), _write(tmp_path, "a.fr", french)
    first, second = counts.split()
    with pytest.raises(ValueError, match=rf"a\.en has {first} lines, but .*a\.fr has {second};"):
        _read(PARALLEL, *files)


def test_tab_separated_columns_are_in_the_order_that_is_set(tmp_path):
    path = _write(tmp_path, "a.tsv.gz", gzip.compress("the cat\tle chat\na\u2028b\tété".encode()))
    assert _read(PARALLEL, path) == PAIRS
    swapped = _read(ParallelText(("en", "fr"), ("fr", "en")), path)
    assert swapped[0] == {"en": "le chat", "fr": "the cat"}
    items = _read(PARALLEL, _write(tmp_path, "b.tsv", "one\nx\ty\nx\ty\tz\n\ty\n"))
    assert [number for number, _ in _refused(items)] == [1, 3, 4]
    assert _refused(items)[0][1] == "has 1 columns, expected 2: en, fr"
    with pytest.raises(ValueError, match=r"columns = \('en', 'de'\).*\('en', 'fr'\)"):
        ParallelText(("en", "fr"), ("en", "de"))


def test_json_lines_have_the_languages_themselves_or_in_translation(tmp_path):
    rows = [PAIRS[0], {"id": 7, "translation": PAIRS[1]}, {"en": "x"}, {"translation": {"fr": "y"}}]
    path = _write(tmp_path, "a.jsonl", "\n\n".join(map(json.dumps, rows)))
    items = _read(PARALLEL, path)
    assert items[:2] == PAIRS
    assert _refused(items) == [
        (5, "lacks 'fr'; it has ['en']"),
        (7, "lacks 'en'; it has ['fr']"),
    ]


def test_a_form_that_no_reader_knows_is_refused(tmp_path):
    path = _write(tmp_path, "a.csv", "x")
    with pytest.raises(ValueError, match=r"a\.csv: parallel text in one file is \.tsv or \.jsonl"):
        _read(PARALLEL, path)
    with pytest.raises(ValueError, match=r"a\.csv: documents are read from \.txt, \.jsonl and"):
        _read(Documents("text"), path)


def test_plain_text_has_a_document_a_line(tmp_path):
    path = _write(tmp_path, "a.txt", b"first one\n\nsec\xc3\xa9ond\n\xff\n  indented")
    items = _read(Documents("text"), path)
    assert items[0] == {"text": "first one"}
    assert items[2] == {"text": "secéond"}
    assert items[4] == {"text": "  indented"}
    assert [number for number, _ in _refused(items)] == [2, 4]


def test_or_documents_between_blank_lines(tmp_path):
    text = b"\n\nfirst\n  one\n \t\n\nsecond\xff\nx\n\nthird\r\nlast"
    path = _write(tmp_path, "a.txt.gz", gzip.compress(text))
    first, refusal, third = _read(Documents("text", "blank_line"), path)
    assert first == {"text": "first\n  one"}
    assert third == {"text": "third\nlast"}
    assert (refusal.line, refusal.reason) == (7, "not UTF-8 at byte 7 of the document")
    with pytest.raises(ValueError, match=r"documents = 'blank'; expected one of \('line', 'blank_"):
        Documents("text", "blank")


def test_json_lines_and_parquet_have_documents_in_a_field(tmp_path):
    texts = ["def f():\n\treturn 1\n", "", None, "é"]
    lines = _write(tmp_path, "a.jsonl", "\n".join(json.dumps({"content": t}) for t in texts))
    parquet = str(tmp_path / "a.parquet")
    pa.parquet.write_table(pa.table({"content": texts, "size": [1, 2, 3, 4]}), parquet)
    for path in (lines, parquet, f"file://{parquet}"):
        items = _read(Documents("content"), path)
        assert items[0] == {"text": texts[0]}
        assert items[3] == {"text": "é"}
        assert [number for number, _ in _refused(items)] == [2, 3]
    assert _refused(_read(Documents("text"), lines))[0][1] == "lacks 'text'; it has ['content']"
    message = r"lacks the column 'text'; it has \['content', 'size'\]. LocalFiles.text_field"
    with pytest.raises(ValueError, match=message):
        _read(Documents("text"), parquet)
    with pytest.raises(ValueError, match=r"b\.parquet is not a Parquet file"):
        _read(Documents("text"), _write(tmp_path, "b.parquet", "x" * 100))
