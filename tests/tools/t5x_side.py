"""T5X's side of the comparison; needs T5X on the Python path.

As a program it writes the golden files of `tests/tools/golden`, each a checkpoint that T5X wrote
and the numbers that T5X's own network computes with it:

    python tests/tools/t5x_side.py
"""

from __future__ import annotations

import importlib
import json
import pathlib
import sys
import tarfile
import tempfile
import types

if __name__ == "__main__":
    ROOT = pathlib.Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(ROOT), str(ROOT / "tests/tools")]

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import parity
import t5x.models
from t5x import adafactor, checkpoints, decoding, partitioning, train_state, utils

# network -> (layout, dtype) of its golden checkpoint
LAYOUTS = {
    "t5": ("legacy", "float32"),
    "scalable_t5": ("orbax", "float32"),
    "decoder_only": ("legacy", "bfloat16"),
}
GREEDY = {"topk": 1, "rescale_log_probs": False, "max_decode_steps": parity.TARGET_LENGTH}
INPUT_SHAPES = {
    "encoder_input_tokens": (2, parity.PREFIX_LENGTH),
    "decoder_input_tokens": (2, parity.TARGET_LENGTH),
    "decoder_target_tokens": (2, parity.TARGET_LENGTH),
}


def make_model(network, *, prefix_bidirectional=False):
    """One of T5X's models with one of its example networks."""
    module = importlib.import_module(f"t5x.examples.{network}.network")
    kind = parity.NETWORKS[network]
    fields = {
        **parity.SIZES,
        "vocab_size": parity.VOCAB,
        "emb_dim": parity.EMBED_DIM,
        "mlp_activations": kind["mlp_activations"],
        "logits_via_embedding": kind["tied"],
        "dropout_rate": 0.0,
    }
    vocabulary = types.SimpleNamespace(vocab_size=parity.VOCAB, eos_id=1)
    optimizer = adafactor.Adafactor(
        decay_rate=0.8, step_offset=0,
        logical_factor_rules=adafactor.standard_logical_factor_rules(),
    )  # fmt: skip
    if network == "decoder_only":
        config = module.TransformerConfig(**fields, num_layers=parity.LAYERS)
        return t5x.models.DecoderOnlyModel(
            module.DecoderWrapper(config), vocabulary, optimizer,
            inputs_bidirectional_attention=prefix_bidirectional, **parity.LOSS,
        )  # fmt: skip
    config = module.T5Config(
        **fields, num_encoder_layers=parity.ENCODER_LAYERS, num_decoder_layers=parity.LAYERS
    )
    return t5x.models.EncoderDecoderModel(
        module.Transformer(config), vocabulary, vocabulary, optimizer,
        decode_fn=decoding.temperature_sample, **parity.LOSS,
    )  # fmt: skip


def initial_params(network, dtype="float32", seed=0):
    """Fresh parameters as T5X draws them, rounded to `dtype`, changed so that they all matter.

    Norms are no longer all ones, distances weigh more, and where the output matrix is the embedding
    a token does not chiefly predict itself.
    """
    model = make_model(network)
    variables = jax.jit(lambda rng: model.get_initial_variables(rng, INPUT_SHAPES))(
        jax.random.PRNGKey(seed)
    )
    params = flax.core.unfreeze(variables["params"])
    keys = iter(jax.random.split(jax.random.PRNGKey(seed + 1), 999))

    def spread(path, x):
        tied = parity.NETWORKS[network]["tied"]
        if path[-1].key == "scale":
            x = x + 0.3 * jax.random.normal(next(keys), x.shape)
            return 10.0 * x if tied and path[-2].key == "decoder_norm" else x
        if path[-1].key == "embedding" and tied:
            return 0.1 * x
        if path[-1].key == "rel_embedding":
            return 3.0 * x
        return x

    params = jax.tree_util.tree_map_with_path(spread, params)
    return jax.tree.map(lambda x: np.asarray(x.astype(dtype).astype(jnp.float32)), params)


