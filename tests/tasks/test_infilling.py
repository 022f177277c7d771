"""Infilling tasks: what the hole is, that it tells nothing, and that its filling is judged."""

import numpy as np
import seqio
import tensorflow as tf

import tasks  # noqa: F401
from diffusion_t5x.data.detokenize import close_holes, detokenize, end_text
from diffusion_t5x.data.feature_converters import CanvasFeatureConverter
from tasks import infilling

LENGTHS = {"inputs": 96, "targets": 96}


def _examples(name, count=12, split="test"):
    dataset = seqio.get_mixture_or_task(name).get_dataset(LENGTHS, split, shuffle=False)
    return list(dataset.take(count).as_numpy_iterator())


def test_a_line_is_any_line_of_the_body_that_is_not_blank():
    program = "def f(x):\n    a = 'é'\n\n    b = x\n    return b"
    # By HumanEval-infilling's definition: every line of the solution that has more than blanks.
    expected, place = {}, 0
    for number, line in enumerate(program.split("\n")):
        if number and line.strip():
            expected[line] = (place, place + len(line))
        place += len(line) + 1
    seen = set()
    for number in range(26):  # other names, other lines
        renamed = program.replace("x", chr(ord("a") + number % 26))
        start, end = (int(x) for x in infilling.line_hole(tf.constant(renamed)))
        assert (start, end) in expected.values()
        seen.add((start, end))
    assert seen == set(expected.values())


def test_a_span_is_in_the_body_and_never_empty():
    program = "def f(x):\n    return x"
    spans = set()
    for number in range(60):
        start, end = infilling.span_hole(tf.constant(program.replace("x", str(1000 + number))))
        spans.add((int(start), int(end)))
        assert len("def f(1000):\n") <= start < end <= len(program) + 6
    assert len(spans) > 30


def test_examples_are_the_embedded_ones_with_a_hole_that_hides_its_length():
    # The first of the one are among the first of the other: both are in the order of the file.
    whole = {e["code"]: e for e in _examples("embedded_code", 24)}
    for name in (infilling.LINE, infilling.SPAN):
        examples = _examples(name)
        for example in examples:
            code = example["code"].decode()
            assert example["inputs_pretokenized"] == whole[example["code"]]["inputs_pretokenized"]
            before, hole, after = (example[part].decode() for part in ("before", "hole", "after"))
            assert before + hole + after == code
            fixed = example["decoder_fixed_positions"]
            assert fixed.shape == (96,)
            [start], size = np.flatnonzero(np.diff(fixed, prepend=1) == -1), 32
            np.testing.assert_array_equal(np.flatnonzero(fixed == 0), start + np.arange(size))
            vocabulary = seqio.get_mixture_or_task(name).output_features["targets"].vocabulary
            known = example["targets"] * fixed[: len(example["targets"])]
            assert vocabulary.decode([int(t) for t in known if t > 1]) == before + after
            if name == infilling.LINE:
                assert hole in code.split("\n")[1:]
            # What a perfect model writes is the program again.
            canvas = np.pad(example["targets"], (0, 96 - len(example["targets"])))
            assert detokenize(close_holes(canvas, fixed == 1, 1), vocabulary) == code
    again = _examples(infilling.SPAN)
    assert [e["hole"] for e in again] == [e["hole"] for e in examples]


def test_a_filled_program_is_run_and_compared():
    task = seqio.get_mixture_or_task(infilling.LINE)
    examples = _examples(infilling.LINE, 3)
    targets = [task.postprocess_fn("", example=e, is_target=True) for e in examples]
    fillings = [
        examples[0]["hole"].decode(),
        "    pass",
        "    numbers = list(numbers)\n" + examples[2]["hole"].decode(),
    ]
    programs = [
        task.postprocess_fn(
            e["before"].decode() + text + e["after"].decode(), example=e, is_target=False
        )
        for e, text in zip(examples, fillings, strict=True)
    ]
    [metric] = task.predict_metric_fns
    found = metric(targets, programs)
    assert found["pass_at_1"] == 2 / 3
    assert found["exact_match"] == 1 / 3


def test_a_task_converts_with_its_fixed_positions_and_others_without():
    for name in (infilling.LINE, "embedded_code"):
        dataset = seqio.get_mixture_or_task(name).get_dataset(LENGTHS, "test", shuffle=False)
        converted = CanvasFeatureConverter()(dataset.take(2), LENGTHS)
        examples = list(converted.as_numpy_iterator())
        assert ("decoder_fixed_positions" in examples[0]) == (name == infilling.LINE)
        assert all(len(x) == 96 for x in examples[0].values())


def test_holes_are_closed_and_what_follows_the_text_is_no_hole():
    tokens = np.array([5, 0, 7, 1, 0, 8, 9, 0, 0, 4])
    fixed = np.array([1, 0, 0, 0, 0, 1, 0, 0, 0, 0], bool)
    np.testing.assert_array_equal(close_holes(tokens, fixed, 1), [5, 7, 8, 9, 0, 0, 4, 0, 0, 0])
    np.testing.assert_array_equal(
        end_text(close_holes(tokens, fixed, 1), 1), [5, 7, 8, 9, 1, 1, 1, 1, 1, 1]
    )
