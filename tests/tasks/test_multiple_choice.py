"""Answers ranked by likelihood: the metric, and the task on a file."""

import json
import random

import pytest
import seqio

import gin
from diffusion_t5x.data.embedded import file_cache
from diffusion_t5x.data.files import readers
from diffusion_t5x.data.vocabularies import get_vocabulary
from tasks import metrics
from tasks.metrics import Choice

# Two questions of two and three choices, with scores: by likelihood the first is right and the
# second wrong, by token both are right, by byte the first is wrong and the second half right.
ROWS = [
    (Choice(0, 0, 2, 0, tokens=1, bytes=1), -2.0),
    (Choice(0, 1, 2, 0, tokens=1, bytes=9), -3.0),
    (Choice(1, 0, 3, 2, tokens=2, bytes=4), -4.0),
    (Choice(1, 1, 3, 2, tokens=2, bytes=1), -6.0),
    (Choice(1, 2, 3, 2, tokens=9, bytes=5), -5.0),
]


def _rank(rows):
    return metrics.rank_choices(*zip(*rows, strict=True))


def test_the_likeliest_choice_is_the_answer_given_and_ties_are_shared():
    expected = {"accuracy": 0.5, "accuracy_per_token": 1.0, "accuracy_per_byte": 0.25}
    counts = {"questions": 2, "incomplete_questions": 0}
    for seed in range(3):
        rows = random.Random(seed).sample(ROWS, len(ROWS))
        assert _rank(rows) == expected | counts
    found = _rank(ROWS[:-1])  # the second question lacks a choice
    assert (found["accuracy"], found["questions"], found["incomplete_questions"]) == (1, 1, 1)
    with pytest.raises(ValueError, match="none of 1 questions has all its choices"):
        _rank(ROWS[:1])
    with pytest.raises(ValueError, match="5 choices, but 1 scores"):
        metrics.rank_choices([choice for choice, _ in ROWS], [0.0])
    with pytest.raises(ValueError, match="NaN"):
        _rank([(ROWS[0][0], float("nan")), ROWS[1]])


GOOD = {"question": "Où?", "choices": ["ici", "là-bas"], "answer": 1}


def test_a_file_becomes_an_example_of_each_choice_and_is_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.setenv(file_cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    file = tmp_path / "questions.jsonl"
    other = {"question": "2 + 2 = ?", "choices": ["3", "4", "5"], "answer": "4"}
    file.write_text("".join(json.dumps(value) + "\n" for value in (GOOD, other)))
    files = {"multiple_choice": {"test": str(file)}}
    gin.bind_parameter("diffusion_t5x.data.files.local_files.LocalFiles.files", files)
    task = seqio.get_mixture_or_task("multiple_choice")
    lengths = {"inputs": 16, "targets": 16}
    examples = [*task.get_dataset(lengths, "test", shuffle=False).as_numpy_iterator()]
    vocabulary = get_vocabulary()
    texts = [vocabulary.decode(example["targets"].tolist()) for example in examples]
    assert texts == ["ici", "là-bas", "3", "4", "5"]
    assert [vocabulary.decode(e["inputs"].tolist()) for e in examples[:2]] == ["Où?\n"] * 2
    targets = [task.postprocess_fn("", example=e, is_target=True) for e in examples]
    numbers = [(t.question, t.choice, t.num_choices, t.answer, t.bytes) for t in targets]
    assert numbers == [
        (0, 0, 2, 1, 3), (0, 1, 2, 1, 7), (1, 0, 3, 1, 1), (1, 1, 3, 1, 1), (1, 2, 3, 1, 1),
    ]  # fmt: skip
    assert [t.tokens for t in targets] == [len(example["targets"]) for example in examples]
    [metric] = task.score_metric_fns
    assert metric(targets, [-9.0, -1.0, -1.0, -1.0, -2.0])["accuracy"] == 0.75
    with pytest.raises(ValueError, match="it can be evaluated, and not trained on"):
        task.get_dataset(lengths, "test", shuffle=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": 2}, "'answer' is 2, expected one of the choices, or its number from 0 to 1"),
        ({"answer": "là"}, "'answer' is 'là', expected one of the choices"),
        ({"answer": True}, "'answer' is True"),
        ({"answer": None}, "'answer' is None"),
        ({"choices": ["ici"]}, "expected two or more different texts"),
        ({"choices": ["ici", "ici"]}, "expected two or more different texts"),
        ({"choices": "ici"}, "'choices' is 'ici', expected a list of texts"),
        ({"question": " "}, "'question' is empty"),
    ],
)
def test_a_malformed_question_is_refused_by_name(tmp_path, change, reason):
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({**GOOD, **change}))
    [refusal] = readers.read(readers.MultipleChoice(), (str(file),))
    assert reason in str(refusal)
