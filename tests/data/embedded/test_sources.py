"""Embedded data: deterministic, split without overlap, cached whole."""

import argparse
import ast
import collections
import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest

from diffusion_t5x.data.embedded import code, file_cache, python, sources, translation
from tasks import code_execution

FAMILIES = {
    "translation": (lambda: sources.translation_files("en", "fr"), "source"),
    "question": (sources.question_files, "context"),
    "code": (sources.code_files, "text"),
    "prose": (sources.prose_files, "text"),
    "source": (sources.source_files, "text"),
}


@pytest.fixture(scope="module")
def records():
    return {
        family: {split: file_cache.read_jsonl(path) for split, path in files().items()}
        for family, (files, _) in FAMILIES.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_share_no_key_and_no_example_appears_twice(family, records):
    key = FAMILIES[family][1]
    keys = {split: {r[key] for r in rows} for split, rows in records[family].items()}
    assert set(keys) == {"train", "validation", "test"}
    assert not keys["train"] & keys["validation"]
    assert not keys["train"] & keys["test"]
    assert not keys["validation"] & keys["test"]
    for rows in records[family].values():
        assert len({json.dumps(row) for row in rows}) == len(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_twentieth_is_held_out_for_each_of_validation_and_test(family, records):
    sizes = {split: len(rows) for split, rows in records[family].items()}
    total = sum(sizes.values())
    assert total > 4_000
    for split in ("validation", "test"):
        assert sizes[split] / total == pytest.approx(0.05, abs=0.015)


def test_a_split_depends_on_the_key_alone():
    # Recorded: a change here would move held-out examples into the training split.
    splits = {key: sources.split_of(key) for key in map(str, range(200))}
    assert collections.Counter(splits.values()) == {"train": 173, "test": 14, "validation": 13}
    assert [key for key, split in splits.items() if split == "test"][:3] == ["19", "37", "54"]


def _small(name, monkeypatch):
    """A generator of little, so that it can run often."""
    monkeypatch.setattr(translation, "NUM_DRAWS", 500)
    files = [pathlib.Path(ast.__file__), pathlib.Path(argparse.__file__)]
    monkeypatch.setattr(python, "_library_files", lambda: files)
    return {
        "translation": lambda: translation.generate("en", "de"),
        "question": python.generate_questions,
        "code": code.generate,
        "prose": python.generate_prose,
        "source": python.generate_source,
    }[name]


@pytest.mark.parametrize("family", FAMILIES)
def test_generating_twice_gives_the_same(family, monkeypatch):
    generate = _small(family, monkeypatch)
    assert list(generate()) == list(generate())
    assert len(list(generate())) > 10


def test_generated_data_do_not_depend_on_the_process():
    script = (
        "import ast, pathlib\n"
        "from diffusion_t5x.data.embedded import code, python, translation\n"
        "translation.NUM_DRAWS = 300\n"
        "python._library_files = lambda: [pathlib.Path(ast.__file__)]\n"
        "print(*translation.generate('en', 'de'), *code.generate())\n"
        "print(*python.generate_questions(), *python.generate_source())\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},  # the order of sets of strings
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert len(outputs[0]) > 100_000
    assert outputs[0] == outputs[1]


def _plain(text):
    """With ordinary spaces, of which CLDR knows several."""
    return text.replace("\u202f", " ").replace("\xa0", " ")


@pytest.mark.parametrize(
    "source,target",
    [
        ("in 5 minutes", "dans 5 minutes"),
        ("5 minutes ago", "il y a 5 minutes"),
        ("in 1 day", "dans 1 jour"),
        ("3 weeks", "3 semaines"),
        ("August 23, 2011", "23 août 2011"),
        ("Greece and Spain", "Grèce et Espagne"),
        ("Greek or Italian", "grec ou italien"),
        ("638.54 Swiss francs", "638,54 francs suisses"),
        ("1,040 Japanese yen", "1 040 yens japonais"),
        ("92.8 kilometers", "92,8 kilomètres"),
        ("30.7%", "30,7%"),
        ("9.4 million", "9,4 millions"),
        ("6:59:09 PM", "18:59:09"),
        ("Jun 28, 2000, 8:27:00 PM", "28 juin 2000, 20:27:00"),
    ],
)
def test_hand_checked_translations(source, target, records):
    rows = [row for split in records["translation"].values() for row in split]
    assert [_plain(row["target"]) for row in rows if _plain(row["source"]) == source] == [target]


def test_rendered_locales_are_the_ones_asked_for(monkeypatch):
    monkeypatch.setattr(translation, "NUM_DRAWS", 400)
    german = {r["source"]: r["target"] for r in translation.generate("en", "de")}
    backwards = {r["target"]: r["source"] for r in translation.generate("de", "en")}
    shared = set(german) & set(backwards)
    assert len(shared) > 300
    assert all(german[text] == backwards[text] for text in shared)
    assert any(" und " in target for target in german.values())


def test_a_source_text_with_two_meanings_is_left_out(monkeypatch):
    meanings = iter(("one", "two", "one", "three"))

    def ambiguous(rng):
        meaning = next(meanings)
        return lambda locale: "same" if locale.language == "en" else meaning

    monkeypatch.setattr(translation, "_KINDS", {ambiguous: 1})
    monkeypatch.setattr(translation, "NUM_DRAWS", 4)
    assert list(translation.generate("en", "fr")) == []
    meanings = iter(("one", "one", "one", "one"))
    assert list(translation.generate("en", "fr")) == [{"source": "same", "target": "one"}]


@pytest.mark.parametrize("name", ["xx", "en_XX", "", "not a locale", "klingon"])
def test_unknown_locales_are_refused(name):
    with pytest.raises(ValueError, match=rf"locale '{name}' is not in CLDR"):
        next(translation.generate("en", name))
    with pytest.raises(ValueError, match=rf"locale '{name}' is not in CLDR"):
        next(translation.generate(name, "en"))


def test_every_answer_is_a_span_of_its_context(records):
    for rows in records["question"].values():
        for row in rows:
            assert row["answer"]
            assert row["answer"] in row["context"]


def test_answers_about_a_signature_are_the_signatures(tmp_path, monkeypatch):
    module = tmp_path / "module.py"
    module.write_text(
        'def join(self, head, tail="x", /, sep=None):\n    """Return the parts in one."""\n'
        'def pick(first, second, *, third):\n    """Choose."""\n'
        "def silent(a, b):\n    pass\n"
    )
    monkeypatch.setattr(python, "_library_files", lambda: [module])
    answers = [(row["question"], row["answer"]) for row in python.generate_questions()]
    assert sorted(answers) == sorted(
        [
            ("Which parameter of join comes first?", "head"),
            ("Which parameter of join comes last?", "sep"),
            ("Which parameter comes after head?", "tail"),
            ("Which parameter comes after tail?", "sep"),
            ("What is the default of tail?", "'x'"),
            ("What is the default of sep?", "None"),
            ("What does join return?", "the parts in one"),
            ("Which parameter of pick comes first?", "first"),
            # The last parameter of pick is not asked for: it is by keyword only.
            ("Which parameter comes after first?", "second"),
        ]
    )


def test_source_documents_are_functions_as_they_stand_in_their_files(records):
    for row in records["source"]["test"]:
        [function] = ast.parse(row["text"]).body
        assert isinstance(function, ast.FunctionDef)
        assert len(row["text"]) <= python.MAX_SOURCE


def test_source_keeps_its_indentation_after_page_breaks(tmp_path, monkeypatch):
    first = "def first(number):\n    if number:\n        return [number, number + 1]"
    second = "def second(number):\n    return first(number) + first(number)"
    module = tmp_path / "module.py"
    indented = second.replace("\n", "\n    ").replace("second", "method")
    module.write_text(f"{first}\n\n\f\n{second}\n\nclass A:\n    {indented}\n")
    monkeypatch.setattr(python, "_library_files", lambda: [module])
    texts = [row["text"] for row in python.generate_source()]
    assert texts == [first, second, second.replace("second", "method")]


def test_reference_programs_pass_their_assertions(records):
    rows = [row for split in records["code"].values() for row in split]
    by_reduction = {}
    for row in rows:
        by_reduction.setdefault(row["code"].split("_")[0], []).append(row)
    sample = [row for group in by_reduction.values() for row in group[:12]]
    assert len(by_reduction) == len(code.REDUCTIONS)
    passed = code_execution.run_all([(row["code"], row["tests"]) for row in sample])
    assert [row for row, success in zip(sample, passed, strict=True) if not success] == []
    # The assertions do tell programs apart.
    others = [(sample[i]["code"], sample[i - 1]["tests"]) for i in range(len(sample))]
    assert not any(code_execution.run_all(others[:8]))


def test_problems_differ_in_name_and_description_and_show_python():
    problems = list(code.generate())
    assert len({problem["text"] for problem in problems}) == len(problems)
    assert len({problem["code"] for problem in problems}) == len(problems)
    assert problems[0] == {
        "text": "Write a function to return the sum of the squares of all numbers in a list.",
        "code": "def sum_squares_all(numbers):\n    return sum(x * x for x in numbers)",
        "tests": [
            "assert sum_squares_all([3, -2, 8, 5]) == 102",
            "assert sum_squares_all([1, 2, 3, 4, 5, 6]) == 91",
            "assert sum_squares_all([-7, 0, 9, 4, -4]) == 162",
        ],
    }
    # As one would write it: a comprehension that is the only argument has no parentheses.
    assert {p["code"].split("_")[0] for p in problems if "((" in p["code"]} == {
        "def largest",
        "def smallest",
    }


def test_a_data_source_gives_strings_and_vectors_of_strings(records):
    source = sources.EmbeddedDataSource(sources.code_files)
    assert set(source.splits) == {"train", "validation", "test"}
    rows = list(source.get_dataset("test").as_numpy_iterator())
    assert len(rows) == len(records["code"]["test"])
    for row, record in zip(rows, records["code"]["test"], strict=True):
        assert row["code"].decode() == record["code"]
        assert [test.decode() for test in row["tests"]] == record["tests"]


def test_the_cache_is_where_the_variable_says_and_is_written_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_T5X_CACHE", str(tmp_path / "here"))
    calls = []

    def write(path):
        calls.append(path)
        path.write_text("text")

    first, second = (file_cache.cached_file("name.txt", write) for _ in range(2))
    assert first == second
    assert tmp_path / "here" in first.parents
    assert first.read_text() == "text"
    assert len(calls) == 1


def test_without_the_variable_the_cache_is_below_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("DIFFUSION_T5X_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert file_cache.cache_dir() == tmp_path / ".cache" / "diffusion_t5x"


def test_a_file_that_failed_half_way_does_not_appear(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_T5X_CACHE", str(tmp_path))

    def fail(path):
        path.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        file_cache.cached_file("name.txt", fail)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    path = file_cache.cached_file("name.txt", lambda path: path.write_text("whole") and None)
    assert path.read_text() == "whole"
    note = path.with_name(".name.txt.checksum")
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {path, note}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],  # at the end of a line
        lambda text: "", lambda text: text + text, lambda text: text.replace("3", "8"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_the_cache_is_named_and_made_again(tmp_path, monkeypatch, damage, capsys):
    monkeypatch.setenv("DIFFUSION_T5X_CACHE", str(tmp_path))
    text = "".join(f"{{'row': {row}}}\n" for row in range(8))
    write = lambda path: path.write_text(text) and None  # noqa: E731
    path = file_cache.cached_file("rows.jsonl", write)
    for file in (path, path.with_name(".rows.jsonl.checksum")):
        file.write_text(damage(file.read_text()))
        assert file_cache.cached_file("rows.jsonl", write).read_text() == text
        assert f"{path} is damaged" in capsys.readouterr().out
        file_cache.cached_file("rows.jsonl", lambda path: pytest.fail("is whole"))


def test_a_family_whose_file_lost_lines_has_all_its_records_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIFFUSION_T5X_CACHE", str(tmp_path))
    rows = [{"text": f"text {number}"} for number in range(200)]
    files = sources._by_split("family", lambda: iter(rows), "text")
    expected = file_cache.read_jsonl(files["train"])
    lines = pathlib.Path(files["train"]).read_text().splitlines(keepends=True)
    pathlib.Path(files["train"]).write_text("".join(lines[: len(lines) // 2]))
    files = sources._by_split("family", lambda: iter(rows), "text")
    assert file_cache.read_jsonl(files["train"]) == expected
    assert f"{files['train']} is damaged; it is made again." in capsys.readouterr().out


def test_a_reader_sees_a_file_whole_however_many_write_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_T5X_CACHE", str(tmp_path))
    barrier = threading.Barrier(4)

    def write(path):
        with open(path, "w") as file:
            file.write("half")
            barrier.wait(5)  # all are half way at the same time
            file.write(" whole")

    texts = []
    threads = [
        threading.Thread(
            target=lambda: texts.append(file_cache.cached_file("name.txt", write).read_text())
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["half whole"] * 4


def test_another_version_of_the_generator_has_its_own_files(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_T5X_CACHE", str(tmp_path))
    old = file_cache.cached_file("name.txt", lambda path: path.write_text("old") and None)
    monkeypatch.setattr(file_cache, "GENERATOR_VERSION", file_cache.GENERATOR_VERSION + 1)
    new = file_cache.cached_file("name.txt", lambda path: path.write_text("new") and None)
    assert (old.read_text(), new.read_text()) == ("old", "new")


def test_json_lines_round_trip(tmp_path):
    rows = [{"a": "é\n\u2028", "b": [1, "x"]}, {"a": "", "b": []}]
    file_cache.write_jsonl(tmp_path / "rows.jsonl", rows)
    assert file_cache.read_jsonl(tmp_path / "rows.jsonl") == rows
