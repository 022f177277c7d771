"""A shard reads its own rows and examples, and draws its own random numbers."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from diffusion_t5x.data.data_shards import DataLayout, with_shard_seed

SHARDS = 4
VOCABULARY = seqio.PassThroughVocabulary(2**30)


def _numbers(split, shuffle_files=False, seed=None):
    numbers = tf.data.Dataset.range(64)
    if shuffle_files:  # before examples are dealt to shards
        numbers = numbers.shuffle(64, seed=seed)
    return numbers.map(lambda x: {"targets": x[None]})


@seqio.map_over_dataset(num_seeds=1)
def _draw(example, seed):
    drawn = tf.random.stateless_uniform([1], seed, maxval=2**30, dtype=tf.int64)
    return {"targets": tf.concat([example["targets"], drawn], axis=0)}


@pytest.fixture
def _registered(monkeypatch):
    for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
        monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    for name, shift in (("test_low", 0), ("test_high", 1000)):
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(_numbers, splits=["train"]),
            preprocessors=[
                seqio.map_over_dataset(lambda x, shift=shift: {"targets": x["targets"] + shift}),
                _draw,
            ],
            output_features={"targets": seqio.Feature(VOCABULARY, dtype=tf.int64, add_eos=False)},
        )
    seqio.MixtureRegistry.add("test_both", ["test_low", "test_high"], default_rate=1.0)


def _read(name, shard, seed=7):
    task = with_shard_seed(seqio.get_mixture_or_task(name), shard)
    dataset = task.get_dataset(
        {"targets": 2},
        split="train",
        shuffle=True,
        seed=seed,
        shard_info=seqio.ShardInfo(shard, SHARDS),
        num_epochs=1,
    )
    return [tuple(row["targets"].tolist()) for row in dataset.as_numpy_iterator()]


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("name", ["test_low", "test_both"])
def test_no_two_shards_draw_the_same_number_or_read_the_same_example(name):
    rows = [row for shard in range(SHARDS) for row in _read(name, shard)]
    numbers = [number for number, _ in rows]
    assert len(set(numbers)) == len(rows)
    assert set(numbers) == set(range(64)) or name == "test_both"  # which ends with its first task
    # Tasks of a mixture share their seed in SeqIO too, so a number is drawn once for each of them.
    assert len({(number >= 1000, x) for number, x in rows}) == len(rows) > 32


@pytest.mark.usefixtures("_registered")
def test_shards_of_a_mixture_draw_its_tasks_in_orders_of_their_own():
    orders = {tuple(number >= 1000 for number, _ in _read("test_both", s)) for s in range(SHARDS)}
    assert len(orders) == SHARDS


@pytest.mark.usefixtures("_registered")
def test_the_seed_still_decides_and_the_first_shard_keeps_it():
    assert _read("test_both", 2) == _read("test_both", 2) != _read("test_both", 2, seed=8)
    task = seqio.get_mixture_or_task("test_both")
    plain = task.get_dataset(
        {"targets": 2}, split="train", shuffle=True, seed=7,
        shard_info=seqio.ShardInfo(0, SHARDS), num_epochs=1,
    )  # fmt: skip
    assert [tuple(row["targets"].tolist()) for row in plain.as_numpy_iterator()] == (
        _read("test_both", 0)
    )


def test_a_process_takes_the_rows_of_its_shards():
    layout = DataLayout(12, 4, (1, 3), (1,))
    assert layout.shard_size == 3
    rows = layout.local_rows({"x": np.arange(24).reshape(12, 2)})
    np.testing.assert_array_equal(rows["x"][:, 0], [6, 8, 10, 18, 20, 22])


@pytest.mark.parametrize("batch_size,shards,nearest", [(10, 4, 8), (1, 8, 8), (7, 2, 8)])
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest(batch_size, shards, nearest):
    message = rf"BATCH_SIZE = {batch_size} .* the {shards} data shards.* is: {nearest}\."
    with pytest.raises(ValueError, match=message):
        DataLayout(batch_size, shards)
    assert DataLayout(nearest, shards).shard_size == nearest // shards
