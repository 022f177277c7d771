"""What the benchmarks of networks run, on ours and on what they are compared with.

The baseline is T5X's decoder-only example where T5X can be imported, else the plain transformer of
`plain_transformer.py`: both hold all attention weights and all logits. Each JSON line names it.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import statistics
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.shapes import KEY, Shape
from diffusion_t5x import models
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.diffusion import DiffusionDecoder
from diffusion_t5x.networks.config import TransformerConfig
from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.objectives import NextToken, StepUnrolledDenoising
from diffusion_t5x.objectives.corruption import UniformCorruption
from diffusion_t5x.objectives.losses import CrossEntropy


def our_model(
    shape: Shape,
    objective: str,
    *,
    block_logits: int | None = None,
    decoder: Mapping[str, Any] | None = None,
    **config: Any,
) -> models.Model:
    """One of our models.

    Args:
      shape: of the network.
      objective: 'autoregressive' or 'diffusion'.
      block_logits: of the loss; None for its default.
      decoder: fields of the diffusion decoder.
      **config: further fields of `TransformerConfig`.
    """
    fields = {} if block_logits is None else {"block_logits": block_logits}
    loss = CrossEntropy(**fields)
    corruption = UniformCorruption(shape.vocab_size)
    if objective == "autoregressive":
        parts = NextToken(cross_entropy=loss), AutoregressiveDecoder(eos_id=-1)
    else:
        sampler = DiffusionDecoder(corruption, **(decoder or {}))
        pattern = {}
        if sampler.block_length:
            pattern = {
                "attention_pattern": "causal_prefix",
                "block_length": sampler.block_length,
            }
        parts = StepUnrolledDenoising(corruption, cross_entropy=loss, **pattern), sampler
    network = DecoderOnly(TransformerConfig(**dataclasses.asdict(shape), **config))
    vocabulary = types.SimpleNamespace(vocab_size=shape.vocab_size, eos_id=None)
    return models.Model(network, *parts, vocabulary, None)


def our_batch(shape: Shape, batch_size: int, prefix: int, target: int) -> dict[str, jax.Array]:
    """Random tokens as our models read them."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(3, shape.vocab_size, (batch_size, prefix + target)), "int32")
    targets = tokens[:, prefix:]
    return {
        "encoder_input_tokens": tokens[:, :prefix],
        "decoder_input_tokens": targets,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": jnp.ones(targets.shape, jnp.float32),
    }


def our_params(model: models.Model, batch: Mapping[str, jax.Array]) -> Any:
    """Fresh parameters."""
    shapes = {name: value.shape for name, value in batch.items()}
    return jax.jit(lambda: model.get_initial_variables(KEY, shapes)["params"])()


def our_gradient(model: models.Model, batch: Mapping[str, jax.Array]) -> tuple[Any, Any]:
    """The compiled loss and gradient of a batch, and the arguments to call it with."""
    params = our_params(model, batch)
    return lower_gradient(model, params, batch).compile(), (params, batch)


def lower_gradient(model: models.Model, params: Any, batch: Mapping[str, jax.Array]) -> Any:
    """Loss and gradient of a batch, lowered and not compiled; shapes will do for parameters."""

    def loss(params: Any, batch: Any) -> jax.Array:
        return model.loss_fn(params, batch, KEY)[0]

    return jax.jit(jax.value_and_grad(loss)).lower(params, batch)


def our_decoding(model: models.Model, batch: Mapping[str, jax.Array]) -> tuple[Any, Any]:
    """The compiled decoding of a batch, and the arguments to call it with."""
    params = our_params(model, batch)
    return jax.jit(model.predict_batch).lower(params, batch).compile(), (params, batch)


def baseline() -> types.ModuleType:
    """The module that makes the baseline: `NAME`, `gradient` and `decoding`.

    Both functions take a `Shape` and lengths, and return what `our_gradient` returns.
    """
    name = "t5x_network" if importlib.util.find_spec("t5x") else "plain_transformer"
    return importlib.import_module(f"benchmarks.{name}")


def temporary_bytes(compiled: Any) -> int:
    """Bytes that a compiled program needs beside its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def interleaved_medians(
    functions: Mapping[str, tuple[Callable[..., Any], Any]], rounds: int, warm_up: bool = True
) -> dict[str, float]:
    """Median seconds of each function, all called once per round.

    Args:
      functions: compiled, and the arguments of each.
      rounds: that count.
      warm_up: whether one round before them does not; long calls do without.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + warm_up):
        for name, (function, args) in functions.items():
            started = time.perf_counter()
            jax.block_until_ready(function(*args))
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[-rounds:]) for name, values in seconds.items()}
