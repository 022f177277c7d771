"""Conversion of checkpoints: what fits is converted, the rest is listed, and training continues."""

import flax.traverse_util
import jax
import numpy as np
import parity
import pytest
import toy

import gin
from diffusion_t5x import convert, gin_utils
from diffusion_t5x.checkpointing import conversion
from diffusion_t5x.checkpointing.checkpoints import RestoreCheckpointConfig, list_checkpoints
from diffusion_t5x.checkpointing.reading import (
    CheckpointMismatchError,
    open_params,
    restore_params,
)
from diffusion_t5x.interop import t5x_checkpoints
from diffusion_t5x.networks.config import TransformerConfig
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.train_state import abstract_params


def _read(path):
    return {name: array.read() for name, array in open_params(path).items()}


def _assert_same(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)
        assert array.dtype == other[name].dtype


def _t5_like(**config):
    """Returns a toy model with the golden T5's network, except for the vocabulary's size."""
    fields = {
        **parity.SIZES,
        "embed_dim": parity.EMBED_DIM,
        "num_layers": parity.LAYERS,
        "num_encoder_layers": parity.ENCODER_LAYERS,
        "tied_logits": False,
        "decoder_relative_buckets": 64,
    }
    return toy.model("diffusion", "encoder_decoder", **{**fields, **config})


@pytest.fixture(scope="module")
def resized(tmp_path_factory):
    """The golden T5 checkpoint, converted for `_t5_like()`: its embeddings are fresh."""
    directory = tmp_path_factory.mktemp("resized")
    source = parity.golden_checkpoint("t5", directory)
    return conversion.convert(source, f"{directory}/ours", model=_t5_like(), partial=True).path


def test_a_t5x_checkpoint_becomes_ours_and_is_described(tmp_path, capsys):
    source = parity.golden_checkpoint("scalable_t5", tmp_path)
    convert.main([f"--from={source}", f"--to={tmp_path}/ours"])
    _assert_same(_read(f"{tmp_path}/ours/checkpoint_7"), _read(source))
    text = capsys.readouterr().out
    assert "T5X's optimiser state is dropped" in text
    assert "decoder/layers_*/mlp/wo/kernel" in text and "target/decoder/decoder/mlp/wo" in text
    gin_utils.parse_config(
        ["models/encoder_decoder/tiny.gin", "objectives/diffusion.gin"],
        ["DROPOUT_RATE=0.0"],
    )
    gin.clear_config()
    gin.parse_config((tmp_path / "ours" / "network.gin").read_text())
    config = gin.get_configurable(TransformerConfig)(vocab_size=parity.VOCAB)
    expected = parity.our_config("scalable_t5", scan_layers=False)
    assert config == expected
    assert gin.query_parameter("%VOCAB_SIZE") == parity.VOCAB


def test_a_model_given_by_gin_files_must_be_fitted(tmp_path):
    source = parity.golden_checkpoint("t5", tmp_path)
    arguments = [f"--from={source}", f"--to={tmp_path}/ours",
                 "--gin_file=models/encoder_decoder/tiny.gin"]  # fmt: skip
    with pytest.raises(CheckpointMismatchError, match="With --partial") as error:
        convert.main(arguments)
    assert "token_embedder/embedding: the checkpoint has [40, 16], the model [768, 96]" in str(
        error.value
    )
    assert "the model has no encoder/layers_0" not in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_partial_conversion_takes_what_fits_and_lists_what_starts_fresh(tmp_path, capsys):
    source, model = parity.golden_checkpoint("t5", tmp_path), _t5_like(num_layers=3)
    with pytest.raises(CheckpointMismatchError, match="lacks decoder/layers_2/mlp/wo/kernel"):
        conversion.convert(source, f"{tmp_path}/ours", model=model)
    converted = conversion.convert(source, f"{tmp_path}/ours", model=model, partial=True)
    conversion.print_conversion(converted)
    text = capsys.readouterr().out
    fresh = {n for n, array in converted.arrays.items() if array.source == conversion.FRESH}
    layer = {name for name in converted.arrays if name.startswith("decoder/layers_2/")}
    assert fresh == {*layer, "token_embedder/embedding", "token_embedder/logits_kernel"}
    assert all(name in text for name in fresh)
    assert converted.dropped == ("token_embedder/embedding", "token_embedder/logits_kernel")
    read, original = _read(converted.path), _read(source)
    np.testing.assert_array_equal(
        read["decoder/layers_1/mlp/wo/kernel"], original["decoder/layers_1/mlp/wo/kernel"]
    )
    assert read["token_embedder/embedding"].std() > 0.5  # fresh, not zero


