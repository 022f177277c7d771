"""Rules, meshes, and that the way a model is split changes no number."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from diffusion_t5x.runtime import partitioning
from diffusion_t5x.runtime.partitioning import (
    PjitPartitioner,
    multi_slice_mesh,
    standard_logical_axis_rules,
)


@pytest.mark.parametrize(
    ("activations", "parameters", "embed"),
    [(1, 1, [None]), (2, 1, ["model"]), (1, 2, ["data"]), (2, 2, ["model", "data"])],
)
def test_standard_rules_are_those_of_t5x(activations, parameters, embed):
    rules = standard_logical_axis_rules(activations, parameters, [("mine", "model")])
    by_name = {}
    for name, axis in rules:
        by_name.setdefault(name, []).append(axis)
    assert by_name["embed"] == embed
    for name in ("vocab", "mlp", "heads", "joined_kv", "mine"):
        assert by_name[name] == ["model"]
    assert by_name["batch"] == ["data"]
    for name in ("kv", "length", "layers", "relpos_buckets"):
        assert by_name[name] == [None]


def test_impossible_layouts_are_refused():
    with pytest.raises(ValueError, match="expected 1 or 2"):
        standard_logical_axis_rules(3, 1)
    with pytest.raises(ValueError, match="num_partitions = 3 does not divide"):
        PjitPartitioner(3)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """A device of a slice, as far as meshes ask; none of these runs anything."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "fake"
    device_kind: str = "fake"


