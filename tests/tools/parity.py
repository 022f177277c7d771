"""Small networks and texts on which T5X's networks and ours are compared, and our results."""

from __future__ import annotations

import functools
import itertools
import pathlib
import tarfile
import types

import jax
import numpy as np

from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.models import Model
from diffusion_t5x.networks.config import TransformerConfig
from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.networks.encoder_decoder import EncoderDecoder
from diffusion_t5x.objectives import NextToken
from diffusion_t5x.objectives.losses import CrossEntropy

GOLDEN = pathlib.Path(__file__).parent / "golden"
STEP = 7
VOCAB = 40
PREFIX_LENGTH, TARGET_LENGTH = 40, 24  # longer than distances with their own bucket
LOSS = {"z_loss": 1e-3, "label_smoothing": 0.1}
# Settings common to T5X's configurations and ours. T5 1.1 has a gated GELU and its own output
# matrix, T5 1.0 a ReLU and shared embeddings.
T5_1_1 = {"mlp_activations": ("gelu", "linear"), "tied": False}
T5_1_0 = {"mlp_activations": ("relu",), "tied": True}
NETWORKS = {"t5": T5_1_1, "scalable_t5": T5_1_0, "decoder_only": {**T5_1_1, "tied": True}}
# Every query attends to distant keys, so that the bias of each distance matters.
SIZES = {"num_heads": 2, "head_dim": 4, "mlp_dim": 12}
EMBED_DIM, LAYERS, ENCODER_LAYERS = 16, 2, 3


def golden_checkpoint(network, directory):
    """Unpacks the checkpoint that T5X wrote of a network, and returns its path."""
    with tarfile.open(GOLDEN / f"{network}.tar.xz") as archive:
        archive.extractall(directory, filter="data")
    return f"{directory}/checkpoint_{STEP}"


def our_config(network, **overrides):
    kind = NETWORKS[network]
    return TransformerConfig(
        **{
            **SIZES,
            "vocab_size": VOCAB,
            "embed_dim": EMBED_DIM,
            "num_layers": LAYERS,
            "num_encoder_layers": ENCODER_LAYERS,
            "mlp_activations": kind["mlp_activations"],
            "tied_logits": kind["tied"],
            "decoder_relative_buckets": 64,
            "relative_bias_per_layer": network == "scalable_t5",
            "scan_layers": network == "scalable_t5",
            "start_token": network == "decoder_only",
            **overrides,
        }
    )


def our_model(network, pattern="causal", **overrides):
    module = DecoderOnly if network == "decoder_only" else EncoderDecoder
    return Model(
        module(our_config(network, **overrides)),
        NextToken(pattern, CrossEntropy(**LOSS)),
        AutoregressiveDecoder(),
        types.SimpleNamespace(vocab_size=VOCAB, eos_id=1),
        None,
    )


def texts(seed=0):
    """Returns pairs of prefix and target of several lengths; targets end with 1."""
    rng = np.random.default_rng(seed)
    lengths = [(40, 24), (23, 20), (5, 3), (12, 9)]
    return [
        (rng.integers(2, VOCAB, n).tolist(), [*rng.integers(2, VOCAB, m - 1).tolist(), 1])
        for n, m in lengths
    ]


def _pad(rows, length):
    return np.array([[*row, *[0] * (length - len(row))] for row in rows], np.int32)


def _shift(targets, segments):
    shifted = np.pad(targets, [(0, 0), (1, 0)])[:, :-1]
    before = np.pad(segments, [(0, 0), (1, 0)])[:, :-1]
    return np.where(segments == before, shifted, 0).astype(np.int32)


def encoder_decoder_batch(pairs):
    """Returns the batch of `seqio.EncDecFeatureConverter`, one text per row."""
    targets = _pad([target for _, target in pairs], TARGET_LENGTH)
    return {
        "encoder_input_tokens": _pad([prefix for prefix, _ in pairs], PREFIX_LENGTH),
        "decoder_target_tokens": targets,
        "decoder_input_tokens": _shift(targets, np.ones_like(targets)),
        "decoder_loss_weights": (targets > 0).astype(np.int32),
    }


