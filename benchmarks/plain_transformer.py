"""The baseline of benchmarks without T5X: a plain causal transformer of the same size.

It is written for readability alone: a bias and weights for every row of attention, the logits of
the whole batch at once, and decoding with a cache of static length. No published result uses it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.shapes import KEY, Shape

NAME = "plain transformer"
Array = jax.Array


def _params(shape: Shape) -> Any:
    joined = shape.num_heads * shape.head_dim
    matrices = {
        "query": (shape.embed_dim, joined),
        "key": (shape.embed_dim, joined),
        "value": (shape.embed_dim, joined),
        "out": (joined, shape.embed_dim),
        "gate": (shape.embed_dim, shape.mlp_dim),
        "up": (shape.embed_dim, shape.mlp_dim),
        "down": (shape.mlp_dim, shape.embed_dim),
    }

    def draw(key: Array, size: tuple[int, ...]) -> Array:
        return jax.random.normal(key, size) * size[0] ** -0.5

    keys = iter(jax.random.split(KEY, 8 * shape.num_layers + 2))
    layers = [
        {name: draw(next(keys), size) for name, size in matrices.items()}
        for _ in range(shape.num_layers)
    ]
    embedding = draw(next(keys), (shape.vocab_size, shape.embed_dim))
    bias = draw(next(keys), (4096, shape.num_heads))  # one row per distance backwards
    return {"embedding": embedding, "bias": bias, "layers": layers}


def _norm(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def _stack(
    shape: Shape, params: Any, tokens: Array, positions: Array, caches: Any
) -> tuple[Array, Any]:
    """Reads `tokens [batch, length]` at `positions [length]`; returns logits and new caches."""
    x = params["embedding"][tokens]
    new_caches = []
    for layer, cache in zip(params["layers"], caches, strict=True):
        y = _norm(x)
        heads = (*tokens.shape, shape.num_heads, shape.head_dim)
        query, keys, values = ((y @ layer[n]).reshape(heads) for n in ("query", "key", "value"))
        if cache is not None:
            keys, values = (
                jax.lax.dynamic_update_slice_in_dim(old, new, positions[0], axis=1)
                for old, new in zip(cache, (keys, values), strict=True)
            )
        new_caches.append((keys, values))
        distance = positions[:, None] - jnp.arange(keys.shape[1])  # [length, keys]
        bias = jnp.moveaxis(params["bias"][jnp.maximum(distance, 0)], -1, 0)
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, keys) + bias
        weights = jax.nn.softmax(jnp.where(distance >= 0, logits, -1e10), axis=-1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, values)
        x = x + mixed.reshape(*tokens.shape, -1) @ layer["out"]
        y = _norm(x)
        x = x + (jax.nn.gelu(y @ layer["gate"]) * (y @ layer["up"])) @ layer["down"]
    return _norm(x) @ params["embedding"].T, new_caches


def _tokens(shape: Shape, size: tuple[int, int]) -> Array:
    return jax.random.randint(KEY, size, 3, shape.vocab_size)


def gradient(shape: Shape, batch_size: int, length: int) -> tuple[Any, Any]:
    """Compiles loss and gradient; returns the executable and its arguments."""

    def loss(params: Any, tokens: Array) -> Array:
        inputs = jnp.pad(tokens[:, :-1], [(0, 0), (1, 0)])
        caches = [None] * shape.num_layers
        logits, _ = _stack(shape, params, inputs, jnp.arange(length), caches)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).sum()

    args = jax.jit(lambda: _params(shape))(), _tokens(shape, (batch_size, length))
    return jax.jit(jax.value_and_grad(loss)).lower(*args).compile(), args


def decoding(shape: Shape, batch_size: int, prefix: int, length: int) -> tuple[Any, Any]:
    """Compiles greedy decoding with a key-value cache; returns it and its arguments."""

    def decode(params: Any, tokens: Array) -> Array:
        size = (batch_size, prefix + length, shape.num_heads, shape.head_dim)
        caches = [(jnp.zeros(size), jnp.zeros(size))] * shape.num_layers
        logits, caches = _stack(shape, params, tokens, jnp.arange(prefix), caches)

        def step(carry: Any, index: Array) -> Any:
            token, caches = carry
            logits, caches = _stack(shape, params, token[:, None], index[None], caches)
            token = jnp.argmax(logits[:, -1], axis=-1)
            return (token, caches), token

        first = jnp.argmax(logits[:, -1], axis=-1), caches
        _, rest = jax.lax.scan(step, first, prefix + jnp.arange(length - 1))
        return jnp.concatenate([first[0][:, None], rest.T], axis=1)

    args = jax.jit(lambda: _params(shape))(), _tokens(shape, (batch_size, prefix))
    return jax.jit(decode).lower(*args).compile(), args
