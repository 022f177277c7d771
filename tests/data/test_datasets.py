"""Batches: nothing is lost or seen twice, and a run goes on at the very next example."""

import dataclasses
import itertools

import numpy as np
import pytest
import seqio
import tensorflow as tf
import toy

from diffusion_t5x.data import datasets
from diffusion_t5x.data.data_shards import DataLayout
from diffusion_t5x.data.datasets import DatasetConfig
from diffusion_t5x.data.feature_converters import CanvasFeatureConverter, EncDecFeatureConverter

TRAIN, VALIDATION = toy.NUM_EXAMPLES["train"], toy.NUM_EXAMPLES["validation"]


def _texts(batches):
    """The targets of rows that are not filled up."""
    rows = [row for batch in batches for row in batch["decoder_target_tokens"]]
    return [toy.VOCABULARY.decode(row.tolist()) for row in rows if row.any()]


def _same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name])


def _eval(**kwargs):
    settings = {"converter": CanvasFeatureConverter, "batch_size": 4, "split": "validation"}
    settings |= kwargs
    cfg = toy.dataset_cfg(settings.pop("split"), settings.pop("batch_size"))
    return list(datasets.get_eval_batches(cfg, settings.pop("converter"), **settings))


def test_an_iterator_goes_on_exactly_where_it_was_saved(tmp_path):
    make = lambda: datasets.get_training_iterator(  # noqa: E731
        toy.dataset_cfg(), CanvasFeatureConverter, seed=3
    )
    iterator = make()
    for _ in range(9):  # into the second epoch
        next(iterator)
    iterator.save(tmp_path / "position")
    expected = [next(iterator) for _ in range(8)]
    restored = make()
    next(restored)  # a position of its own, which is forgotten
    restored.restore(tmp_path / "position")
    for batch in expected:
        _same(batch, next(restored))


def _iterator(num_shards=1, seed=3, converter=CanvasFeatureConverter, **settings):
    cfg = toy.dataset_cfg(**settings)
    layout = DataLayout(cfg.batch_size, num_shards, *[tuple(range(num_shards))] * 2)
    return datasets.get_training_iterator(cfg, converter, layout=layout, seed=seed)


def _take(iterator, count):
    return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize(
    ("before", "after"),
    [(6, 10), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((8, 4), (8, 16)))],
)
def test_with_another_batch_size_a_run_goes_on_at_the_next_example(tmp_path, before, after, capsys):
    first = _iterator(batch_size=before)
    seen = _texts(_take(first, 3))
    first.save(tmp_path / "position")
    second = _iterator(batch_size=after)
    second.restore(tmp_path / "position")
    assert f"BATCH_SIZE {before} is now {after}; going on after the {3 * before} examples" in (
        capsys.readouterr().out
    )
    seen += _texts(_take(second, 4))
    whole = _texts(_take(_iterator(batch_size=2), 50))
    assert seen == whole[: len(seen)]
    # The position is exact again.
    second.save(tmp_path / "again")
    expected = _take(second, 8)
    third = _iterator(batch_size=after)
    third.restore(tmp_path / "again")
    assert capsys.readouterr().out == ""
    for one, other in zip(expected, _take(third, 8), strict=True):
        _same(one, other)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (1, 2),
        pytest.param(4, 1, marks=pytest.mark.slow),
        pytest.param(2, 4, marks=pytest.mark.slow),
    ],
)
def test_with_other_data_shards_as_many_examples_are_skipped(tmp_path, before, after):
    first = _iterator(before, shuffle=False)
    seen = _texts(_take(first, 3))
    first.save(tmp_path / "position")
    second = _iterator(after, shuffle=False)
    second.restore(tmp_path / "position")
    seen += _texts(_take(second, 3))
    assert sorted(seen) == [f"t{number:03}" for number in range(48)]


@pytest.mark.parametrize(
    "changed",
    [
        {"task_feature_lengths": {"inputs": 9, "targets": 7}},
        pytest.param({"seed": 8}, marks=pytest.mark.slow),
        {"shuffle": False},
    ],
)
def test_with_other_settings_a_run_goes_on_after_as_many_examples(tmp_path, changed, capsys):
    first = _iterator()
    _take(first, 3)
    first.save(tmp_path / "position")
    second = _iterator(**changed)
    second.restore(tmp_path / "position")
    assert "is now" in capsys.readouterr().out
    assert _texts(_take(second, 2)) == _texts(_take(_iterator(**changed), 5))[24:]


