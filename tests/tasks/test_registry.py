"""Every registered task gives examples that fit, and full marks to the right answer."""

import dataclasses
import functools
import itertools
import re
import sys

import numpy as np
import pytest
import seqio
import toy

import tasks
from diffusion_t5x.data import datasets
from diffusion_t5x.data.datasets import DatasetConfig
from diffusion_t5x.data.feature_converters import CanvasFeatureConverter
from diffusion_t5x.data.vocabularies import get_vocabulary
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.training.loop import train
from diffusion_t5x.training.train_step import Trainer

LENGTHS = {"inputs": 40, "targets": 24}
MIXTURES = ("embedded_all", "embedded_pretrain_prefix_lm", "embedded_pretrain_span_corruption")
FAMILIES = ("wmt14", "squad", "mbpp", "human", "mc4", "the", "pretrain", "embedded")
# A task, the metrics of a perfect prediction, and those of an empty one.
TASKS = {
    "embedded_translation_en_fr": (
        {"exact_match": 1, "bleu": 100},
        {"exact_match": 0, "bleu": 0},
    ),
    "embedded_qa": ({"f1": 100, "em": 100, "exact_match": 1}, {"f1": 0, "em": 0, "exact_match": 0}),
    "embedded_code": (
        {"exact_match": 1, "pass_at_1": 1, "invalid_programs": 0},
        {"exact_match": 0, "pass_at_1": 0, "invalid_programs": 1},
    ),
}
NAMES = tuple(
    name
    for registry in (seqio.TaskRegistry, seqio.MixtureRegistry)
    for name in registry.names()
    if name.startswith("embedded_")
)


def _examples(name, split, count=20, lengths=None, **kwargs):
    dataset = seqio.get_mixture_or_task(name).get_dataset(
        sequence_length=lengths or LENGTHS, split=split, shuffle=False, **kwargs
    )
    return list(itertools.islice(dataset.as_numpy_iterator(), count))


def _text(example, feature):
    return example[f"{feature}_pretokenized"].decode()


