"""The paper's tasks on TFDS data sets: what reaches the model, and the metrics of its answers."""

import subprocess
import sys

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
from seqio import utils as seqio_utils

import tasks  # noqa: F401
from diffusion_t5x.data import tfds_source
from diffusion_t5x.data.vocabularies import get_vocabulary
from tasks import pretraining, question_answering, tfds_mbpp, translation

TEXT = tfds.features.Text()
TEXTS = tfds.features.Sequence(tfds.features.Text())
# Data set -> its features, as published.
FEATURES = {
    translation.WMT14_TFDS: tfds.features.Translation(languages=("fr", "en")),
    question_answering.SQUAD_TFDS: tfds.features.FeaturesDict(
        {
            "id": np.str_,
            "title": TEXT,
            "context": TEXT,
            "question": TEXT,
            "answers": tfds.features.Sequence({"text": TEXT, "answer_start": np.int32}),
        }
    ),
    tfds_mbpp.NAME: tfds.features.FeaturesDict(
        {
            "task_id": np.int32,
            "text": TEXT,
            "code": TEXT,
            "test_list": TEXTS,
            "test_setup_code": TEXT,
            "challenge_test_list": TEXTS,
        }
    ),
    pretraining.MC4_TFDS: tfds.features.FeaturesDict(
        dict.fromkeys(("text", "url", "content-type", "content-length", "timestamp"), TEXT)
    ),
}
SPLITS = {
    translation.WMT14_TFDS: {"train": 40_836_715, "validation": 3_000, "test": 3_003},
    question_answering.SQUAD_TFDS: {"train": 87_599, "validation": 10_570},
    tfds_mbpp.NAME: {"train": 374, "validation": 90, "test": 500, "prompt": 10},
    # Millions of pages (Xue et al. 2021, table 6).
    pretraining.MC4_TFDS: {
        split: pages
        for language, pages in {"en": 3_067, "ru": 756, "es": 416, "fr": 333}.items()
        for split in (language, f"{language}-validation")
    },
}
ROWS = {
    translation.WMT14_TFDS: [{"en": "In 5 minutes\u2028.", "fr": "Dans 5 minutes."}],
    question_answering.SQUAD_TFDS: [
        {
            "id": "1",
            "title": "Towers",
            "context": "The tower is 330 m tall.",
            "question": "How tall is it?",
            "answers": {"text": ["330 m", "330 m tall"], "answer_start": [13, 13]},
        }
    ],
    tfds_mbpp.NAME: [
        {
            "task_id": 11,
            "text": "Write a function to add.",
            "code": "def add(a, b):\r\n\treturn a + b",
            "test_list": ["assert add(1, 2) == 3", "assert add(ONE, 1) == 2"],
            "test_setup_code": "ONE = 1",
            "challenge_test_list": ["assert False"],
        },
        {
            "task_id": 12,
            "text": "Write one.",
            "code": "one = 1",
            "test_list": ["assert one == 1"],
            "test_setup_code": "",
            "challenge_test_list": [],
        },
    ],
    pretraining.MC4_TFDS: [
        {
            "text": "A page of text, and of no other.",
            **dict.fromkeys(("url", "content-type", "content-length", "timestamp"), "x"),
        }
    ],
}
LENGTHS = {"inputs": 128, "targets": 64}


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """A data directory that knows the splits of the data sets, but has none of their examples."""
    directory = str(tmp_path_factory.mktemp("tfds"))
    for name, splits in SPLITS.items():
        builder = tfds.builder(name, data_dir=directory)
        tf.io.gfile.makedirs(str(builder.data_dir))
        template = dict(dataset_name=builder.name, filetype_suffix="tfrecord")
        infos = [
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[count],
                num_bytes=1,
                filename_template=tfds.core.ShardedFileTemplate(
                    data_dir=builder.data_dir, split=split, **template
                ),
            )
            for split, count in splits.items()
        ]
        builder.info.set_splits(tfds.core.splits.SplitDict(infos))
        builder.info.write_to_directory(builder.data_dir)
    return directory


@pytest.fixture
def mocked(metadata, monkeypatch):
    """TFDS gives ROWS, in the form that the features of the real data set say."""
    monkeypatch.setattr(seqio_utils.LazyTfdsLoader, "_MEMOIZED_BUILDERS", {})

    def as_dataset(builder, split, **kwargs):
        reference = builder.get_reference().tfds_name()
        name = next(name for name in ROWS if name == reference)
        spec = tf.nest.map_structure(
            lambda info: tf.TensorSpec(info.shape, info.dtype),
            builder.info.features.get_tensor_info(),
        )
        rows = [tf.nest.map_structure(tf.convert_to_tensor, row) for row in _as_lists(ROWS[name])]
        return tf.data.Dataset.from_generator(lambda: iter(rows), output_signature=spec)

    with tfds.testing.mock_data(as_dataset_fn=as_dataset, data_dir=metadata):
        yield


