"""Tasks that lack something are refused by name, with the way out, before anything is read."""

import functools

import pytest
import seqio
import toy

from diffusion_t5x.data import datasets, task_checks
from diffusion_t5x.data.feature_converters import CanvasFeatureConverter


@pytest.fixture(scope="module")
def task():
    return seqio.get_mixture_or_task(toy.register())


def _mixture(rate):
    name = "toy_mixture_by_counts"
    seqio.MixtureRegistry.remove(name)
    seqio.MixtureRegistry.add(name, [(toy.register(), rate)])
    return name


def test_a_split_that_is_not_there_is_named_with_those_that_are(task):
    with pytest.raises(ValueError, match=r"'toy_copy': datasets.DatasetConfig.split = 'tset' .*did "
                       r"you mean 'test'\? Known: test, train, validation"):  # fmt: skip
        task_checks.check_split(task, "tset")


def test_a_cache_that_is_not_there_is_named(task, tmp_path, monkeypatch):
    with (
        seqio.test_utils.mock.patch.object(
            seqio.utils, "_GLOBAL_CACHE_DIRECTORIES", [str(tmp_path)]
        ),
        pytest.raises(
            ValueError, match=r"USE_CACHED_TASKS.*'toy_copy' has no cache in .*additional"
        ),
    ):
        datasets.get_dataset(toy.dataset_cfg(use_cached=True), CanvasFeatureConverter)


@pytest.mark.parametrize(
    "rate",
    [
        seqio.mixing_rate_num_examples,
        functools.partial(seqio.mixing_rate_num_examples, maximum=10),
        functools.partial(seqio.mixing_rate_num_examples, fallback_to_num_input_examples=False),
    ],
)
def test_a_rate_by_counts_that_nobody_knows_is_refused(rate):
    cfg = toy.dataset_cfg(mixture_or_task_name=_mixture(rate))
    with pytest.raises(ValueError, match=r"_by_counts'.*task 'toy_copy' cannot.*num_in"):
        datasets.get_dataset(cfg, CanvasFeatureConverter)


def test_a_rate_that_is_a_number_is_none_of_it():
    cfg = toy.dataset_cfg(mixture_or_task_name=_mixture(2.0))
    assert len(list(datasets.get_dataset(cfg, CanvasFeatureConverter))) == 50