def test_the_registry_is_what_the_module_says():
    assert set(MIXTURES) | set(TASKS) <= set(NAMES)
    documented = {
        name
        for line in tasks.__doc__.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    registered = set(seqio.TaskRegistry.names()) | set(seqio.MixtureRegistry.names())
    assert documented <= registered
    # What is not named there is a part of a mixture that is.
    parts = {
        part for name in documented for part in seqio.get_subtasks(seqio.get_mixture_or_task(name))
    }
    assert {name for name in registered if name.split("_")[0] in FAMILIES} <= (
        documented | {part.name for part in parts}
    )


@pytest.mark.parametrize(
    "split", ["validation", *(pytest.param(s, marks=pytest.mark.slow) for s in ("train", "test"))]
)
@pytest.mark.parametrize("name", NAMES)
def test_examples_fit_their_lengths_and_end_with_end_of_text(name, split):
    examples = _examples(name, split)
    assert len(examples) == 20
    vocabulary = get_vocabulary()
    for example in examples:
        for feature, length in LENGTHS.items():
            tokens = example[feature]
            assert 1 <= len(tokens) <= length
            padded = "infilling" in name and feature == "targets"  # holes are
            assert tokens.min() > 0 or padded
            assert tokens.max() < vocabulary.vocab_size
        assert example["targets"][-1] == vocabulary.eos_id
        assert vocabulary.eos_id not in example["targets"][:-1]
        # The network reads inputs and targets as one text, which ends only once.
        assert vocabulary.eos_id not in example["inputs"]


@pytest.mark.parametrize("name", MIXTURES)  # which together have every task
def test_every_mixture_is_read_in_batches_for_training_and_evaluation(name):
    cfg = DatasetConfig(name, LENGTHS, "train", 4, shuffle=False, module="diffusion_t5x.tasks")
    batch = next(datasets.get_training_iterator(cfg, CanvasFeatureConverter))
    assert batch["encoder_input_tokens"].shape == (4, LENGTHS["inputs"])
    assert batch["decoder_target_tokens"].shape == (4, LENGTHS["targets"])
    held_out = dataclasses.replace(cfg, split="test")
    [first] = datasets.get_eval_batches(held_out, CanvasFeatureConverter, num_batches=1)
    assert first["decoder_target_tokens"].shape == (4, LENGTHS["targets"])
    assert not np.array_equal(batch["decoder_target_tokens"], first["decoder_target_tokens"])


@pytest.mark.parametrize("name", TASKS)
def test_the_right_answer_gets_full_marks_and_silence_none(name):
    task = seqio.get_mixture_or_task(name)
    vocabulary = get_vocabulary()
    examples = _examples(name, "validation", lengths={"inputs": 256, "targets": 256})
    targets = [
        task.postprocess_fn(_text(example, "targets"), example=example, is_target=True)
        for example in examples
    ]
    for answer, expected in zip(
        (lambda e: vocabulary.decode(e["targets"].tolist()), lambda e: ""), TASKS[name], strict=True
    ):
        predictions = [
            task.postprocess_fn(answer(example), example=example, is_target=False)
            for example in examples
        ]
        scores = {}
        for metric_fn in task.predict_metric_fns:
            scores |= metric_fn(targets, predictions)
        assert scores == pytest.approx(expected)


def test_code_shows_the_first_assertion_alone_and_is_judged_by_all():
    for example in _examples("embedded_code", "test"):
        description, shown, rest = _text(example, "inputs").split("\n")
        assert description.startswith("Write a function")
        assert rest == ""
        target = seqio.get_mixture_or_task("embedded_code").postprocess_fn(
            "", example=example, is_target=True
        )
        assert len(target["tests"]) == 3
        assert target["tests"][0] == shown
        assert target["tests"][1] not in _text(example, "inputs")
        assert target["code"] == _text(example, "targets")


def test_the_answer_to_a_question_is_a_span_of_the_inputs():
    for example in _examples("embedded_qa", "test"):
        question, context = _text(example, "inputs").split("\n", 1)
        assert question.endswith("?")
        assert _text(example, "targets") in context


@pytest.mark.parametrize("objective", ["prefix_lm", "span_corruption"])
def test_pretraining_is_four_parts_of_prose_and_one_of_source(objective):
    mixture = seqio.get_mixture_or_task(f"embedded_pretrain_{objective}")
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    assert rates == {f"embedded_prose_{objective}": 80, f"embedded_source_{objective}": 20}


def test_documents_are_drawn_at_these_rates():
    name = "embedded_pretrain_prefix_lm"
    drawn = _examples(name, "train", 1000, seed=0, num_epochs=None)
    single = {
        corpus: {
            tuple(np.concatenate([e["inputs"], e["targets"]]))
            for e in _examples(f"embedded_{corpus}_prefix_lm", "train", 1500, seed=0)
        }
        for corpus in ("prose", "source")
    }
    whole = [tuple(np.concatenate([e["inputs"], e["targets"]])) for e in drawn]
    prose = np.mean([tokens in single["prose"] for tokens in whole])
    source = np.mean([tokens in single["source"] for tokens in whole])
    assert prose == pytest.approx(0.8, abs=0.05)
    assert source == pytest.approx(0.2, abs=0.05)


def test_any_two_locales_make_a_task_which_is_registered_once():
    name = tasks.register_translation("en", "de")
    assert name == "embedded_translation_en_de"
    assert tasks.register_translation("en", "de") == name
    assert name in seqio.TaskRegistry.names()


@pytest.mark.parametrize("pair", [("en", "klingon"), ("xx", "fr")])
def test_a_locale_that_is_none_registers_nothing(pair):
    with pytest.raises(ValueError, match=r"locale '(klingon|xx)' is not in CLDR"):
        tasks.register_translation(*pair)
    assert "embedded_translation_{}_{}".format(*pair) not in seqio.TaskRegistry.names()


USERS_MODULE = """
import seqio, tensorflow as tf
from tasks import metrics
from tasks.features import output_features

@seqio.map_over_dataset
def split_line(line):
    return dict(zip(("inputs", "targets"), tf.unstack(tf.strings.split(line, "|"), 2)))

seqio.TaskRegistry.add(
    "users_reversal",
    source=seqio.TextLineDataSource({"train": FILE, "validation": FILE}),
    preprocessors=[split_line, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features=output_features(),
    metric_fns=[metrics.exact_match],
)
"""


def test_a_users_own_task_trains_from_a_module_of_its_own(tmp_path, monkeypatch):
    lines = [f"word {number}|{number} drow\n" for number in range(20)]
    (tmp_path / "lines.txt").write_text("".join(lines))
    module = USERS_MODULE.replace("FILE", repr(str(tmp_path / "lines.txt")))
    (tmp_path / "users_tasks.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    cfg = DatasetConfig(
        "users_reversal",
        {"inputs": 12, "targets": 12},
        "train",
        batch_size=8,
        shuffle=True,
        module="users_tasks",
    )
    try:
        model = toy.model("autoregressive", vocab_size=get_vocabulary().vocab_size)
        model.input_vocabulary = model.output_vocabulary = get_vocabulary()
        state = train(
            model=model,
            model_dir=str(tmp_path / "run"),
            train_dataset_cfg=cfg,
            partitioner=PjitPartitioner(),
            trainer_cls=functools.partial(Trainer, learning_rate_fn=lambda step: 1e-2),
            total_steps=2,
        )
        assert int(state.step) == 2
        held_out = dataclasses.replace(cfg, split="validation")
        batches = list(datasets.get_eval_batches(held_out, model.FEATURE_CONVERTER_CLS))
        texts = {
            get_vocabulary().decode(row.tolist())
            for batch in batches
            for row in batch["decoder_target_tokens"]
        }
        assert texts == {f"{number} drow" for number in range(20)} | {""}
    finally:
        seqio.TaskRegistry.remove("users_reversal")
        sys.modules.pop("users_tasks", None)
