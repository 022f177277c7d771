"""What the lengths cut of texts is counted, in the data of training and of evaluation."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from diffusion_t5x.data import lengths, preprocessors
from diffusion_t5x.data.datasets import DatasetConfig
from diffusion_t5x.data.lengths import Cut

LENGTHS = {"inputs": 10, "targets": 6}
# Of bytes, and of targets with the end of text.
TEXTS = [("x" * n, "y" * m) for n, m in ((3, 2), (10, 5), (11, 6), (500, 1), (8, 30))]
EXPECTED = {"inputs": Cut(2, 5, 491, 532, 490), "targets": Cut(2, 5, 26, 49, 25)}


def _register(monkeypatch, name, steps, texts=TEXTS):
    monkeypatch.setattr(seqio.TaskRegistry, "_REGISTRY", dict(seqio.TaskRegistry._REGISTRY))
    monkeypatch.setattr(seqio.MixtureRegistry, "_REGISTRY", {})
    vocabulary = seqio.ByteVocabulary()
    inputs, targets = (tf.constant(column) for column in zip(*texts, strict=True))
    return seqio.TaskRegistry.add(
        name,
        seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
                {"inputs": inputs, "targets": targets}
            ),
            splits=("train",),
        ),
        preprocessors=steps,
        output_features={
            "inputs": seqio.Feature(vocabulary, add_eos=False),
            "targets": seqio.Feature(vocabulary, add_eos=True),
        },
        metric_fns=[lambda targets, predictions: {}],
    )


STEPS = {
    "ours": [preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
    "seqio's": [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
    "trimmed at the end": [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
}


@pytest.mark.parametrize("steps", STEPS)
def test_what_is_cut_is_counted_as_python_does(steps, monkeypatch):
    task = _register(monkeypatch, "test_cut", STEPS[steps])
    assert lengths.count_cut(task, LENGTHS, "train", shuffle=False) == EXPECTED
    assert lengths.count_cut(task, LENGTHS, "train", 2, shuffle=False) == {}
    longer = {"inputs": 500, "targets": 31}
    assert lengths.count_cut(task, longer, "train", shuffle=False) == {}


def test_training_and_evaluation_say_it(monkeypatch, capsys):
    _register(monkeypatch, "test_cut", STEPS["ours"])
    cfg = DatasetConfig("test_cut", LENGTHS, "train", 2, shuffle=True)
    lengths.report_cut(cfg, seed=0)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "the beginning of test_cut:train: 2 of 5 examples have longer inputs than "
        "TASK_FEATURE_LENGTHS['inputs'] = 10 tokens. They lose 491 tokens, 92.3% of all, and up to "
        "490 each.",
        "the beginning of test_cut:train: 2 of 5 examples have longer targets than "
        "TASK_FEATURE_LENGTHS['targets'] = 6 tokens. They lose 26 tokens, 53.1% of all, and up to "
        "25 each.",
    ]
    seqio.MixtureRegistry.add("test_cut_mixture", [("test_cut", 1)])
    lengths.report_cut(DatasetConfig("test_cut_mixture", LENGTHS, "train", 2))
    assert capsys.readouterr().out.splitlines() == said

    def evaluated(limits):
        evaluator = seqio.Evaluator(
            "test_cut",
            feature_converter=seqio.EncDecFeatureConverter(pack=False),
            eval_split="train",
            sequence_length=limits,
        )
        cfg = DatasetConfig("test_cut", limits, "train", 2)
        return lengths.cut_of_evaluated("test_cut", evaluator, cfg, None)

    assert evaluated(LENGTHS) == EXPECTED
    assert evaluated(None) == {}
    # Where no example is as long as it may be, none is read a second time.
    monkeypatch.setattr(lengths, "_untrimmed", None)
    assert evaluated({"inputs": 501, "targets": 32}) == {}


def test_tasks_that_make_their_texts_fit_lose_nothing(monkeypatch):
    steps = [
        lambda dataset: dataset.map(lambda x: {"targets": x["inputs"]}),
        seqio.preprocessors.tokenize,
        preprocessors.prefix_lm,
        seqio.preprocessors.append_eos_after_trim,
    ]
    task = _register(monkeypatch, "test_fits", steps)
    assert lengths.count_cut(task, LENGTHS, "train", shuffle=False) == {}


def test_no_more_of_a_text_is_tokenized_than_fits():

    features = {name: seqio.Feature(seqio.ByteVocabulary(), add_eos=False) for name in LENGTHS}
    texts = ["é" * 4_500_000, "", "short"]
    dataset = tf.data.Dataset.from_tensor_slices({"inputs": texts, "targets": texts, "id": texts})
    rows = list(preprocessors.tokenize(dataset, features, LENGTHS).as_numpy_iterator())
    whole = list(seqio.preprocessors.tokenize(dataset, features).as_numpy_iterator())
    for row, full in zip(rows, whole, strict=True):
        assert row.keys() == full.keys()
        for name, length in LENGTHS.items():
            most = 2 * length * preprocessors.MOST_CHARACTERS_PER_TOKEN
            np.testing.assert_array_equal(row[name], full[name][:most])
            assert row[f"{name}_pretokenized"] == full[f"{name}_pretokenized"]
        assert row["id"] == full["id"]
    rows = list(preprocessors.tokenize(dataset, features).as_numpy_iterator())
    assert len(rows[0]["inputs"]) == 9_000_000
