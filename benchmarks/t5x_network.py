"""The baseline of benchmarks: T5X's decoder-only example, with T5X on the Python path."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import t5x.models
from t5x.examples.decoder_only import network

from benchmarks.shapes import KEY, Shape

NAME = "T5X"


def _model(shape: Shape, dtype: str = "float32") -> Any:
    fields = dataclasses.asdict(shape)
    config = network.TransformerConfig(
        **{"emb_dim": fields.pop("embed_dim"), **fields},
        dtype=dtype,
        mlp_activations=("gelu", "linear"),
        dropout_rate=0.0,
        logits_via_embedding=True,
    )
    # No token ends a text, so that every text has the requested length.
    vocabulary = types.SimpleNamespace(vocab_size=shape.vocab_size, eos_id=shape.vocab_size)
    return t5x.models.DecoderOnlyModel(
        network.DecoderWrapper(config), vocabulary, None, inputs_bidirectional_attention=False
    )


def _arguments(shape: Shape, model: Any, batch_size: int, prefix: int, length: int) -> Any:
    tokens = jax.random.randint(KEY, (batch_size, length), 3, shape.vocab_size)
    is_prefix = (jnp.arange(length) < prefix).astype(jnp.int32)
    batch = {
        "decoder_target_tokens": tokens,
        "decoder_input_tokens": jnp.pad(tokens[:, :-1], [(0, 0), (1, 0)]),
        "decoder_loss_weights": jnp.ones(tokens.shape, jnp.float32),
        "decoder_causal_attention": jnp.broadcast_to(is_prefix, tokens.shape),
    }
    shapes = {name: value.shape for name, value in batch.items()}
    params = jax.jit(lambda: model.get_initial_variables(KEY, shapes)["params"])()
    return params, batch


def gradient(shape: Shape, batch_size: int, length: int) -> tuple[Any, Any]:
    """Compiles loss and gradient; returns the executable and its arguments."""
    model = _model(shape)
    args = _arguments(shape, model, batch_size, 0, length)

    def loss(params: Any, batch: Any) -> jax.Array:
        return model.loss_fn(params, batch, KEY)[0]

    return jax.jit(jax.value_and_grad(loss)).lower(*args).compile(), args


def decoding(shape: Shape, batch_size: int, prefix: int, length: int) -> tuple[Any, Any]:
    """Compiles greedy decoding with a key-value cache; returns it and its arguments."""
    model = _model(shape)
    args = _arguments(shape, model, batch_size, prefix, prefix + length)

    def decode(params: Any, batch: Any) -> jax.Array:
        greedy = {"topk": 1, "temperature": 0.0, "rescale_log_probs": False}
        return model.predict_batch_with_aux(params, batch, KEY, decoder_params=greedy)[0]

    return jax.jit(decode).lower(*args).compile(), args


def abstract_gradient(shape: Shape, batch_size: int, length: int) -> tuple[Any, tuple[Any, ...]]:
    """Returns loss and gradient in bfloat16, and the shapes of parameters and batch."""
    model = _model(shape, "bfloat16")

    def gradient(params: Any, batch: Any) -> Any:
        return jax.value_and_grad(lambda params: model.loss_fn(params, batch, KEY)[0])(params)

    return gradient, jax.eval_shape(lambda: _arguments(shape, model, batch_size, 0, length))


def abstract_token(shape: Shape, batch_size: int, length: int) -> tuple[Any, tuple[Any, ...]]:
    """Returns a step of greedy decoding in bfloat16, and the shapes of its arguments."""
    model = _model(shape, "bfloat16")

    def run(params: Any, cache: Any, tokens: jax.Array) -> Any:
        variables = {"params": params, **({} if cache is None else {"cache": cache})}
        return model.module.apply(
            variables,
            tokens,
            tokens,
            enable_dropout=False,
            decode=True,
            max_decode_length=length,
            mutable=["cache"],
        )

    def step(params: Any, cache: Any, tokens: jax.Array) -> Any:
        logits, variables = run(params, cache, tokens[:, None])
        return variables["cache"], jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)

    def arguments() -> Any:
        params, batch = _arguments(shape, model, batch_size, 0, length)
        _, variables = run(params, None, batch["decoder_input_tokens"])
        return params, variables["cache"], batch["decoder_input_tokens"][:, 0]

    return step, jax.eval_shape(arguments)


def abstract_pass(shape: Shape, batch_size: int, length: int) -> tuple[Any, tuple[Any, ...]]:
    """Returns a pass over whole texts in bfloat16 that takes the argmax of every position."""
    model = _model(shape, "bfloat16")

    def read(params: Any, batch: Any) -> jax.Array:
        logits = model._compute_logits(params, batch)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return read, jax.eval_shape(lambda: _arguments(shape, model, batch_size, 0, length))
