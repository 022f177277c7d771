"""Each data shard draws its own random numbers, and still reads its own examples alone."""

import pytest
import seqio
import tensorflow as tf

from diffusion_t5x.data.shard_seeds import with_shard_seed

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


@pytest.fixture(autouse=True)
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


@pytest.mark.parametrize("name", ["test_low", "test_both"])
def test_no_two_shards_draw_the_same_number_or_read_the_same_example(name):
    rows = [row for shard in range(SHARDS) for row in _read(name, shard)]
    numbers = [number for number, _ in rows]
    assert len(set(numbers)) == len(rows)
    assert set(numbers) == set(range(64)) or name == "test_both"  # which ends with its first task
    # Tasks of a mixture share their seed in SeqIO too, so a number is drawn once for each of them.
    assert len({(number >= 1000, x) for number, x in rows}) == len(rows) > 32


def test_shards_of_a_mixture_draw_its_tasks_in_orders_of_their_own():
    orders = {tuple(number >= 1000 for number, _ in _read("test_both", s)) for s in range(SHARDS)}
    assert len(orders) == SHARDS


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
