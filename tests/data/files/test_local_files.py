"""Users' files as sources: chosen by gin, checked once, resumed at the exact example."""

import gzip
import itertools
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import seqio
import tensorflow as tf

import gin
from diffusion_t5x.data import datasets
from diffusion_t5x.data.data_shards import DataLayout
from diffusion_t5x.data.datasets import DatasetConfig
from diffusion_t5x.data.embedded import file_cache
from diffusion_t5x.data.feature_converters import CanvasFeatureConverter, EncDecFeatureConverter
from diffusion_t5x.data.files import local_files, records
from diffusion_t5x.data.files.local_files import LocalFilesDataSource
from diffusion_t5x.data.files.readers import TEXT, TEXTS, Documents, JsonLines, ParallelText

NAME = "test_source"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(file_cache.CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setattr(local_files, "_KNOWN", set())


def _bind(files, **settings):
    for name, value in {"files": {NAME: files}, **settings}.items():
        gin.bind_parameter(f"diffusion_t5x.data.files.local_files.LocalFiles.{name}", value)


def _documents(**kwargs):
    return LocalFilesDataSource(
        NAME,
        lambda settings: Documents(settings.text_field or "text", settings.documents),
        **kwargs,
    )


def _write(directory, name, texts):
    directory.mkdir(exist_ok=True)
    path = directory / name
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    path.write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
    return str(path)


def _texts(source, split="train", **kwargs):
    dataset = source.get_dataset(split, **{"shuffle": False, **kwargs})
    return [example["text"].decode() for example in dataset.as_numpy_iterator()]


def test_files_of_a_split_are_read_in_the_order_of_their_names_and_lines(tmp_path):
    texts = [f"t{number}" for number in range(60)]
    for number in range(3):
        _write(tmp_path / "data", f"{number}.jsonl.gz", texts[20 * number : 20 * number + 20])
    extra = _write(tmp_path / "more", "extra[1].jsonl", ["x"])
    source = _documents()
    _bind({"train": (str(tmp_path / "data/*.gz"), extra), "validation": extra})
    assert set(source.splits) == {"train", "validation"}
    assert _texts(source) == [*texts, "x"]
    assert _texts(source, "validation") == ["x"]
    assert source.num_input_examples("train") == 61
    shuffled = _texts(source, shuffle=True, seed=1)
    assert shuffled != _texts(source)
    assert sorted(shuffled) == sorted(_texts(source))
    assert shuffled == _texts(source, shuffle=True, seed=1)


def test_a_file_that_two_patterns_match_is_read_once(tmp_path):
    path = _write(tmp_path / "data", "a.jsonl", ["a"])
    _bind({"train": [path, str(tmp_path / "**" / "*.jsonl")]})
    assert _texts(_documents()) == ["a"]


def test_files_may_lie_wherever_tensorflow_reads(tmp_path):
    _write(tmp_path / "data", "a.jsonl", ["a"])
    _write(tmp_path / "data", "b.jsonl.gz", ["b"])
    _bind({"train": f"file://{tmp_path}/data/*.jsonl*"})
    assert _texts(_documents()) == ["a", "b"]


@pytest.mark.parametrize("shuffle", [False, True])
def test_data_shards_divide_the_examples_evenly(shuffle, tmp_path):
    for number, size in enumerate((5, 1, 2)):
        texts = [f"{number}{line}" for line in range(size)]
        _write(tmp_path / "data", f"{number}.jsonl", texts)
    _bind({"train": str(tmp_path / "data/*")})
    source = _documents()
    shards = [
        _texts(source, shuffle=shuffle, seed=3, shard_info=seqio.ShardInfo(index, 2))
        for index in range(2)
    ]
    assert [len(shard) for shard in shards] == [4, 4]
    assert sorted(itertools.chain(*shards)) == _texts(source)
    if not shuffle:
        assert shards == [["00", "02", "04", "20"], ["01", "03", "10", "21"]]


def test_lists_are_vectors_and_missing_texts_empty(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "t", "tests": ["a", "é"]}\n{"text": "u", "tests": ["b"]}\n')
    source = LocalFilesDataSource(NAME, lambda settings: JsonLines({"text": TEXT, "tests": TEXTS}))
    _bind({"test": str(path)})
    dataset = source.get_dataset("test", shuffle=False)
    assert dataset.element_spec["tests"] == tf.TensorSpec([None], tf.string)
    rows = list(dataset.as_numpy_iterator())
    assert [row["tests"].tolist() for row in rows] == [[b"a", "é".encode()], [b"b"]]
    assert [row["text"] for row in rows] == [b"t", b"u"]


def test_parallel_files_are_paired_by_the_order_of_their_names(tmp_path):
    for name, text in {"a.en": "1", "b.en": "2", "a.fr": "un", "b.fr": "deux"}.items():
        (tmp_path / name).write_text(text)
    reader = ParallelText(("en", "fr"), ("en", "fr"))
    source = LocalFilesDataSource(NAME, lambda settings: reader)
    _bind({"train": {"fr": str(tmp_path / "*.fr"), "en": str(tmp_path / "*.en")}})
    rows = list(source.get_dataset("train", shuffle=False).as_numpy_iterator())
    assert rows == [{"en": b"1", "fr": b"un"}, {"en": b"2", "fr": b"deux"}]
    (tmp_path / "c.en").write_text("3")
    with pytest.raises(ValueError, match="'en' has 3 files, but 'fr' has 2"):
        source.get_dataset("train")
    _bind({"train": {"en": str(tmp_path / "*.en")}})
    with pytest.raises(ValueError, match=r"expected \{'en': FILES, 'fr': FILES\}"):
        source.get_dataset("train")


def test_what_is_refused_is_said_once_with_the_first_few_reasons(tmp_path, capsys):
    path = _write(tmp_path / "data", "a.jsonl", ["a", "", "b", "", "", "", "c"])
    _bind({"train": path})
    source = _documents()
    assert _texts(source) == ["a", "b", "c"]
    assert _texts(source) == ["a", "b", "c"]
    out = capsys.readouterr().out
    assert out.count("test_source:train: 3 records, 4 refused") == 1
    reasons = [line for line in out.splitlines() if line.startswith("  ")]
    assert reasons == [
        f"  {path}:{line}: 'text' is empty, expected a text that is not empty" for line in (2, 4, 5)
    ]


def test_a_split_whose_records_are_all_refused_stops_the_run(tmp_path):
    bad, empty = (_write(tmp_path / "data", f"{n}.jsonl", [""] * n) for n in (2, 0))
    _bind({"train": (bad, empty)})
    message = rf"test_source:train: none of 2 records of 2 files is good\n  {bad}:1: 'text' is"
    for ask in (_documents().get_dataset, _documents().num_input_examples):
        with pytest.raises(ValueError, match=message):
            ask("train")


@pytest.mark.parametrize(
    "files,message",
    [
        ({"train": "DATA/corpus.jsn"}, r"\['train'\] = 'DATA/corpus.jsn' matches no file; did you "
         r"mean 'DATA/corpus.json'\?"),
        ({"train": "DATA/*.txt"}, r"'DATA/\*.txt' matches no file\."),
        ({"train": "/no/such/place"}, r"'/no/such/place' matches no file\."),
        ({"train": "DATA"}, r"matches no file; '.*/\*' would"),
        ({"train": 3}, r"LOCAL_FILES\['test_source'\]\['train'\] = 3; expected a path, a glob"),
        ({"train": ()}, r"\['train'\] = \[\]; expected a path"),
        ({"train": (3,)}, r"\['train'\] = 3; expected a path"),
        ({"train": {"en": "x"}}, r"\['train'\] = \{'en': 'x'\}; expected a path"),
        ({"dev": "DATA/corpus.json"}, r"lacks the split 'train'; it has \['dev'\]"),
        ("DATA/corpus.json", r"LOCAL_FILES\['test_source'\] = .*; expected \{split: files\}"),
    ],
)  # fmt: skip
def test_files_that_are_not_there_or_not_given_right_are_refused(files, message, tmp_path):
    path = _write(tmp_path / "data", "corpus.json", ["a"])
    directory = str(tmp_path / "data")
    files = json.loads(json.dumps(files).replace("DATA", directory))
    _bind(files)
    with pytest.raises(ValueError, match=message.replace("DATA", directory)):
        _documents().get_dataset("train")
    assert path.startswith(directory)


def test_a_source_that_does_not_exist_is_refused_with_the_nearest(tmp_path):
    source = _documents()
    gin.bind_parameter("diffusion_t5x.data.files.local_files.LocalFiles.files", {"test_sorce": {}})
    with pytest.raises(ValueError, match=r"names 'test_sorce'.*did you mean 'test_source'.*Known"):
        source.get_dataset("train")
    gin.bind_parameter("diffusion_t5x.data.files.local_files.LocalFiles.files", "x")
    with pytest.raises(ValueError, match=r"LOCAL_FILES = 'x'; expected"):
        source.splits  # noqa: B018


def test_without_files_the_other_source_is_read_and_asked(tmp_path):
    other = seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensors({"body": "b", "n": 1}),
        splits=("test",),
        num_input_examples={"test": 7},
    )
    source = _documents(otherwise=other, to_record=lambda example: {"text": example["body"]})
    assert source.splits == ("test",)
    assert _texts(source, "test") == ["b"]
    assert source.num_input_examples("test") == 7
    assert list(source.list_shards("test")) == list(other.list_shards("test"))
    _bind({"train": _write(tmp_path / "data", "a.jsonl", ["a"])})
    assert _texts(source) == ["a"]
    gin.clear_config()
    assert source.splits == ("test",)