def t5x_numbers(network, params):
    """What is compared, from T5X's network: name -> array."""
    pairs = parity.texts()
    one_a_row = [[pair] for pair in pairs]
    patterns = {"": False}
    if network == "decoder_only":
        patterns["prefix_"] = True
        batch = parity.decoder_only_batch(one_a_row)
        packed = parity.decoder_only_batch(parity.PACKED_ROWS(pairs))
    else:
        batch = parity.encoder_decoder_batch(pairs)
        packed = parity.packed_batch(parity.PACKED_ROWS(pairs))
    numbers = {}
    for prefix, bidirectional in patterns.items():
        model = make_model(network, prefix_bidirectional=bidirectional)
        logits = np.asarray(jax.jit(model._compute_logits)(params, batch))
        starts = [len(p) if network == "decoder_only" else 0 for p, _ in pairs]
        rows = [logits[i, s : s + len(pairs[i][1])] for i, s in enumerate(starts)]
        loss = jax.jit(lambda p, b, model=model: model.loss_fn(p, b, None)[0])
        tokens, aux = jax.jit(
            lambda p, b, model=model: model.predict_batch_with_aux(p, b, decoder_params={**GREEDY})
        )(params, batch)
        numbers |= {
            f"{prefix}logits": np.concatenate(rows),
            f"{prefix}loss": np.asarray(loss(params, batch)),
            f"{prefix}packed_loss": np.asarray(loss(params, packed)),
            f"{prefix}scores": np.asarray(jax.jit(model.score_batch)(params, batch)),
            f"{prefix}greedy": np.asarray(tokens)[:, : parity.TARGET_LENGTH],
            f"{prefix}greedy_scores": np.asarray(aux["scores"]),
        }
    return numbers


def _manager(network, directory, layout, dtype):
    """T5X's partitioner, train state and writer or reader of checkpoints."""
    model = make_model(network)
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    initializer = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def, init_fn=model.get_initial_variables,
        input_shapes=INPUT_SHAPES, partitioner=partitioner,
    )  # fmt: skip
    state = initializer.from_scratch(jax.random.PRNGKey(3))
    maker = (
        checkpoints.OrbaxCheckpointManagerInterface
        if layout == "orbax"
        else lambda directory, *a, **k: checkpoints.Checkpointer(*a, checkpoints_dir=directory, **k)
    )
    shape = initializer.global_train_state_shape
    manager = maker(str(directory), shape, partitioner, save_dtype=jnp.dtype(dtype))
    return manager, state


def write_checkpoint(network, params, directory, layout="legacy", dtype="float32"):
    """Writes `{directory}/checkpoint_7` as T5X does, Adafactor's state included."""
    pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    manager, state = _manager(network, directory, layout, dtype)
    state = state.replace_params(flax.core.freeze(jax.tree.map(jnp.asarray, params)))
    manager.save(state.replace_step(jnp.int32(parity.STEP)))
    if layout == "orbax":
        manager.close()
    return f"{directory}/checkpoint_{parity.STEP}"


def read_checkpoint(network, path, layout="orbax"):
    """Parameters that T5X restores from a checkpoint without an optimiser's state."""
    model = make_model(network)
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    initializer = utils.TrainStateInitializer(
        optimizer_def=None, init_fn=model.get_initial_variables, input_shapes=INPUT_SHAPES,
        partitioner=partitioner,
    )  # fmt: skip
    state, _ = utils.create_checkpoint_manager_and_restore(
        initializer, partitioner,
        utils.RestoreCheckpointConfig(path=path, mode="specific", dtype="float32"),
        path, jax.random.PRNGKey(0), use_orbax=layout == "orbax",
    )  # fmt: skip
    assert isinstance(state, train_state.InferenceState)
    return jax.device_get(flax.core.unfreeze(state.params)), int(state.step)


def main():
    """Writes the golden files."""
    parity.GOLDEN.mkdir(exist_ok=True)
    for network, (layout, dtype) in LAYOUTS.items():
        params = initial_params(network, dtype)
        with tempfile.TemporaryDirectory() as directory:
            write_checkpoint(network, params, directory, layout, dtype)
            with tarfile.open(parity.GOLDEN / f"{network}.tar.xz", "w:xz") as archive:
                archive.add(directory, arcname=".")
        np.savez_compressed(parity.GOLDEN / f"{network}.npz", **t5x_numbers(network, params))
    inputs = {
        "made by": "python tests/tools/t5x_side.py",
        "versions": {name: importlib.import_module(name).__version__
                     for name in ("jax", "flax", "orbax.checkpoint", "numpy")},
        "layouts": LAYOUTS,
        "networks": parity.NETWORKS,
        "sizes": {**parity.SIZES, "embed_dim": parity.EMBED_DIM, "layers": parity.LAYERS,
                  "encoder_layers": parity.ENCODER_LAYERS, "vocab": parity.VOCAB},
        "loss": parity.LOSS,
        "texts": parity.texts(),
    }  # fmt: skip
    (parity.GOLDEN / "inputs.json").write_text(json.dumps(inputs) + "\n")
    for file in sorted(parity.GOLDEN.iterdir()):
        print(f"{file.stat().st_size:>8} {file.name}")


if __name__ == "__main__":
    main()
