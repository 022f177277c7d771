"""Files of finished work: whole or absent, of one key, and recomputed when damaged."""

import pytest

from diffusion_t5x.runtime import resumable


def test_a_key_depends_on_every_setting_and_not_on_their_order():
    key = resumable.digest({"a": 1, "b": [2, None]})
    assert key == resumable.digest({"b": [2, None], "a": 1})
    assert key != resumable.digest({"a": 1, "b": [2, 0]})


def test_an_object_is_found_by_its_key_alone(tmp_path):
    path = tmp_path / "in" / "row.json"
    assert resumable.load(path, "k") is None
    resumable.save(path, "k", {"metrics": {"bleu": 1.5}})
    assert resumable.load(path, "k") == {"metrics": {"bleu": 1.5}, "digest": "k"}
    assert resumable.load(path, "other") is None


def test_a_text_is_what_was_written_and_found_by_its_key_alone(tmp_path):
    path = tmp_path / "part.jsonl"
    assert resumable.load_text(path, "k") is None
    for text in ("", "one\ntwo\n", "é\r\n⏎"):
        resumable.save_text(path, "k", text)
        assert resumable.load_text(path, "k") == text
    assert resumable.load_text(path, "other") is None


def _cut(content):
    return content[:-3]


def _garbled(content):
    return b"\x00\xff" * 9


def _another_digit(content):
    return content.replace(b"25", b"26")


def _a_line_less(content):
    return content[: content.rstrip(b"\n").rfind(b"\n") + 1]


@pytest.mark.parametrize(
    "damage",
    [
        _cut, _garbled, _another_digit, _a_line_less, lambda content: b"",
        lambda content: b"[1]\n", lambda content: content * 2,
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_and_counts_as_absent(tmp_path, damage, capsys):
    path = tmp_path / "file"
    for save, load, value in (
        (resumable.save, resumable.load, {"rows": ["a", "b"], "x": 25.5}),
        (resumable.save_text, resumable.load_text, "some lines\n25\nand more\n"),
    ):
        save(path, "k", value)
        path.write_bytes(damage(path.read_bytes()))
        assert load(path, "k") is None
        assert f"{path} is damaged" in capsys.readouterr().out


def test_numbers_as_keys_and_values_that_are_no_numbers_are_not_damage(tmp_path):
    path = tmp_path / "file"
    resumable.save_object(path, {"a": {10: 1, 9: 0.1}, "nan": float("nan"), "é": None}, indent=1)
    found = resumable.read_object(path)
    assert found["a"] == {"10": 1, "9": 0.1} and found["nan"] != found["nan"]


def test_a_file_of_an_older_version_has_no_checksum_and_is_read(tmp_path):
    (tmp_path / "file").write_text('{"x": 1, "digest": "k"}')
    assert resumable.load(tmp_path / "file", "k") == {"x": 1, "digest": "k"}
