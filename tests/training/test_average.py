"""The moving average of parameters: what it is, where it is kept, and who reads it."""

import contextlib
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from diffusion_t5x.checkpointing import conversion, integrity, reading
from diffusion_t5x.checkpointing.checkpoints import (
    CheckpointConfig,
    Checkpointer,
    RestoreCheckpointConfig,
    SaveCheckpointConfig,
    select_checkpoints,
)
from diffusion_t5x.evaluation.compiled_model import restorer
from diffusion_t5x.networks.low_rank import LowRank
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.train_state import abstract_train_state, named_leaves, select
from diffusion_t5x.training import dry_run, hooks, initial_state
from diffusion_t5x.training.train_step import Trainer

DECAY, STEPS, SKIPPED = 0.2, 5, 3


def _run(directory, steps, decay=DECAY, **kwargs):
    """A toy run in two microbatches, whose update to step `SKIPPED` is not finite."""

    def rate(step):
        return jnp.where(step + 1 == SKIPPED, jnp.nan, 1e-2)

    trainer = {
        "ema_decay": decay,
        "max_skipped_updates": 1,
        "num_microbatches": 2,
        "learning_rate_fn": rate,
    }
    return toy.run(directory, steps, period=1, trainer=trainer, **kwargs)


def _shapes(model=None):
    """Shapes of a toy model's state, without an average."""
    shapes = {"encoder_input_tokens": (1, 6), "decoder_input_tokens": (1, 6)}
    return abstract_train_state(model or toy.model(), PjitPartitioner(), shapes, {})


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run with an average: its directory and its last state."""
    directory = tmp_path_factory.mktemp("run")
    return directory, _run(directory, STEPS)


def _arrays(directory, step, item):
    tree = reading._open_item(directory / f"checkpoint_{step}" / item)
    return {name: stored.read() for name, stored in tree.items()}


def _same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_average_is_that_of_a_float64_loop_over_the_updates_that_were_not_skipped(straight):
    directory, state = straight
    raw = [_arrays(directory, step, "params") for step in range(1, STEPS + 1)]
    kept = [_arrays(directory, step, "average") for step in range(1, STEPS + 1)]
    assert all(x.dtype == np.float32 for x in kept[0].values())
    expected = {name: np.float64(x) for name, x in kept[0].items()}
    for index in range(1, STEPS):
        decay = min(DECAY, (1 + index) / (10 + index))
        if index + 1 == SKIPPED:
            decay = 1.0
        for name, x in expected.items():
            expected[name] = decay * x + (1 - decay) * np.float64(raw[index][name])
            np.testing.assert_allclose(kept[index][name], expected[name], rtol=1e-5, atol=1e-7)
    _same(kept[SKIPPED - 2], kept[SKIPPED - 1])
    _same(named_leaves(state.evaluated_params), kept[-1])
    # The first decay, 0.1, is seen from the parameters that the run began with.
    model, key = toy.model(), jax.random.fold_in(jax.random.PRNGKey(0), np.uint32(2**32 - 1))
    first = named_leaves(
        model.get_initial_variables(
            key,
            {"encoder_input_tokens": (1, 6), "decoder_input_tokens": (1, 6)},
            {},
        )["params"]
    )
    for name, x in first.items():
        expected = 0.1 * np.float64(x) + 0.9 * np.float64(raw[0][name])
        np.testing.assert_allclose(kept[0][name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_run_that_resumes_ends_with_the_same_bits_its_average_included(straight, tmp_path):
    _run(tmp_path, 2)
    _same(straight[1], _run(tmp_path, STEPS))


@pytest.mark.slow
def test_averages_change_no_parameter_and_a_run_may_begin_or_end_to_keep_one(
    straight, tmp_path, capsys
):
    state = _run(tmp_path, 4, None)
    assert state.average is None and not (tmp_path / "checkpoint_4" / "average").exists()
    with_one = _arrays(straight[0], 4, "params")
    for name, x in _arrays(tmp_path, 4, "params").items():
        np.testing.assert_allclose(x, with_one[name], rtol=1e-5, atol=1e-6)
    # It begins to average when it resumes, with its parameters.
    capsys.readouterr()
    state = _run(tmp_path, 5)
    assert "has no moving average: it begins with the parameters" in capsys.readouterr().out
    old, new = (_arrays(tmp_path, step, "params") for step in (4, 5))
    for name, x in named_leaves(state.average).items():
        expected = 0.8 * np.float64(new[name]) + 0.2 * np.float64(old[name])
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-7)
    # And no longer.
    assert _run(tmp_path, 6, None).average is None
    assert "has a moving average, which is dropped: EMA_DECAY = None" in capsys.readouterr().out


def test_everything_that_reads_a_checkpoint_takes_the_average_unless_told_otherwise(
    straight, tmp_path, capsys
):
    directory, state = straight
    path = f"{directory}/checkpoint_{STEPS}"
    for which, expected in (("averaged", state.average), ("raw", state.params)):
        cfg = RestoreCheckpointConfig(path, parameters=which)
        capsys.readouterr()
        _same(restorer(toy.model(), PjitPartitioner(), cfg)(path), expected)
        assert ("moving average" in capsys.readouterr().out) == (which == "averaged")
        written = conversion.convert(path, f"{tmp_path}/{which}", parameters=which)
        assert f"--parameters={which}" in " ".join(written.notes)
        assert not reading.has_average(written.path)
        _same(_arrays(tmp_path / which, STEPS, "params"), dict(named_leaves(expected)))
        # Another run begins with them, and with the optimiser state beside.
        start = initial_state.find(f"{tmp_path}/next", CheckpointConfig(restore=cfg))
        assert ("averaged parameters and" in str(start)) == (which == "averaged")
        began = initial_state.restore(start, _shapes(), None, None, None)
        _same((began.params, began.opt_state, began.average), (expected, state.opt_state, None))
    with pytest.raises(ValueError, match="did you mean 'averaged'"):
        RestoreCheckpointConfig(path, parameters="average")


def test_a_damaged_or_missing_average_is_damage_for_who_reads_it(straight, tmp_path):
    directory = shutil.copytree(straight[0], tmp_path / "run")
    item = directory / f"checkpoint_{STEPS}" / "average"
    file = max((f for f in item.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    newest = functools.partial(select_checkpoints, RestoreCheckpointConfig(str(directory)))
    assert newest()[0][0] == STEPS - 1
    raw = RestoreCheckpointConfig(str(directory), parameters="raw")
    assert select_checkpoints(raw)[0][0] == STEPS
    with pytest.raises(integrity.DamagedCheckpointError, match="average/"):
        reading.open_params(str(item.parent))
    shutil.rmtree(item)
    assert newest()[0][0] == STEPS - 1
    with pytest.raises(integrity.DamagedCheckpointError, match="average is missing"):
        reading.open_params(str(item.parent))


def _state(low_rank=None, **config):
    """Shapes of a state with an average, and a state of numbers by name."""
    model = toy.model("autoregressive", low_rank=low_rank, num_layers=2, **config)
    trainer = Trainer(model, PjitPartitioner(), _shapes(model), 0, lambda step: 0.1, ema_decay=0.9)
    draws = np.random.default_rng(3)
    return (
        model,
        trainer.abstract_state,
        jax.tree.map(
            lambda x: jnp.asarray(draws.uniform(0, 9, x.shape), x.dtype), trainer.abstract_state
        ),
    )


@pytest.mark.parametrize("low_rank", [None, LowRank(rank=1)])
def test_the_average_is_read_in_the_other_layout_and_frozen_parameters_are_as_they_are(
    low_rank, tmp_path
):
    model, _, state = _state(low_rank, scan_layers=True)
    config = SaveCheckpointConfig(save_dataset=False)
    with contextlib.closing(Checkpointer(str(tmp_path), config)) as checkpointer:
        checkpointer.save(state)
    path = f"{tmp_path}/checkpoint_{int(state.step)}"
    average = named_leaves(state.average)
    assert average.keys() == named_leaves(select(state.params, model.is_trained)).keys()
    assert (low_rank is None) == (len(average) == len(named_leaves(state.params)))
    expected = {**named_leaves(state.params), **average}
    _, abstract, _ = _state(low_rank, scan_layers=False)
    found = named_leaves(reading.restore_params(path, abstract.params))
    restored = reading.restore_train_state(path, abstract)
    for name, x in found.items():
        stacked = name.replace("layers_0", "layers").replace("layers_1", "layers")
        whole = expected[stacked]
        np.testing.assert_array_equal(
            x, whole[int("layers_1" in name)] if stacked != name else whole
        )
    _same(named_leaves(restored.evaluated_params), found)


def test_a_dry_run_counts_the_average():
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    shapes, types = dict.fromkeys(names, (1, 4)), dict.fromkeys(names, np.int32)
    model, partitioner = toy.model("autoregressive"), PjitPartitioner(devices=jax.devices()[:1])
    abstract = abstract_train_state(model, partitioner, shapes, types)
    trainer = Trainer(model, partitioner, abstract, 0, lambda step: 0.1, ema_decay=0.9)
    batch = dry_run.abstract_batch(trainer, 8, shapes, types)
    report = dry_run.compile_step(trainer, trainer.abstract_state, batch)
    assert report.average == report.parameters
    assert any("moving average" in line for line in report.lines())
    held = report.parameters + report.average + report.optimizer + report.batch
    assert report.total - report.temporaries >= held


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, 2])
def test_a_decay_out_of_range_is_refused_before_anything_is_written(decay, tmp_path):
    with pytest.raises(ValueError, match=f"EMA_DECAY = {decay}; expected 0 < EMA_DECAY < 1"):
        _run(tmp_path / "run", 2, decay)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_loss_and_text_are_evaluated_with_the_average(straight):
    """The line of a run's loss is that of the average; the raw parameters have another."""
    model, state = toy.model(), straight[1]
    trainer = Trainer(
        model, PjitPartitioner(), _shapes(model), 0, lambda step: 0.1, ema_decay=DECAY
    )
    evaluate = hooks.loss_evaluation(trainer, toy.dataset_cfg("validation"), 1, 0)
    with_average = evaluate(state)
    of_average = evaluate(state.replace(params=state.evaluated_params, average=None))
    raw = evaluate(state.replace(average=None))
    assert with_average == of_average != raw
    seen = []

    class Evaluator:
        tasks = ("a",)

        def evaluate(self, params, step, tasks):
            seen.append(params)
            return {"a": {}}

    hooks.text_evaluations(Evaluator())["inference_eval/a"](state)
    _same(seen[0], state.average)
