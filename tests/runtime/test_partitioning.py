"""Rules, meshes, and that the way a model is split changes no number."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import toy
from jax.sharding import PartitionSpec

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


_TWO_SHARDINGS = """
import json, sys
import jax
import numpy as np
sys.path.insert(0, {tests!r})
import toy
from diffusion_t5x.training import optimizers
from diffusion_t5x.runtime.partitioning import PjitPartitioner, standard_logical_axis_rules
from diffusion_t5x.runtime.train_state import abstract_train_state, create_train_state
from diffusion_t5x.training.train_step import Trainer

rng = np.random.default_rng(0)
batch = {{
    "encoder_input_tokens": rng.integers(1, 250, (8, 6)).astype(np.int32),
    "decoder_target_tokens": rng.integers(1, 250, (8, 6)).astype(np.int32),
    "decoder_loss_weights": np.ones((8, 6), np.float32),
}}
batch["decoder_input_tokens"] = batch["decoder_target_tokens"]
shapes = {{name: value.shape for name, value in batch.items()}}
out = []
for partitions, dims in ((1, 1), (4, 1), (2, 2)):
    model = toy.model(
        {objective!r}, {architecture!r}, optimizers.adafactor(min_dim_size_to_factor=4),
        scan_layers={scan!r}, num_layers=2,
    )
    partitioner = PjitPartitioner(partitions, standard_logical_axis_rules(dims, dims))
    abstract = abstract_train_state(model, partitioner, shapes, {{}})
    state = create_train_state(model, partitioner, shapes, {{}}, jax.random.PRNGKey(0))
    trainer = Trainer(model, partitioner, abstract, 0, lambda step: 0.1, num_microbatches=2)
    sharded = partitioner.shard_batch(batch)
    metrics = trainer.empty_metrics(trainer.metric_shapes(state, sharded))
    lowered = trainer.step.lower(state, metrics, sharded).as_text()
    state, _, health = trainer.step(state, metrics, sharded)
    embedding = state.params["token_embedder"]["embedding"]
    tokens, aux = partitioner.jit(lambda p, b: model.predict_batch_with_aux(p, b))(
        state.params, sharded
    )
    out.append({{
        "loss": float(health.loss),
        "grad_squares": np.asarray(health.grad_squares).tolist(),
        "embedding": np.asarray(embedding).ravel()[:200].tolist(),
        "shard": list(embedding.sharding.shard_shape(embedding.shape)),
        "constraints": lowered.count("sharding_constraint"),
        "scores": np.asarray(aux["scores"]).tolist(),
    }})
print(json.dumps(out))
"""


def _on_eight_devices(program):
    """What a Python program prints last, as JSON, where there are eight devices."""
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("objective", "architecture", "scan"),
    [
        ("diffusion", "decoder_only", True),
        pytest.param("autoregressive", "encoder_decoder", False, marks=pytest.mark.slow),
    ],
)
def test_shardings_over_eight_devices_give_the_same_loss_gradients_and_update(
    objective, architecture, scan
):
    program = _TWO_SHARDINGS.format(
        tests=os.path.dirname(toy.__file__),
        objective=objective,
        architecture=architecture,
        scan=scan,
    )
    first, *others = _on_eight_devices(program)
    for other in others:
        assert other["loss"] == pytest.approx(first["loss"], rel=1e-5)
        assert other["grad_squares"] == pytest.approx(first["grad_squares"], rel=1e-3, abs=1e-7)
        assert other["embedding"] == pytest.approx(first["embedding"], abs=1e-4)
        np.testing.assert_allclose(other["scores"], first["scores"], rtol=1e-4)
        assert other["constraints"] > 0
    assert first["shard"] == [264, 16]
    assert others[0]["shard"] == [66, 16]
    assert others[1]["shard"] == [132, 4]


_BLOCKS = """
import json, sys
import jax
import numpy as np
sys.path.insert(0, {tests!r})
import toy
from flax.linen import partitioning as nn_partitioning
from diffusion_t5x.networks import attention
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.train_state import create_params

rng = np.random.default_rng(0)
shapes = {{name: (16, 6) for name in (
    "encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")}}
