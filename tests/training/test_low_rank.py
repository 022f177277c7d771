"""Training of low-rank factors: what is frozen, kept, started from, resumed and merged."""

import flax.traverse_util
import jax
import numpy as np
import pytest
import toy

from diffusion_t5x.checkpointing import conversion
from diffusion_t5x.checkpointing.checkpoints import (
    Checkpointer,
    RestoreCheckpointConfig,
    SaveCheckpointConfig,
)
from diffusion_t5x.checkpointing.reading import (
    CheckpointMismatchError,
    open_params,
    restore_params,
)
from diffusion_t5x.interop.low_rank import is_low_rank, merge_low_rank
from diffusion_t5x.networks.low_rank import LowRank
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.train_state import (
    INIT_SHAPES,
    TrainState,
    abstract_params,
    abstract_train_state,
    named_leaves,
)
from diffusion_t5x.training import dry_run, optimizers
from diffusion_t5x.training.train_step import Trainer

ADAPTED = LowRank(rank=2, alpha=5.0, also_trained="final_layer_norm/scale")


def _model(low_rank=ADAPTED, **kwargs):
    return toy.model("autoregressive", low_rank=low_rank, **kwargs)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The directory of a run of the network without adaptation, and its parameters."""
    directory = tmp_path_factory.mktemp("base")
    return directory, named_leaves(toy.run(directory, 2, _model(None)).params)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, base):
    """The directory of a run that adapts it for four steps, stopped once, and its state."""
    directory = tmp_path_factory.mktemp("adapted")
    restore = RestoreCheckpointConfig(str(base[0]))
    settings = {"restore": restore, "relative_steps": 4, "trainer": {"clip_norm": 1.0}}
    toy.run(directory, None, _model(), **{**settings, "relative_steps": 2})
    return directory, settings, toy.run(directory, None, _model(), **settings)


def test_all_but_the_factors_and_what_else_is_trained_stays_bit_for_bit(base, adapted):
    _, _, state = adapted
    params, trained = named_leaves(state.params), set()
    for name, before in base[1].items():
        if not np.array_equal(before, params[name]):
            trained.add(name)
    assert trained == {"decoder/final_layer_norm/scale"}
    factors = {name: x for name, x in params.items() if is_low_rank(name)}
    assert len(factors) == 3 * 4
    assert all(np.any(x != 0) for x in factors.values())  # B no longer is zero
    scales = {float(x) for name, x in factors.items() if name.endswith("_scale")}
    assert scales == {2.5}
    assert int(state.step) == 6  # those of the initial checkpoint count
    kept = {x.size for x in jax.tree.leaves(state.opt_state)}
    assert kept == {1, 2 * 16, 16}  # counters, moments of the factors and of one norm


@pytest.mark.slow  # the fixture resumes, and test_loop.py compares any run with one not stopped
def test_a_run_that_was_stopped_ends_as_one_that_was_not(adapted, tmp_path):
    _, settings, resumed = adapted
    straight = toy.run(tmp_path, None, _model(), **settings)
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)


def test_a_merged_checkpoint_is_an_ordinary_one_of_the_same_network(adapted, tmp_path):
    directory, _, state = adapted
    written = conversion.convert(str(directory), str(tmp_path), model=_model(None))
    assert any("merged" in note for note in written.notes)
    abstract = abstract_params(_model(None), PjitPartitioner(), INIT_SHAPES, {})
    merged = named_leaves(restore_params(written.path, abstract))
    ours = {name: np.float64(x) for name, x in named_leaves(state.params).items()}
    for name, values in merged.items():
        expected = ours[name]
        if "attention" in name and name.endswith("kernel"):
            a, b, scale = (
                ours[name.replace("kernel", f"low_rank_{x}")] for x in ("a", "b", "scale")
            )
            assert np.abs(expected - values).max() > 1e-4
            expected = expected + scale * (a @ b)
        np.testing.assert_array_equal(values, np.float32(expected), err_msg=name)
    # With the gin files of the adapted model nothing is merged.
    kept = conversion.convert(str(directory), f"{tmp_path}/kept", model=_model(), dry_run=True)
    assert kept.arrays.keys() == ours.keys()


def test_a_checkpoint_and_a_model_of_which_one_is_adapted_are_told_apart(base, adapted, tmp_path):
    for model, path, hint in (
        (_model(), base[0], "low_rank = None"),
        (_model(None), adapted[0], "low_rank, which models/low_rank.gin sets"),
    ):
        abstract = abstract_params(model, PjitPartitioner(), INIT_SHAPES, {})
        [*_, checkpoint] = sorted(path.glob("checkpoint_*"))
        with pytest.raises(CheckpointMismatchError, match=hint):
            restore_params(str(checkpoint), abstract)
    # A run cannot begin with factors of another rank.
    other = LowRank(rank=3, also_trained=ADAPTED.also_trained)
    restore = RestoreCheckpointConfig(str(adapted[0]), params_only=True)
    with pytest.raises(CheckpointMismatchError, match=r"low_rank_a: the checkpoint has \[16, 2\]"):
        toy.run(tmp_path, 3, _model(other), restore=restore)


def test_factors_of_which_one_is_missing_or_does_not_fit_are_not_merged(adapted):
    [*_, checkpoint] = sorted(adapted[0].glob("checkpoint_*"))
    stored = open_params(str(checkpoint))
    prefix = "decoder/layers_0/self_attention/query/"
    for part in ("kernel", "low_rank_b", "low_rank_scale"):
        fewer = {name: x for name, x in stored.items() if name != prefix + part}
        with pytest.raises(ValueError, match=f"lacks {prefix}{part}"):
            merge_low_rank(fewer)
    wrong = {**stored, prefix + "low_rank_a": stored[prefix + "low_rank_b"]}
    with pytest.raises(ValueError, match="expected"):
        merge_low_rank(wrong)


def test_scanned_layers_are_merged_each_with_its_own_factors(tmp_path):
    model = _model(num_layers=2, scan_layers=True)
    draws = np.random.RandomState(0)
    shapes = named_leaves(abstract_params(model, PjitPartitioner(), INIT_SHAPES, {}))
    params = {name: np.float32(draws.normal(size=x.shape)) for name, x in shapes.items()}
    nested = flax.traverse_util.unflatten_dict(params, sep="/")
    checkpointer = Checkpointer(str(tmp_path), SaveCheckpointConfig(save_dataset=False))
    checkpointer.save(TrainState(np.int32(3), nested, None))
    checkpointer.close()
    merged = merge_low_rank(open_params(f"{tmp_path}/checkpoint_3"))
    prefix = "decoder/layers/self_attention/out/"
    w, a, b, scale = (
        np.float64(params[prefix + x])
        for x in ("kernel", "low_rank_a", "low_rank_b", "low_rank_scale")
    )
    for layer in (0, 1):
        expected = w[layer] + scale[layer] * a[layer] @ b[layer]
        values = merged[f"decoder/layers_{layer}/self_attention/out/kernel"].read()
        np.testing.assert_allclose(values, np.float32(expected), rtol=1e-6)
    assert not any(map(is_low_rank, merged))


def test_no_gradient_or_moment_of_a_frozen_parameter_is_computed_or_kept():
    reports, partitioner = {}, PjitPartitioner(devices=jax.devices()[:1])
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    shapes, types = dict.fromkeys(names, (1, 6)), dict.fromkeys(names, np.int32)
    for low_rank in (None, LowRank(rank=1)):
        model = _model(low_rank, optimizer=optimizers.adamw(), mlp_dim=64)
        state = abstract_train_state(model, partitioner, shapes, types)
        trainer = Trainer(model, partitioner, state, 0, lambda step: 0.1)
        batch = dry_run.abstract_batch(trainer, 8, shapes, types)
        reports[low_rank] = dry_run.compile_step(trainer, state, batch)
    ours = reports[low_rank]
    assert ours.trained_count == len(trainer.leaf_names) * 16 == 4 * 2 * 16
    assert f"trained: {ours.trained_count}" in list(ours.lines())
    assert ours.optimizer == 2 * 4 * ours.trained_count + 2 * 4
    flops = [report.compiled.cost_analysis()["flops"] for report in reports.values()]
    # A weight's gradient takes two operations per weight and position: 8 rows of 12 tokens in
    # layers, and of 6 targets for the vocabulary.
    layers, vocabulary = 4 * 16 * 16 + 3 * 16 * 64, toy.VOCAB_SIZE * 16
    saved = 2 * 8 * (12 * layers + 6 * vocabulary)
    added = 2 * 8 * 12 * 3 * ours.trained_count  # forward, and twice backward
    assert flops[0] - flops[1] > saved - added