@pytest.mark.slow  # of its parts, each has a test here or in training/test_loop.py
def test_a_t5x_checkpoint_is_trained_further_as_a_diffusion_model(tmp_path, capsys, resized):
    written = conversion.convert(resized, f"{tmp_path}/t5x", "t5x:t5")
    # The run starts from T5X's own layout and names.
    state = toy.run(
        tmp_path / "run", None, _t5_like(), relative_steps=3,
        restore=RestoreCheckpointConfig(written.path),
    )  # fmt: skip
    assert int(state.step) == parity.STEP + 3
    assert "optimiser starts fresh" in capsys.readouterr().out
    before, after = _read(written.path), flax.traverse_util.flatten_dict(state.params, sep="/")
    name = "decoder/layers_0/mlp/wo/kernel"
    moved = np.abs(np.asarray(after[name]) - before[name]).max()
    assert 0 < moved < 0.1
    assert list_checkpoints(str(tmp_path / "run"))[-1][0] == parity.STEP + 3


@pytest.mark.parametrize("scan_layers", [pytest.param(False, marks=pytest.mark.slow), True])
def test_ours_goes_to_t5xs_layout_and_back(scan_layers, tmp_path, resized):
    model = _t5_like(scan_layers=scan_layers)
    first = conversion.convert(resized, f"{tmp_path}/a", model=model)
    theirs = conversion.convert(first.path, f"{tmp_path}/b", "t5x", model=model)
    checkpoint = t5x_checkpoints.open_checkpoint(theirs.path)
    assert checkpoint.step == parity.STEP
    assert any("/layers/" in name for name in checkpoint.params) == scan_layers
    abstract = abstract_params(model, PjitPartitioner(), {**toy_shapes()}, {})
    one, other = (restore_params(path, abstract) for path in (first.path, theirs.path))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def toy_shapes():
    return {"encoder_input_tokens": (1, 4), "decoder_input_tokens": (1, 4)}


def test_bfloat16_is_kept_unless_another_type_is_asked_for(tmp_path):
    source = parity.golden_checkpoint("decoder_only", tmp_path)
    kept = conversion.convert(source, f"{tmp_path}/kept")
    assert {str(x.dtype) for x in open_params(kept.path).values()} == {"bfloat16"}
    _assert_same(_read(kept.path), _read(source))
    wide = conversion.convert(kept.path, f"{tmp_path}/wide", "t5x:decoder_only", dtype="float32")
    assert {str(x.dtype) for x in open_params(wide.path).values()} == {"float32"}


def test_settings_that_no_shape_shows_are_in_the_description(tmp_path):
    source = parity.golden_checkpoint("decoder_only", tmp_path)
    conversion.convert(source, f"{tmp_path}/ours")
    gin.parse_config((tmp_path / "ours" / "network.gin").read_text())
    config = gin.get_configurable(TransformerConfig)(vocab_size=parity.VOCAB)
    expected = parity.our_config("decoder_only", num_encoder_layers=None, relative_buckets=64)
    assert config == expected


def test_a_dry_run_writes_nothing_and_nothing_is_overwritten(tmp_path):
    source = parity.golden_checkpoint("t5", tmp_path)
    convert.main([f"--from={source}", f"--to={tmp_path}/ours", "--dry_run"])
    assert not (tmp_path / "ours").exists()
    conversion.convert(source, f"{tmp_path}/ours")
    with pytest.raises(FileExistsError, match="choose another --to"):
        conversion.convert(source, f"{tmp_path}/ours")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("t5x:t6",), "did you mean 't5x:t5'"),
        (("diffusion_t5x", {"partial": True}), "--partial: fresh parameters need a model"),
        (("t5x:t5", {"model": object()}), "takes no gin files"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(arguments, message, tmp_path):
    layout, keywords = (*arguments, {})[:2]
    with pytest.raises(ValueError, match=message):
        conversion.convert(
            parity.golden_checkpoint("t5", tmp_path), f"{tmp_path}/x", layout, **keywords
        )


def test_a_run_of_t5xs_is_known_by_its_directory_its_checkpoint_and_its_index(tmp_path):
    path = parity.golden_checkpoint("t5", tmp_path)
    for name in (str(tmp_path), path, f"{path}/checkpoint"):
        assert list_checkpoints(name) == [(parity.STEP, path)]