def _as_lists(rows):
    """Lists as arrays of strings, so that an empty one has a type."""
    if isinstance(rows, dict):
        return {name: _as_lists(value) for name, value in rows.items()}
    if isinstance(rows, list) and not any(isinstance(row, dict) for row in rows):
        return np.array(rows, np.int32 if rows and isinstance(rows[0], int) else object)
    return [_as_lists(row) for row in rows] if isinstance(rows, list) else rows


def _examples(name, split, **kwargs):
    task = seqio.get_mixture_or_task(name)
    dataset = task.get_dataset(
        LENGTHS, split, shuffle=False, shard_info=seqio.ShardInfo(0, 1), **kwargs
    )
    return list(dataset.as_numpy_iterator())


def _check(example, inputs, targets):
    """The tokens of an example are those of these texts, and nothing else."""
    vocabulary = get_vocabulary()
    assert example["inputs"].tolist() == list(vocabulary.encode(inputs))
    assert example["targets"].tolist() == [*vocabulary.encode(targets), vocabulary.eos_id]
    assert vocabulary.unk_id not in example["inputs"]


def _scores(name, examples, answers):
    task = seqio.get_mixture_or_task(name)
    targets = [
        task.postprocess_fn(e["targets_pretokenized"].decode(), example=e, is_target=True)
        for e in examples
    ]
    predictions = [
        task.postprocess_fn(answer, example=e, is_target=False)
        for e, answer in zip(examples, answers, strict=True)
    ]
    [metric_fn] = task.predict_metric_fns
    return metric_fn(targets, predictions)


@pytest.mark.parametrize("name", FEATURES)
def test_features_are_those_of_the_published_data_set(name, metadata):
    found = tfds.builder(name, data_dir=metadata).info.features.get_tensor_info()
    assert found == FEATURES[name].get_tensor_info()


@pytest.mark.parametrize(
    "name,split",
    [("wmt14_en_fr", "train"), ("squad_v1_1", "train"), ("mc4_fr_prefix_lm", "validation")],
)
def test_any_text_of_these_features_becomes_tokens(name, split, metadata, monkeypatch):
    monkeypatch.setattr(seqio_utils.LazyTfdsLoader, "_MEMOIZED_BUILDERS", {})
    with tfds.testing.mock_data(num_examples=5, data_dir=metadata):
        examples = _examples(name, split)
    assert len(examples) == 5
    for example in examples:
        assert example["targets"][-1] == get_vocabulary().eos_id
        assert len(example["inputs"]) >= 1
        assert len(example["targets"]) >= 2


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_wmt14_translates_both_ways(split, mocked):
    english, french = "In 5 minutes\u2028.", "Dans 5 minutes."
    for name, inputs, targets in (
        ("wmt14_en_fr", english, french),
        ("wmt14_fr_en", french, english),
    ):
        [example] = _examples(name, split)
        _check(example, inputs, targets)
        assert _scores(name, [example], [targets])["bleu"] == pytest.approx(100)
        assert _scores(name, [example], ["nothing of it"])["bleu"] < 1


@pytest.mark.parametrize("split", ["train", "validation"])
def test_squad_reads_question_and_context_and_takes_any_reference(split, mocked):
    [example] = _examples("squad_v1_1", split)
    _check(example, "How tall is it?\nThe tower is 330 m tall.\n", "330 m")
    for answer in ("330 m", "330 m tall", "The 330 m"):
        scores = _scores("squad_v1_1", [example], [answer])
        assert (scores["f1"], scores["em"]) == (100, 100)
    scores = _scores("squad_v1_1", [example], ["tall tower"])
    assert scores["f1"] == pytest.approx(100 * 0.4)  # 1 of 2 tokens given, 1 of 3 wanted
    assert scores["em"] == scores["exact_match"] == 0


@pytest.mark.parametrize("split", SPLITS[tfds_mbpp.NAME])
def test_mbpp_shows_all_assertions_and_runs_them_after_their_setup(split, mocked):
    add, one = _examples("mbpp", split)
    assertions = "assert add(1, 2) == 3\nassert add(ONE, 1) == 2"
    code = "def add(a, b):\n\treturn a + b"  # with line ends as Python writes them
    _check(add, f"Write a function to add.\n{assertions}\n", code)
    _check(one, "Write one.\nassert one == 1\n", "one = 1")
    right, wrong = "def add(x, y): return y + x", "def add(x, y): return 3"
    scores = _scores("mbpp", [add, one], [[wrong] * 9 + [right], ["one = 1"] * 10])
    assert scores == {
        "exact_match": 0.5,
        "pass_at_1": pytest.approx(0.55),
        "pass_at_10": pytest.approx(1.0),
        "invalid_programs": 0.0,
    }
    scores = _scores("mbpp", [add, one], [code, "one = 2"])
    assert scores == {"exact_match": 0.5, "pass_at_1": 0.5, "invalid_programs": 0.0}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_page_of_mc4_is_a_document(split, mocked):
    [example] = _examples("mc4_fr_prefix_lm", split, seed=0)
    tokens = [*example["inputs"], *example["targets"][:-1]]
    assert get_vocabulary().decode([int(t) for t in tokens]) == "A page of text, and of no other."


