"""Our programs that `benchmarks.tpu` compiles: functions and the shapes of their arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import workloads
from benchmarks.shapes import KEY, Shape
from diffusion_t5x import models
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.diffusion import DiffusionDecoder
from diffusion_t5x.decoding.readout import read_hidden
from diffusion_t5x.interfaces import Readout

Array = jax.Array
Program = tuple[Any, tuple[Any, ...]]  # a function, and the shapes of its arguments


def gradient(
    shape: Shape,
    objective: str,
    batch_size: int,
    length: int,
    *,
    prefix: int = 1,
    pattern: str | None = None,
    **config: Any,
) -> Program:
    """Loss and gradient of texts of `length` tokens, the first `prefix` of them a prefix.

    `pattern` is the attention pattern; None for the objective's default.
    """
    model = workloads.our_model(shape, objective, dtype="bfloat16", **config)
    if pattern is not None:
        model.objective = dataclasses.replace(model.objective, attention_pattern=pattern)

    def run(params: Any, batch: Any) -> Any:
        return jax.value_and_grad(lambda params: model.loss_fn(params, batch, KEY)[0])(params)

    def arguments() -> Any:
        batch = workloads.our_batch(shape, batch_size, prefix, length - prefix)
        return workloads.our_params(model, batch), batch

    return run, jax.eval_shape(arguments)


def token(shape: Shape, batch_size: int, length: int) -> Program:
    """A greedy step of AR decoding with a cache of `length` tokens, the last of which it writes.

    Its arguments are parameters, cache and tokens `[batch]`; its results the cache, the next
    tokens and their log-probabilities.
    """
    model = workloads.our_model(shape, "autoregressive", dtype="bfloat16")
    module, pattern = model.module, model.objective.attention_pattern

    def run(params: Any, cache: Any, tokens: Array) -> tuple[Any, Array, Array]:
        variables = {"params": params}
        cache, hidden = module.apply(variables, cache, tokens[:, None], method=module.append)
        logits = module.apply(variables, hidden[:, 0], method=module.logits).astype(jnp.float32)
        tokens = AutoregressiveDecoder().sample(KEY, logits)
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        return cache, tokens, jnp.take_along_axis(log_probs, tokens[:, None], axis=-1)[:, 0]

    def arguments() -> Any:
        params, prefix = _bound(model, shape, batch_size, length - 1)
        cache, _ = module.apply({"params": params}, prefix, pattern, 1, 1, method=module.prefill)
        return params, cache, jnp.zeros(batch_size, jnp.int32)

    return run, jax.eval_shape(arguments)


def denoising_step(
    shape: Shape, batch_size: int, length: int, canvas: int, block_logits: int, **config: Any
) -> Program:
    """One pass over canvases after a prefix, and what it says of each position.

    With `canvas == length - 1` it is the paper's step, a pass over all of the text; with less,
    what comes before the canvas is cached. `block_logits` is the decoder's.
    """
    model = _diffusion_model(shape, block_logits, config)
    module = model.module
    cached = canvas < length - 1
    pattern = "cached_prefix" if cached else model.objective.attention_pattern

    def run(params: Any, context: Any, tokens: Array) -> Any:
        variables = {"params": params}
        if cached:
            hidden = module.apply(variables, context, tokens, method=module.denoise)
        else:
            hidden = module.apply(
                variables, context, tokens, pattern, deterministic=True, method=module.decode
            )
        return _read(model, variables, hidden, tokens)

    def arguments() -> Any:
        params, context = _bound(model, shape, batch_size, length - canvas)
        if cached:
            context = module.apply({"params": params}, context, pattern, method=module.cache_prefix)
        return params, context, jnp.zeros((batch_size, canvas), jnp.int32)

    return run, jax.eval_shape(arguments)


def _diffusion_model(shape: Shape, block_logits: int, config: Mapping[str, Any]) -> models.Model:
    """Our model in bfloat16; `block_logits` is the decoder's."""
    sampler = {"block_logits": block_logits}
    return workloads.our_model(shape, "diffusion", dtype="bfloat16", decoder=sampler, **config)


def _read(model: models.Model, variables: Any, hidden: Array, tokens: Array) -> Readout:
    """What a step needs to know of each position."""
    decoder: DiffusionDecoder = model.decoder
    return read_hidden(
        hidden,
        lambda hidden: model.module.apply(variables, hidden, method=model.module.logits),
        tokens,
        KEY,
        decoder.temperature,
        decoder.block_logits,
    )


def _bound(model: Any, shape: Shape, batch_size: int, prefix: int) -> tuple[Any, Any]:
    """Parameters, and the prefixes as the network reads them."""
    batch = workloads.our_batch(shape, batch_size, prefix, 1)
    params = workloads.our_params(model, batch)
    tokens = batch["encoder_input_tokens"]
    context = model.module.apply(
        {"params": params}, tokens, None, deterministic=True, method=model.module.encode
    )
    return params, context
