"""Conversion between the names and shapes of T5X's networks and ours is lossless."""

import flax
import jax
import numpy as np
import parity
import pytest
from small_networks import make

from diffusion_t5x.interop import t5x_networks
from diffusion_t5x.interop.stored_arrays import StoredArray
from diffusion_t5x.interop.t5x_checkpoints import open_checkpoint
from diffusion_t5x.networks.attention import relative_position_bucket
from diffusion_t5x.networks.decoder_only import DecoderOnly


def _read(params):
    return {name: array.read() for name, array in params.items()}


def _assert_same(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize("network", parity.NETWORKS)
def test_there_and_back_changes_nothing(network, tmp_path):
    params = open_checkpoint(parity.golden_checkpoint(network, tmp_path)).params
    assert t5x_networks.network_of(params) == network
    ours = t5x_networks.to_ours(params)
    assert t5x_networks.network_of(ours) == t5x_networks.OURS
    back = t5x_networks.from_ours(ours, network)
    _assert_same(_read(back), _read(params))
    assert all(back[name].shape == params[name].shape for name in params)
    # Stacking ours into scanned layers and splitting them again changes nothing either.
    _assert_same(_read(t5x_networks.to_ours(t5x_networks.scan(ours))), _read(ours))


def test_one_table_of_distances_serves_every_layer_or_is_refused(tmp_path):
    ours = t5x_networks.to_ours(open_checkpoint(parity.golden_checkpoint("t5", tmp_path)).params)
    scalable = t5x_networks.from_ours(ours, "scalable_t5")
    again = t5x_networks.to_ours(scalable)
    _assert_same(
        _read(t5x_networks.from_ours(again, "t5")), _read(t5x_networks.from_ours(ours, "t5"))
    )
    own = t5x_networks.to_ours(
        open_checkpoint(parity.golden_checkpoint("scalable_t5", tmp_path)).params
    )
    with pytest.raises(ValueError, match=r"layers_1/relpos_bias.* differs from that of layer 0"):
        t5x_networks.from_ours(own, "t5")


def test_a_decoders_table_gives_the_bias_that_t5x_reads_at_every_distance():
    table = np.arange(64.0).reshape(2, 32)
    stored = {
        "decoder/decoder_norm/scale": StoredArray("norm", (1,), np.dtype("f4"), lambda: np.ones(1)),
        "decoder/relpos_bias/rel_embedding": StoredArray("t", (2, 32), table.dtype, lambda: table),
    }
    ours = t5x_networks.to_ours(stored)["decoder/relpos_bias/rel_embedding"]
    assert ours.shape == (2, 64)
    distances = np.arange(-300, 300)
    bucket = relative_position_bucket(
        jax.numpy.asarray(distances), num_buckets=64, max_distance=128
    )
    # T5's causal buckets by their definition: 16 of one distance each, 16 growing up to 128.
    back = np.maximum(-distances, 0)
    with np.errstate(divide="ignore"):
        far = 16 + (np.log(back / 16 + 1e-7) / np.log(128 / 16) * 16).astype(int)
    theirs = np.where(back < 16, back, np.minimum(far, 31))
    np.testing.assert_array_equal(ours.read()[:, bucket], table[:, theirs])


def test_parameters_that_a_network_cannot_hold_are_refused(tmp_path):
    t5 = t5x_networks.to_ours(open_checkpoint(parity.golden_checkpoint("t5", tmp_path)).params)
    with pytest.raises(ValueError, match="cannot hold the parameters of an encoder-decoder"):
        t5x_networks.from_ours(t5, "decoder_only")
    with pytest.raises(ValueError, match="cannot hold the parameters of a decoder-only"):
        without = {n: a for n, a in t5.items() if not n.startswith("encoder/")}
        t5x_networks.from_ours(without, "t5")
    name = "decoder/relpos_bias/rel_embedding"
    with pytest.raises(ValueError, match="decoder_relative_buckets = 64"):
        t5x_networks.from_ours({**t5, name: t5["encoder/relpos_bias/rel_embedding"]}, "t5")
    with pytest.raises(ValueError, match="belong to no known network"):
        t5x_networks.to_ours({"a/b": t5[name]})
    with pytest.raises(ValueError, match="'t6' is unknown"):
        t5x_networks.from_ours(t5, "t6")
    t5x_networks.check_is_t5(t5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positions": "rotary"}, "without relpos_bias"),
        ({"positions": "learned", "max_positions": 9}, "position_embedding"),
        ({"num_kv_heads": 1}, "layers_0/self_attention/key/kernel"),
        ({"qkv_bias": True}, "self_attention/key/bias"),
        ({"qk_norm": True}, "self_attention/key_norm"),
        ({"norm": "layer"}, "final_layer_norm/bias"),
        ({"post_norms": True}, "post_mlp_layer_norm"),
    ],
    ids=str,
)
def test_a_network_of_another_family_is_refused_before_anything_is_written(settings, message):
    _, params = make(DecoderOnly, **settings)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    stored = {name: StoredArray(name, x.shape, x.dtype, x.copy) for name, x in flat.items()}
    with pytest.raises(ValueError, match=message):
        t5x_networks.check_is_t5(stored)