batch = {{name: rng.integers(1, 250, shape).astype(np.int32) for name, shape in shapes.items()}}
out = []
for block_logits in (2**20, 1):
    model = toy.model("autoregressive", "decoder_only", attention_block_logits=block_logits)
    partitioner = PjitPartitioner(1)
    params = create_params(model, partitioner, shapes, {{}}, jax.random.PRNGKey(0))
    step = partitioner.jit(jax.value_and_grad(lambda p, b: model.eval_fn(p, b)[0]))
    compiled = step.lower(params, partitioner.shard_batch(batch)).compile()
    loss, _ = compiled(params, partitioner.shard_batch(batch))
    text = compiled.as_text()
    out.append([float(loss), text.count(" while("), text.count("all-gather(")])
partitioner = PjitPartitioner(2)
rules = [("batch", ("data", "model"))]
with jax.set_mesh(partitioner.mesh), nn_partitioning.axis_rules(rules):
    out.append(attention._num_chunks(16, model.module.config, 16, 6, 6))
print(json.dumps(out))
"""


def test_blocks_of_attention_move_no_row_to_another_device():
    done = _on_eight_devices(_BLOCKS.format(tests=os.path.dirname(toy.__file__)))
    (whole, no_loops, _), (blocked, loops, gathers), blocks_of_two_axes = done
    assert blocked == pytest.approx(whole, rel=1e-5)
    assert loops > no_loops
    assert gathers == 0
    assert blocks_of_two_axes == 2  # eight parts of two rows each


_RESTORED = """
import json, sys
import jax
import numpy as np
sys.path.insert(0, {tests!r})
import toy
from diffusion_t5x.training import optimizers
from diffusion_t5x.checkpointing.checkpoints import Checkpointer, SaveCheckpointConfig
from diffusion_t5x.checkpointing.reading import restore_train_state
from diffusion_t5x.runtime.partitioning import PjitPartitioner, standard_logical_axis_rules
from diffusion_t5x.runtime.train_state import abstract_train_state, create_train_state

tokens = np.random.default_rng(0).integers(1, 250, (8, 6)).astype(np.int32)
shapes = {{name: (1, 6) for name in (
    "encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")}}
model = toy.model(optimizer=optimizers.adafactor(min_dim_size_to_factor=4))
out = []
for devices, partitions, dims in ((8, 1, 1), (8, 4, 2), (4, 2, 1), (1, 1, 1)):
    checkpointer = Checkpointer({directory!r}, SaveCheckpointConfig())
    rules = standard_logical_axis_rules(dims, dims)
    partitioner = PjitPartitioner(partitions, rules, jax.devices()[:devices])
    if out:
        abstract = abstract_train_state(model, partitioner, shapes, {{}})
        state = restore_train_state({directory!r} + "/checkpoint_0", abstract)
    else:
        state = create_train_state(model, partitioner, shapes, {{}}, jax.random.PRNGKey(0))
        checkpointer.save(state)
    checkpointer.close()
    apply = partitioner.jit(
        lambda p, tokens: model.module.apply({{"params": p}}, tokens, tokens, "bidirectional")
    )
    kernel = state.params["decoder"]["layers_0"]["mlp"]["wo"]["kernel"]
    out.append({{
        "logits": np.asarray(apply(state.params, tokens)).tolist(),
        "state": [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(state)],
        "devices": len(kernel.sharding.device_set),
        "shard": kernel.sharding.shard_shape(kernel.shape),
    }})
print(json.dumps(out))
"""


def test_a_checkpoint_is_restored_onto_other_devices_and_rules_with_the_same_logits(tmp_path):
    first, *others = _on_eight_devices(
        _RESTORED.format(tests=os.path.dirname(toy.__file__), directory=str(tmp_path))
    )
    assert [other["devices"] for other in others] == [8, 4, 1]
    assert [other["shard"] for other in others] == [[4, 8], [8, 16], [16, 16]]
    for other in others:
        assert other["state"] == first["state"]
        assert np.allclose(other["logits"], first["logits"], rtol=1e-5, atol=1e-5)