def test_the_examples_in_packed_rows_are_counted(tmp_path):
    def rows(length):
        lengths = {"inputs": length, "targets": length}
        return _iterator(
            converter=EncDecFeatureConverter, batch_size=2, pack=True, shuffle=False,
            task_feature_lengths=lengths,
        )  # fmt: skip

    def numbers(batches):
        texts = [row.tolist() for batch in batches for row in batch["decoder_target_tokens"]]
        parts = [list(part) for row in texts for _, part in itertools.groupby(row, lambda t: t > 1)]
        return [int(toy.VOCABULARY.decode(part)[1:]) for part in parts if part[0] > 1]

    first = rows(16)
    seen = numbers(_take(first, 3))
    assert len(seen) > 6
    first.save(tmp_path / "position")
    second = rows(40)
    second.restore(tmp_path / "position")
    following = numbers(_take(second, 1))
    # A row that holds examples of both sides is read again.
    assert following[0] <= len(seen) <= following[-1]


def test_a_position_without_a_record_says_what_to_set(tmp_path):
    first = _iterator()
    _take(first, 3)
    first.save(tmp_path / "position")
    expected = next(first)
    for record in tmp_path.glob("*.json"):
        record.unlink()
    same = _iterator()
    same.restore(tmp_path / "position")
    _same(expected, next(same))
    other = _iterator(batch_size=4)
    with pytest.raises(ValueError, match=r"another BATCH_SIZE or other TASK_FEATURE_LENGTHS"):
        other.restore(tmp_path / "position")
        next(other)


def test_restoring_what_was_not_saved_fails(tmp_path):
    iterator = datasets.get_training_iterator(toy.dataset_cfg(), CanvasFeatureConverter)
    with pytest.raises(tf.errors.NotFoundError):
        iterator.restore(tmp_path / "position")


def test_batches_have_the_shapes_and_types_that_the_iterator_announces():
    iterator = datasets.get_training_iterator(
        toy.dataset_cfg(), CanvasFeatureConverter, layout=DataLayout(8, 4, (1, 2), (1,))
    )
    batch = next(iter(iterator))
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == (
        iterator.element_spec
    )
    assert batch["encoder_input_tokens"].shape == (4, 6)


def test_the_seed_alone_decides_the_order_and_the_configured_one_goes_first():
    def texts(seed, configured=None):
        cfg = toy.dataset_cfg(seed=configured)
        iterator = datasets.get_training_iterator(cfg, CanvasFeatureConverter, seed=seed)
        return _texts(next(iterator) for _ in range(3))

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    assert texts(1, 5) == texts(2, 5) == texts(5)


