"""Our networks compute from T5X's checkpoints what T5X does: logits, losses, scores, greedy text.

The golden files were made by running T5X once (`tests/tools/t5x_side.py`); `inputs.json` has its
inputs.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from diffusion_t5x.checkpointing.reading import CheckpointMismatchError, restore_params
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.train_state import abstract_params

SHAPES = {
    "encoder_input_tokens": (1, parity.PREFIX_LENGTH),
    "decoder_input_tokens": (1, parity.TARGET_LENGTH),
}


def restore(network, path, **overrides):
    model = parity.our_model(network, **overrides)
    return restore_params(path, abstract_params(model, PjitPartitioner(), SHAPES, {}))


@pytest.mark.parametrize("network", parity.NETWORKS)
def test_our_network_computes_what_t5xs_does(network, tmp_path):
    params = restore(network, parity.golden_checkpoint(network, tmp_path))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    theirs = dict(np.load(parity.GOLDEN / f"{network}.npz"))
    assert theirs["logits"].std() > 0.5  # so the comparison is of signals, not of noise
    assert len(np.unique(theirs["greedy"])) > 5
    parity.assert_equal(parity.our_numbers(network, params), theirs)


@pytest.mark.parametrize("network", ["t5", "scalable_t5"])
def test_layers_are_read_into_scanned_ones_and_into_ones_that_are_not(network, tmp_path):
    path = parity.golden_checkpoint(network, tmp_path)
    looped, scanned = (restore(network, path, scan_layers=scan) for scan in (False, True))
    for side, count in (("encoder", parity.ENCODER_LAYERS), ("decoder", parity.LAYERS)):
        layers = [looped[side].pop(f"layers_{number}") for number in range(count)]
        stacked = jax.tree.map(lambda *x: np.stack(x), *layers)
        jax.tree.map(np.testing.assert_array_equal, scanned[side].pop("layers"), stacked)
    jax.tree.map(np.testing.assert_array_equal, looped, scanned)


def test_a_model_that_reads_distances_otherwise_is_refused(tmp_path):
    path = parity.golden_checkpoint("t5", tmp_path)
    with pytest.raises(CheckpointMismatchError, match="decoder_relative_buckets = 64") as error:
        restore("t5", path, decoder_relative_buckets=None)
    assert "rel_embedding: the checkpoint has [2, 64], the model [2, 32]" in str(error.value)
    with pytest.raises(CheckpointMismatchError, match="relative_bias_per_layer = False"):
        restore("t5", path, relative_bias_per_layer=True)
    with pytest.raises(CheckpointMismatchError, match="tied_logits = False"):
        restore("t5", path, tied_logits=True)


def test_the_setting_that_no_shape_shows_is_named(tmp_path, capsys):
    restore("decoder_only", parity.golden_checkpoint("decoder_only", tmp_path))
    assert "TransformerConfig.start_token = True" in capsys.readouterr().out


def test_the_recorded_inputs_are_those_of_the_comparison():
    recorded = json.loads((parity.GOLDEN / "inputs.json").read_text())
    assert recorded["texts"] == [list(pair) for pair in parity.texts()]
    assert recorded["networks"] == json.loads(json.dumps(parity.NETWORKS))
    assert sum(file.stat().st_size for file in parity.GOLDEN.iterdir()) < 200_000