# Two slices of two hosts with four devices each, and the devices named in no useful order.
SLICES = [FakeDevice(n, n // 4, n // 8) for n in (*range(1, 16, 2), *range(0, 16, 2))]


def test_over_slices_the_outer_part_of_each_axis_is_the_slow_network():
    mesh = multi_slice_mesh(SLICES, (1, 4, 2), (2, 1, 1))
    assert dict(mesh.shape) == {"replica": 2, "data": 4, "model": 2}
    for replica in range(2):
        assert {device.slice_index for device in mesh.devices[replica].flat} == {replica}
    mesh = multi_slice_mesh(SLICES, (1, 4, 2), (1, 2, 1))
    assert dict(mesh.shape) == {"replica": 1, "data": 8, "model": 2}
    assert [device.slice_index for device in mesh.devices[0, :, 0]] == [0] * 4 + [1] * 4
    assert len({device.id for device in mesh.devices.flat}) == 16


def test_where_there_are_no_slices_each_process_is_one():
    devices = [dataclasses.replace(device, slice_index=0, platform="cpu") for device in SLICES]
    mesh = multi_slice_mesh(devices, (1, 4, 1), (4, 1, 1))
    for replica in range(4):
        assert {device.process_index for device in mesh.devices[replica].flat} == {replica}
    tpus = [dataclasses.replace(device, platform="tpu") for device in devices]
    with pytest.raises(ValueError, match="the devices are of 1 slices"):
        multi_slice_mesh(tpus, (1, 4, 1), (4, 1, 1))


@pytest.mark.parametrize(
    ("ici", "dcn", "message"),
    [
        ((4, 2), (2, 1, 1), r"ici_mesh_shape = \(4, 2\); expected three positive"),
        ((1, 4, 2), (2, 0, 1), r"dcn_mesh_shape = \(2, 0, 1\); expected three positive"),
        ((1, 4, 2), (4, 1, 1), r"4 slices, but the devices are of 2 slices; .*\(2, 1, 1\)"),
        ((1, 4, 1), (2, 1, 1), r"4 devices per slice, but the slices have \[8\]; .*\(1, 8, 1\)"),
    ],
)
def test_shapes_that_do_not_fit_the_slices_are_refused_with_some_that_do(ici, dcn, message):
    with pytest.raises(ValueError, match=message):
        multi_slice_mesh(SLICES, ici, dcn)


@pytest.mark.parametrize(
    "settings",
    [
        {"ici_mesh_shape": (1, 4, 2)},
        {"dcn_mesh_shape": (2, 1, 1)},
        {"ici_mesh_shape": (1, 4, 2), "dcn_mesh_shape": (2, 1, 1), "num_partitions": 2},
    ],
)
def test_settings_of_one_and_of_several_slices_do_not_mix(settings):
    with pytest.raises(ValueError, match="expected both shapes and num_partitions = 1"):
        PjitPartitioner(**settings)


def test_over_slices_batches_are_split_over_both_data_axes():
    shapes = {"ici_mesh_shape": (1, 1, 1), "dcn_mesh_shape": (1, 1, 1)}
    partitioner = PjitPartitioner(**shapes, devices=jax.devices()[:1])
    assert dict(partitioner.logical_axis_rules)["batch"] == ("replica", "data")
    assert partitioner.batch_sharding.spec == PartitionSpec(("replica", "data"))
    assert partitioner.num_data_shards == 1


def _on_eight_devices(name):
    """What `tests.tools.eight_devices` computes, in a process with as many devices."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.tools.eight_devices", name],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _check_shardings(first, *others):
    for other in others:
        assert other["loss"] == pytest.approx(first["loss"], rel=1e-5)
        assert other["grad_squares"] == pytest.approx(first["grad_squares"], rel=1e-3, abs=1e-7)
        assert other["embedding"] == pytest.approx(first["embedding"], abs=1e-4)
        np.testing.assert_allclose(other["scores"], first["scores"], rtol=1e-4)
        assert other["constraints"] > 0


def test_shardings_over_eight_devices_give_the_same_loss_gradients_and_update():
    results = _on_eight_devices("sharded")
    _check_shardings(*results)
    assert [one["shard"] for one in results] == [[264, 16], [132, 4]]


@pytest.mark.slow
def test_more_devices_than_heads_of_keys_share_them():
    results = _on_eight_devices("sharded_grouped")
    _check_shardings(*results)
    assert [one["shard"] for one in results] == [[264, 16], [66, 8]]


def test_a_compiled_program_is_traced_once_and_its_seconds_are_counted(monkeypatch, capsys):
    partitioner, traces = PjitPartitioner(), []
    function = partitioner.jit(lambda x: traces.append(x.shape) or 2 * x)
    monkeypatch.setattr(partitioning, "WORTH_TELLING_SECONDS", np.inf)
    double = partitioner.compile("doubling", function, np.ones(3, np.float32))
    assert capsys.readouterr() == ("", "")  # nobody has waited for it
    monkeypatch.setattr(partitioning, "WORTH_TELLING_SECONDS", 0.0)
    partitioner.compile("doubling", function, np.ones(4, np.float32))
    assert re.fullmatch(r"compiled doubling in \d+\.\d s\n", capsys.readouterr().err)
    np.testing.assert_array_equal(double(np.ones(3, np.float32)), 2.0)
    assert traces == [(3,), (4,)]
    assert partitioner.compile_seconds.keys() == {"doubling"}


@pytest.mark.slow
def test_shardings_give_the_same_for_an_encoder_and_a_decoder():
    results = _on_eight_devices("sharded_encoder_decoder")
    _check_shardings(*results)
    assert [one["shard"] for one in results] == [[264, 16], [132, 4], [66, 16]]


@pytest.mark.slow
def test_chunks_of_attention_rows_move_no_row_to_another_device():
    (whole, no_loops, _), (chunked, loops, gathers), chunks_of_two_axes = _on_eight_devices(
        "chunked"
    )
    assert chunked == pytest.approx(whole, rel=1e-5)
    assert loops > no_loops
    assert gathers == 0
    assert chunks_of_two_axes == 2  # eight shards of two rows each


@pytest.mark.slow  # half a minute; resharding is Orbax's, and the rules have the test above
def test_a_checkpoint_is_restored_onto_other_devices_and_rules_with_the_same_logits():
    first, *others = _on_eight_devices("restored")
    assert [other["devices"] for other in others] == [8, 4, 1]
    assert [other["shard"] for other in others] == [[4, 8], [8, 16], [16, 16]]
    for other in others:
        assert other["state"] == first["state"]
        assert np.allclose(other["logits"], first["logits"], rtol=1e-5, atol=1e-5)