def test_a_setting_may_be_of_one_source_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\nthree")
    _bind({"train": str(path)})
    source = _documents()
    gin.bind_parameter(
        f"{NAME}/diffusion_t5x.data.files.local_files.LocalFiles.documents", "blank_line"
    )
    assert _texts(source) == ["one\ntwo", "three"]
    assert local_files.LocalFiles().documents == "line"


def _check(reader, *paths):
    files = tuple(map(str, paths))
    versions = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files]
    return records.check_files(reader, files, versions)


def test_a_checked_file_is_read_again_only_if_it_or_a_setting_changed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo")
    read = []

    class Spy(Documents):
        def batches(self, files):
            read.append((files, self.unit))
            return super().batches(files)

    first = _check(Spy("text"), path)
    again = _check(Spy("text"), path)
    assert first == again
    assert (first.records, first.refused, len(first.refusals)) == (2, 1, 1)
    assert len(read) == 1
    _check(Spy("text", "blank_line"), path)
    assert len(read) == 2
    path.write_text("one\n\ntwo\nthree")
    assert _check(Spy("text"), path).records == 3
    assert len(read) == 3


def _cache_files(tmp_path):
    return sorted(item for item in (tmp_path / "cache").rglob("*") if item.is_file())


def test_a_check_that_was_interrupted_leaves_nothing_and_is_made_again(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo")

    class Killed(Documents):
        def batches(self, files):
            yield from super().batches(files)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _check(Killed("text"), path)
    assert _cache_files(tmp_path) == []
    # One that is killed cannot tidy up; whoever comes next does.
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = tmp_path / "cache/local_files" / f"0.{socket.gethostname()}.{dead.pid}.tmp"
    left.mkdir()
    (left / "records.tfrecord").write_text("half")
    assert _check(Documents("text"), path).records == 2
    assert not left.exists()


@pytest.mark.parametrize("damage", ["cut", "emptied", "changed", "gone"])
def test_damaged_records_are_named_and_made_again(damage, tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"t{number}\n" for number in range(1100)))

    def make():
        checked = _check(Documents("text"), path)
        return checked, records.deal([checked], "name:train")

    expected = make()
    whole = {file: file.read_bytes() for file in _cache_files(tmp_path)}
    assert len(whole) == 2 + 1 + 16
    for file, content in whole.items():
        if damage == "gone":
            file.unlink()
        else:
            changed = content[:-10] + bytes([content[-10] ^ 1]) + content[-9:]
            file.write_bytes({"cut": content[:-7], "emptied": b""}.get(damage, changed))
        assert make() == expected
        out = capsys.readouterr().out
        assert out.count("is damaged") == 1
        assert str(file.parent) in out
        assert {file: file.read_bytes() for file in _cache_files(tmp_path)} == whole


