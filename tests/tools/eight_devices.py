"""Computations over eight simulated devices, for a process of its own.

python -m tests.tools.eight_devices sharded

Prints the results of the computation that is named, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

sys.path.insert(0, os.path.dirname(__file__))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
import toy
from flax.linen import partitioning as nn_partitioning

from diffusion_t5x.checkpointing.checkpoints import Checkpointer, SaveCheckpointConfig
from diffusion_t5x.checkpointing.reading import restore_train_state
from diffusion_t5x.networks import attention
from diffusion_t5x.runtime.partitioning import PjitPartitioner, standard_logical_axis_rules
from diffusion_t5x.runtime.train_state import (
    abstract_train_state,
    create_train_state,
)
from diffusion_t5x.training import optimizers
from diffusion_t5x.training.train_step import Trainer

FEATURES = "encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens"


def _batch(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(1, 250, (rows, 6)).astype(np.int32) for name in FEATURES}
    return {**batch, "decoder_loss_weights": np.ones((rows, 6), np.float32)}


def sharded_steps(
    objective: str, architecture: str, layouts: Sequence[tuple[int, int]], **config: Any
) -> list[dict[str, Any]]:
    """A training step and a decoded batch for each number of partitions and of split dimensions."""
    batch = _batch(8)
    shapes = {name: value.shape for name, value in batch.items()}
    model = toy.model(
        objective, architecture, optimizers.adafactor(min_dim_size_to_factor=4),
        num_layers=2, **config,
    )  # fmt: skip
    out = []
    for partitions, dims in layouts:
        partitioner = PjitPartitioner(partitions, standard_logical_axis_rules(dims, dims))
        abstract = abstract_train_state(model, partitioner, shapes, {})
        state = create_train_state(model, partitioner, shapes, {}, jax.random.PRNGKey(0))
        trainer = Trainer(model, partitioner, abstract, 0, lambda step: 0.1, num_microbatches=2)
        sharded = partitioner.shard_batch(batch)
        metrics = trainer.empty_metrics(trainer.metric_shapes(state, sharded))
        lowered = trainer.step.lower(state, metrics, sharded)
        constraints = lowered.as_text().count("sharding_constraint")
        state, _, health = lowered.compile()(state, metrics, sharded)
        embedding = state.params["token_embedder"]["embedding"]
        predict = partitioner.jit(model.predict_batch_with_aux)
        _, aux = predict(state.params, sharded)
        out.append({
            "loss": float(health.loss),
            "grad_squares": np.asarray(health.grad_squares).tolist(),
            "embedding": np.asarray(embedding).ravel()[:200].tolist(),
            "shard": embedding.sharding.shard_shape(embedding.shape),
            "constraints": constraints,
            "scores": np.asarray(aux["scores"]).tolist(),
        })  # fmt: skip
    return out


def attention_in_chunks() -> list[Any]:
    """Loss, loops and gathers without and with chunks of rows; chunks over two mesh axes."""
    batch = _batch(16)
    shapes = {name: value.shape for name, value in batch.items()}
    partitioner = PjitPartitioner(1)
    out: list[Any] = []
    for block_logits in (2**20, 1):
        model = toy.model("autoregressive", "decoder_only", attention_block_logits=block_logits)
        params = create_train_state(model, partitioner, shapes, {}, jax.random.PRNGKey(0)).params
        step = partitioner.jit(jax.value_and_grad(lambda p, b, model=model: model.eval_fn(p, b)[0]))
        sharded = partitioner.shard_batch(batch)
        compiled = step.lower(params, sharded).compile()
        text = compiled.as_text()
        loss = float(compiled(params, sharded)[0])
        out.append([loss, text.count(" while("), text.count("all-gather(")])
    partitioner = PjitPartitioner(2)
    rules = [("batch", ("data", "model"))]
    with jax.set_mesh(partitioner.mesh), nn_partitioning.axis_rules(rules):
        out.append(attention._num_chunks(16, model.module.config, 16, 6, 6))
    return out


def restored_elsewhere() -> list[dict[str, Any]]:
    """A state saved from eight devices, then restored onto other meshes and rules."""
    tokens = _batch(8)["decoder_target_tokens"]
    shapes = {name: (1, 6) for name in FEATURES}
    model = toy.model(optimizer=optimizers.adafactor(min_dim_size_to_factor=4))
    out: list[dict[str, Any]] = []
    directory = tempfile.TemporaryDirectory()
    for devices, partitions, dims in ((8, 1, 1), (8, 4, 2), (4, 2, 1), (1, 1, 1)):
        rules = standard_logical_axis_rules(dims, dims)
        partitioner = PjitPartitioner(partitions, rules, jax.devices()[:devices])
        if out:
            abstract = abstract_train_state(model, partitioner, shapes, {})
            state = restore_train_state(f"{directory.name}/checkpoint_0", abstract)
        else:
            state = create_train_state(model, partitioner, shapes, {}, jax.random.PRNGKey(0))
            checkpointer = Checkpointer(directory.name, SaveCheckpointConfig())
            checkpointer.save(state)
            checkpointer.close()
        apply = partitioner.jit(
            lambda p, tokens: model.module.apply({"params": p}, tokens, tokens, "bidirectional")
        )
        kernel = state.params["decoder"]["layers_0"]["mlp"]["wo"]["kernel"]
        out.append({
            "logits": np.asarray(apply(state.params, tokens)).tolist(),
            "state": [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(state)],
            "devices": len(kernel.sharding.device_set),
            "shard": kernel.sharding.shard_shape(kernel.shape),
        })  # fmt: skip
    return out


COMPUTATIONS = {
    "sharded": lambda: sharded_steps(
        "diffusion", "decoder_only", ((1, 1), (2, 2)), scan_layers=True
    ),
    "sharded_grouped": lambda: sharded_steps(
        "diffusion",
        "decoder_only",
        ((1, 1), (4, 2)),
        scan_layers=True,
        positions="rotary",
        num_kv_heads=2,
        qkv_bias=True,
        qk_norm=True,
        attention_scale=0.5,
        logits_scale=1.0,
        sliding_window=3,
        sliding_period=2,
    ),
    "sharded_encoder_decoder": lambda: sharded_steps(
        "autoregressive", "encoder_decoder", ((1, 1), (2, 2), (4, 1))
    ),
    "chunked": attention_in_chunks,
    "restored": restored_elsewhere,
}

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_disable_most_optimizations", True)  # most of the time is compilation
    print(json.dumps(COMPUTATIONS[sys.argv[1]]()))