def packed_batch(rows):
    """Returns the same with several texts per row."""
    batch = {}
    for side, name, length in ((0, "encoder", PREFIX_LENGTH), (1, "decoder", TARGET_LENGTH)):
        parts = [[pair[side] for pair in row] for row in rows]
        segments = [[n + 1 for n, p in enumerate(row) for _ in p] for row in parts]
        positions = [[i for p in row for i in range(len(p))] for row in parts]
        feature = "encoder_input_tokens" if side == 0 else "decoder_target_tokens"
        batch[feature] = _pad([list(itertools.chain(*row)) for row in parts], length)
        batch[f"{name}_segment_ids"] = _pad(segments, length)
        batch[f"{name}_positions"] = _pad(positions, length)
    targets = batch["decoder_target_tokens"]
    batch["decoder_input_tokens"] = _shift(targets, batch["decoder_segment_ids"])
    batch["decoder_loss_weights"] = (targets > 0).astype(np.int32)
    return batch


def decoder_only_batch(rows):
    """Returns the batch of `seqio.DecoderFeatureConverter`, prefix and target in one array."""
    length = PREFIX_LENGTH + TARGET_LENGTH
    tokens = _pad([[t for pair in row for part in pair for t in part] for row in rows], length)
    segments = _pad(
        [[n + 1 for n, (p, t) in enumerate(row) for _ in p + t] for row in rows], length
    )
    weights = _pad(
        [[w for p, t in row for w in [0] * len(p) + [1] * len(t)] for row in rows], length
    )
    prefix = _pad(
        [[x for p, t in row for x in [1] * (len(p) + 1) + [0] * (len(t) - 1)] for row in rows],
        length,
    )
    batch = {
        "decoder_target_tokens": tokens,
        "decoder_input_tokens": _shift(tokens, segments),
        "decoder_loss_weights": weights,
        "decoder_causal_attention": prefix,
    }
    if any(len(row) > 1 for row in rows):
        batch["decoder_segment_ids"] = segments
        batch["decoder_positions"] = np.zeros_like(segments)  # T5X's networks do not read them
    return batch


PACKED_ROWS = lambda pairs: [[pairs[1], pairs[2]], [pairs[3]]]  # noqa: E731


def _compute(model, params, batch, packed):
    network = model.bind(params, batch)
    tokens, aux = model.predict_batch_with_aux(params, batch)
    return {
        "logits": network.logits(network.forward(batch["decoder_target_tokens"], None)),
        "loss": model.eval_fn(params, batch)[0],
        "packed_loss": model.eval_fn(params, packed)[0],
        "scores": model.score_batch(params, batch),
        "greedy": tokens,
        "greedy_scores": aux["scores"],
    }


def our_numbers(network, params, **overrides):
    """Returns the arrays to compare, computed by our network, by name."""
    pairs = texts()
    batch, packed = encoder_decoder_batch(pairs), packed_batch(PACKED_ROWS(pairs))
    numbers = {}
    patterns = {"": "causal"}
    if network == "decoder_only":
        patterns["prefix_"] = "prefix_bidirectional"
    for prefix, pattern in patterns.items():
        model = our_model(network, pattern, **overrides)
        values = jax.device_get(jax.jit(functools.partial(_compute, model))(params, batch, packed))
        rows = [values["logits"][i, : len(target)] for i, (_, target) in enumerate(pairs)]
        numbers |= {f"{prefix}{name}": value for name, value in values.items()}
        numbers[f"{prefix}logits"] = np.concatenate(rows)
    return numbers


def assert_equal(ours, theirs):
    """Compares logits, losses and scores to float32's tolerance, and greedy tokens exactly."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name.endswith("greedy"):
            np.testing.assert_array_equal(ours[name], value, err_msg=name)
        else:
            np.testing.assert_allclose(ours[name], value, rtol=2e-5, atol=2e-4, err_msg=name)