@pytest.mark.parametrize("instead", ["a file", "a link to nothing"])
def test_what_stands_in_the_place_of_cached_records_is_damage(instead, tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_text("a\nb\n")
    expected = _check(Documents("text"), path)
    directory = pathlib.Path(expected.path).parent
    shutil.rmtree(directory)
    directory.touch() if instead == "a file" else directory.symlink_to(tmp_path / "nowhere")
    assert _check(Documents("text"), path) == expected
    assert "is damaged" in capsys.readouterr().out


def test_records_are_those_of_tensorflow_whatever_the_number_of_processes(tmp_path, monkeypatch):
    long = "é" * 70 + "x" * 20_000
    rows = [{"text": f"t{n}", "tests": ["", long][: n % 3], "setup": long} for n in range(50)]
    expected = []
    for row in rows:
        lists = {name: [value] if isinstance(value, str) else value for name, value in row.items()}
        expected.append(
            tf.train.Example(
                features=tf.train.Features(
                    feature={
                        name: tf.train.Feature(
                            bytes_list=tf.train.BytesList(value=[text.encode() for text in texts])
                        )
                        for name, texts in lists.items()
                    }
                )
            )
        )
    assert [tf.train.Example.FromString(records.encode(row)) for row in rows] == expected
    path = tmp_path / "a.tfrecord"
    path.write_bytes(b"".join(records._frame(records.encode(row)) for row in rows))
    read = tf.data.TFRecordDataset(str(path)).as_numpy_iterator()
    assert [tf.train.Example.FromString(data) for data in read] == expected


def test_several_processes_write_the_same_records_and_pass_errors_on(tmp_path, monkeypatch):
    pairs = [(f"a {n}", f"b {n}" if n % 1000 else "") for n in range(20_000)]
    files = tuple(str(tmp_path / name) for name in ("a", "b"))
    for path, texts in zip(files, zip(*pairs, strict=True), strict=True):
        pathlib.Path(path).write_text("\n".join(texts) + "\n")
    reader = ParallelText(("en", "fr"), ("en", "fr"))
    alone = _check(reader, *files)
    first = pathlib.Path(alone.path).read_bytes()
    shards = [pathlib.Path(path).read_bytes() for path in records.deal([alone], "x")]
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(records, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    together = _check(reader, *files)
    assert together == alone
    assert (together.records, together.refused) == (19_980, 20)
    assert together.refusals[1] == f"{files[1]}:1001: 'fr' is empty, expected {TEXT}"
    assert pathlib.Path(together.path).read_bytes() == first
    assert [pathlib.Path(path).read_bytes() for path in records.deal([together], "x")] == shards
    pathlib.Path(files[1]).write_text("b\n" * 19_999)
    with pytest.raises(ValueError, match=r"a has 20,000 lines, but .*b has 19,999"):
        _check(reader, *files)


def _numbers(source, seed, epochs=1, shard_info=None):
    """Returns the numbers that are the texts, shuffled as by SeqIO."""
    dataset = source.get_dataset("train", True, seed, shard_info).repeat(epochs)
    batches = dataset.shuffle(1000, seed).batch(1000).as_numpy_iterator()
    return np.concatenate([batch["text"] for batch in batches]).astype(int)


def test_processes_that_parse_end_with_the_one_that_started_them(tmp_path):
    code = """
import os, time
from diffusion_t5x.data.files import records
os.sched_getaffinity = lambda pid: {0, 1}
print(*{pid for pid in records._each(os.getpid, ((),) * 9, True)}, flush=True)
time.sleep(60)
"""
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    started = [int(pid) for pid in starter.stdout.readline().split()]
    assert started
    starter.kill()
    starter.communicate()
    for _ in range(100):
        states = [path for pid in started if (path := pathlib.Path(f"/proc/{pid}/stat")).exists()]
        if all(") Z " in path.read_text() for path in states):
            return
        time.sleep(0.1)
    pytest.fail(f"{started} outlive the process that started them")


def test_the_first_shuffled_examples_span_the_corpus_and_proportions_hold(tmp_path):
    total = 40_000
    for start, end in ((0, 30_000), (30_000, 36_000), (36_000, total)):
        lines = "".join(f"{number}\n" for number in range(start, end))
        (tmp_path / f"{start:05}.txt").write_text(lines)
    _bind({"train": str(tmp_path / "*.txt")})
    source = _documents()
    assert len(source.list_shards("train")) == 256
    order = _numbers(source, 0)
    assert sorted(order) == list(range(total))
    # Of each thousand examples each tenth of the corpus, so each file too, has its share.
    for start in range(0, total, 1000):
        counts = np.bincount(order[start : start + 1000] * 10 // total, minlength=10)
        assert (counts > 60).all()
    assert (np.bincount(order[:128] * 10 // total, minlength=10) >= 3).all()
    assert abs(np.corrcoef(order, np.arange(total))[0, 1]) < 0.03  # neither end comes first
    assert (np.abs(np.diff(order)) == 1).sum() < 20  # nor do neighbours follow one another
    assert (_numbers(source, 0) == order).all()
    assert (_numbers(source, 1) != order).mean() > 0.9
    # Eight hosts share the shards, three the records.
    for hosts in (8, 3):
        parts = [_numbers(source, 0, 1, seqio.ShardInfo(i, hosts)) for i in range(hosts)]
        assert sorted(np.concatenate(parts)) == list(range(total))
        assert max(map(len, parts)) - min(map(len, parts)) <= 32
        assert all((np.bincount(p[:1000] * 10 // total, minlength=10) > 60).all() for p in parts)


def test_each_epoch_has_an_order_of_its_own(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{number}\n" for number in range(12_000)))
    _bind({"train": str(tmp_path / "a.txt")})
    order = _numbers(_documents(), 0, epochs=2)
    first, second = order[:1000], order[13_000:14_000]
    assert len(set(first) & set(second)) < 500


@pytest.mark.parametrize(
    "num_files,lines,num_shards,pack",
    [
        (1, 1100, 1, False),
        pytest.param(5, 30, 1, False, marks=pytest.mark.slow),
        pytest.param(5, 30, 2, True, marks=pytest.mark.slow),
    ],
)
def test_training_on_local_files_goes_on_at_the_exact_example(
    num_files, lines, num_shards, pack, tmp_path, monkeypatch
):
    # As if there were more than fit in memory.
    monkeypatch.setattr(seqio.dataset_providers, "_MAX_EXAMPLES_TO_MEM_CACHE", 500)
    for number in range(num_files):
        texts = [f"{number} {line}" for line in range(lines)]
        _write(tmp_path / "data", f"{number}.jsonl", texts)
    _bind({"train": str(tmp_path / "data/*")})
    vocabulary = seqio.ByteVocabulary()
    monkeypatch.setattr(seqio.TaskRegistry, "_REGISTRY", dict(seqio.TaskRegistry._REGISTRY))
    seqio.TaskRegistry.add(
        "test_resumed",
        source=_documents(),
        preprocessors=[
            seqio.map_over_dataset(lambda e: {"inputs": e["text"], "targets": e["text"]}),
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos,
        ],
        output_features={
            "inputs": seqio.Feature(vocabulary, add_eos=False),
            "targets": seqio.Feature(vocabulary),
        },
    )
    converter = EncDecFeatureConverter if pack else CanvasFeatureConverter
    cfg = DatasetConfig(
        "test_resumed",
        {"inputs": 12, "targets": 12},
        "train",
        batch_size=4,
        shuffle=True,
        pack=pack,
    )

    shards = tuple(range(num_shards))

    def make():
        layout = DataLayout(4, num_shards, shards, shards)
        return datasets.get_training_iterator(cfg, converter, layout=layout, seed=5)

    iterator = make()
    for _ in range(23):  # in the middle of an epoch; of few lines, one that is not the first
        next(iterator)
    iterator.save(tmp_path / "position")
    expected = [next(iterator) for _ in range(12)]
    restored = make()
    next(restored)
    restored.restore(tmp_path / "position")
    for batch in expected:
        for name, value in next(restored).items():
            np.testing.assert_array_equal(value, batch[name])
    targets = np.concatenate([batch["decoder_target_tokens"] for batch in expected])
    assert len(np.unique(targets, axis=0)) > 10