def test_languages_are_drawn_at_mt5s_rates(mocked):
    mixture = seqio.get_mixture_or_task("mc4_prefix_lm")
    rates = {
        language: mixture.get_rate(seqio.TaskRegistry.get(f"mc4_{language}_prefix_lm"))
        for language in ("en", "ru", "es", "fr")
    }
    # Percent of training examples (Xue et al. 2021, table 6), relative to English.
    published = {"en": 5.67, "ru": 3.71, "es": 3.09, "fr": 2.89}
    for language, percent in published.items():
        assert rates[language] / rates["en"] == pytest.approx(percent / published["en"], abs=0.01)


def test_the_languages_are_those_of_the_data_set():
    from tensorflow_datasets.text import c4

    assert list(pretraining.MC4_LANGUAGES) == c4.MC4_LANGUAGES


@pytest.mark.parametrize("objective", ["prefix_lm", "span_corruption"])
def test_four_fifths_of_pretraining_are_mc4_and_the_rest_python(objective, monkeypatch):
    monkeypatch.setattr(seqio.TfdsDataSource, "num_input_examples", lambda *args: 1000)
    monkeypatch.setattr(tfds_source.TfdsDataSource, "_prepare", lambda self: None)
    mixture = seqio.get_mixture_or_task(f"pretrain_{objective}")
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    assert rates.pop(f"the_stack_{objective}") == pytest.approx(20)
    assert len(rates) == len(pretraining.MC4_LANGUAGES)
    assert sum(rates.values()) == pytest.approx(80)
    assert list(rates.values()) == pytest.approx([80 / len(rates)] * len(rates))


def test_the_stack_says_what_to_set_where_it_is_not():
    with pytest.raises(ValueError, match=r"TFDS lacks 'the_stack'; set LOCAL_FILES = \{'the_st"):
        seqio.get_mixture_or_task("the_stack_prefix_lm").get_dataset(LENGTHS, "train")


def test_the_mbpp_builder_deals_problems_by_their_numbers(tmp_path, monkeypatch):
    lines = tmp_path / "mbpp.jsonl"
    row = '{{"task_id": {}, "text": "t", "code": "c", "test_list": ["a"], "test_setup_code": "", ' \
        '"challenge_test_list": []}}\n'  # fmt: skip
    lines.write_text("".join(row.format(number) for number in range(1, 975)))
    builder = tfds.builder(tfds_mbpp.NAME, data_dir=str(tmp_path / "data"))
    manager = type("Manager", (), {"download": lambda self, url: str(lines)})()
    splits = {
        split: [key for key, _ in examples]
        for split, examples in builder._split_generators(manager).items()
    }
    assert splits == {
        "prompt": list(range(1, 11)),
        "test": list(range(11, 511)),
        "validation": list(range(511, 601)),
        "train": list(range(601, 975)),
    }
    assert "/2251e8c67a7fe7d6348714967ee101080b28e956/" in tfds_mbpp._URL


def test_a_data_set_that_is_not_there_and_cannot_be_prepared_is_named(tmp_path, monkeypatch):
    source = tfds_source.TfdsDataSource(tfds_mbpp.NAME, str(tmp_path), splits=("test",))

    def fail(self, *args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    for ask in (source.list_shards, source.num_input_examples, source.get_dataset):
        with pytest.raises(
            RuntimeError, match=r"'mbpp/full:1.0.0' is not in .*no network.*LOCAL_F"
        ):
            ask("test")


def test_registering_the_tasks_and_reading_embedded_ones_touches_no_network():
    script = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise AssertionError('a connection')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import tasks, seqio\n"
        "task = seqio.get_mixture_or_task('embedded_all')\n"
        "next(iter(task.get_dataset({'inputs': 8, 'targets': 8}, 'test', shuffle=False)))\n"
        "from seqio import utils\n"
        "print(len(utils.LazyTfdsLoader._MEMOIZED_BUILDERS), len(seqio.TaskRegistry.names()))\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout.split()
    assert out[0] == "0"
    assert int(out[1]) > 200