def test_unshuffled_training_reads_the_split_in_order_again_and_again():
    iterator = datasets.get_training_iterator(
        toy.dataset_cfg(batch_size=10, shuffle=False), CanvasFeatureConverter
    )
    for _ in range(3):
        texts = _texts(next(iterator) for _ in range(TRAIN // 10))
        assert texts == [f"t{number:03}" for number in range(TRAIN)]


def test_a_batch_may_span_epochs_so_that_no_example_is_left_out():
    iterator = datasets.get_training_iterator(
        toy.dataset_cfg(batch_size=8, shuffle=False), CanvasFeatureConverter
    )
    numbers = [int(text[1:]) for text in _texts(next(iterator) for _ in range(20))]
    assert numbers == [number % TRAIN for number in range(160)]


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_shards_together_are_the_whole(num_shards):
    shards = [
        datasets.get_dataset(
            toy.dataset_cfg(),
            CanvasFeatureConverter,
            shard_index=index,
            num_shards=num_shards,
            seed=0,
        )
        for index in range(num_shards)
    ]
    texts = [_texts(shard.batch(1).as_numpy_iterator()) for shard in shards]
    assert sorted(itertools.chain(*texts)) == [f"t{number:03}" for number in range(TRAIN)]
    assert max(map(len, texts)) - min(map(len, texts)) <= 1


# Which of four shards each process reads, and which of them it saves.
PROCESSES = {
    "one": [((0, 1, 2, 3), (0, 1, 2, 3))],
    "two": [((0, 1), (0, 1)), ((2, 3), (2, 3))],
    "two that lie crosswise": [((0, 3), (0, 3)), ((1, 2), (1, 2))],
    "eight, two to a shard": [((n // 2,), (n // 2,) if n % 2 == 0 else ()) for n in range(8)],
}


def _iterators(processes):
    return [
        datasets.get_training_iterator(
            toy.dataset_cfg(), CanvasFeatureConverter, layout=DataLayout(8, 4, *shards), seed=3
        )
        for shards in PROCESSES[processes]
    ]


def _global_batch(processes, iterators):
    """The batch that processes have together, whose copies of a shard must be the same."""
    rows = {}
    for (shards, _), iterator in zip(PROCESSES[processes], iterators, strict=True):
        part = next(iterator)
        for number, shard in enumerate(shards):
            own = {name: value[2 * number : 2 * number + 2] for name, value in part.items()}
            _same(rows.setdefault(shard, own), own)
    return {name: np.concatenate([rows[shard][name] for shard in range(4)]) for name in rows[0]}


@pytest.mark.parametrize(
    "processes,later",
    [
        pytest.param("two", "one", marks=pytest.mark.slow),
        ("two that lie crosswise", "two"),
        pytest.param("eight, two to a shard", "two", marks=pytest.mark.slow),
    ],
)
def test_global_batches_and_where_they_go_on_do_not_depend_on_the_processes(
    processes, later, tmp_path
):
    one, several = _iterators("one"), _iterators(processes)
    for _ in range(7):  # into the second epoch
        _same(_global_batch("one", one), _global_batch(processes, several))
    for iterator in several:
        iterator.save(tmp_path / "position")
    assert len(list(tmp_path.glob("position-*.index"))) == 4
    restored = _iterators(later)
    for iterator in restored:
        iterator.restore(tmp_path / "position")
    for _ in range(3):
        _same(_global_batch(processes, several), _global_batch(later, restored))


def test_a_data_shard_without_an_example_is_refused():
    layout = DataLayout(64, 64, (3, 63), (3, 63))
    iterator = datasets.get_training_iterator(
        toy.dataset_cfg(batch_size=64), CanvasFeatureConverter, layout=layout
    )
    with pytest.raises(ValueError, match="data shard 63 of 64 has no example"):
        next(iterator)


def test_eval_fills_the_last_batch_with_rows_that_do_not_count():
    batches = _eval()
    assert [len(batch["decoder_target_tokens"]) for batch in batches] == [4, 4, 4]
    assert _texts(batches) == [f"v{number:03}" for number in range(VALIDATION)]
    assert VALIDATION == 11
    for value in batches[-1].values():
        assert not value[3].any()
    # The rows of the data count in full.
    assert sum(batch["decoder_loss_weights"].sum() for batch in batches) == VALIDATION * 6


@pytest.mark.parametrize("num_shards", [2, 4])
def test_processes_have_as_many_eval_batches_and_together_the_whole(num_shards):
    whole = _eval(batch_size=8)
    shards = [
        _eval(batch_size=8, layout=DataLayout(8, num_shards, (index,)))
        for index in range(num_shards)
    ]
    assert {len(batches) for batches in shards} == {len(whole)} == {2}
    for batch, *parts in zip(whole, *shards, strict=True):
        _same(batch, {name: np.concatenate([part[name] for part in parts]) for name in batch})


def test_a_split_smaller_than_a_batch_and_one_that_is_whole_batches():
    assert len(_texts(_eval(batch_size=32))) == VALIDATION
    assert len(_eval(batch_size=VALIDATION)) == 1


@pytest.mark.parametrize("num_batches,expected", [(0, 0), (2, 2), (3, 3), (9, 3), (None, 3)])
def test_eval_reads_at_most_so_many_batches(num_batches, expected):
    assert len(_eval(num_batches=num_batches)) == expected


def test_pad_batch_by_hand():
    batch = {"tokens": np.array([[1, 2]]), "weight": np.array([3.0])}
    padded = datasets.pad_batch(batch, 3)
    np.testing.assert_array_equal(padded["tokens"], [[1, 2], [0, 0], [0, 0]])
    np.testing.assert_array_equal(padded["weight"], [3.0, 0.0, 0.0])
    assert padded["tokens"].dtype == batch["tokens"].dtype
    _same(batch, datasets.pad_batch(batch, 1))


def test_packing_keeps_every_token():
    cfg = dataclasses.replace(
        toy.dataset_cfg("validation", pack=True), task_feature_lengths={"inputs": 20, "targets": 20}
    )
    packed = list(datasets.get_dataset(cfg, EncDecFeatureConverter).as_numpy_iterator())
    assert len(packed) == 3  # four texts of five tokens a row
    tokens = np.concatenate([row["decoder_target_tokens"] for row in packed])
    texts = [[*toy.VOCABULARY.encode(f"v{n:03}"), 1] for n in range(VALIDATION)]
    np.testing.assert_array_equal(tokens[tokens > 0], np.concatenate(texts))


def test_an_unknown_task_is_refused_with_the_nearest_name():
    toy.register()
    with pytest.raises(ValueError, match=r"MIXTURE_OR_TASK_NAME = 'toy_cpoy'.*mean 'toy_copy'"):
        datasets.get_mixture_or_task("toy_cpoy")
    with pytest.raises(ValueError, match=r"'zzzzzzzz'.*known: \[.*'toy_copy'"):
        datasets.get_mixture_or_task("zzzzzzzz")


def test_several_tasks_where_one_is_read_are_refused():
    cfg = toy.dataset_cfg(mixture_or_task_name=(toy.TASK, toy.TASK))
    with pytest.raises(ValueError, match="expected one name"):
        datasets.get_dataset(cfg, CanvasFeatureConverter)


def test_a_mixture_is_found_as_a_task_is():
    name = "toy_mixture"
    if name not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add(name, [toy.register()], default_rate=1.0)
    assert datasets.get_mixture_or_task(name).name == name
    cfg = dataclasses.replace(toy.dataset_cfg(), mixture_or_task_name=name)
    assert len(_texts([next(datasets.get_training_iterator(cfg, CanvasFeatureConverter))])) == 8


def test_an_unknown_split_is_refused_with_the_known_ones():
    cfg = dataclasses.replace(toy.dataset_cfg(), split="dev")
    with pytest.raises(
        ValueError, match=r"'toy_copy': .*split = 'dev' is unknown; Known: test, train, val"
    ):
        datasets.get_dataset(cfg, CanvasFeatureConverter)


@pytest.mark.parametrize("lengths", [{"inputs": 6}, {}, None])
def test_missing_lengths_are_named(lengths):
    cfg = dataclasses.replace(toy.dataset_cfg(), task_feature_lengths=lengths)
    with pytest.raises(
        ValueError, match=r"TASK_FEATURE_LENGTHS = .* lacks .*targets, which task 'toy_copy' needs"
    ):
        datasets.get_dataset(cfg, CanvasFeatureConverter)


def test_a_module_that_does_not_exist_is_named_with_its_setting():
    with pytest.raises(ModuleNotFoundError, match=r"MIXTURE_OR_TASK_MODULE = 'no_such\.module'"):
        datasets.import_task_module("no_such.module")
    cfg = DatasetConfig("x", {}, "train", 1, module="no_such")
    with pytest.raises(ModuleNotFoundError, match=r"MIXTURE_OR_TASK_MODULE = 'no_such'"):
        datasets.get_dataset(cfg, CanvasFeatureConverter)
    datasets.import_task_module(None)


@pytest.mark.parametrize("missing", ["what_it_needs", "brok"])
def test_a_module_that_lacks_what_it_imports_is_not_called_missing(missing, tmp_path, monkeypatch):
    name = f"broken_{missing}"
    (tmp_path / f"{name}.py").write_text(f"import {missing}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=f"^No module named '{missing}'$"):
        datasets.import_task_module(name)
