"""Attention with parts of keys that rows share, a mask and a bias by distance; in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from diffusion_t5x.networks.kv_cache import KeyValues


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of queries, of each part's rows and keys, of heads, and of the mask."""

    batch: int
    queries: int
    rows: tuple[int, ...]
    keys: tuple[int, ...]
    heads: tuple[int, int]
    mask: tuple[int, int]
    has_bias: bool = True
    group: int = 1  # heads of queries for each of keys


def make_arguments(case):
    """Query, key_values, mask and tables, and the bias that these stand for."""
    rng = np.random.default_rng(0)
    make = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    query = make(case.batch, case.queries, *case.heads)
    kv_heads = case.heads[0] // case.group, case.heads[1]
    key_values = [
        KeyValues(make(rows, keys, *kv_heads), make(rows, keys, *kv_heads))
        for rows, keys in zip(case.rows, case.keys, strict=True)
    ]
    mask = rng.random((*case.mask, sum(case.keys))) < 0.7
    mask[0, 0] = False  # A query that sees nothing mixes all values alike.
    if not case.has_bias:
        return query, key_values, mask, None, None
    sizes = [case.queries + keys - 1 for keys in case.keys]
    tables = [jnp.asarray(make(case.heads[0], size)) for size in sizes]
    bias = np.empty((1, case.heads[0], case.queries, sum(case.keys)), np.float32)
    start = 0
    for table, keys in zip(tables, case.keys, strict=True):
        for i in range(case.queries):
            for j in range(keys):
                bias[0, :, i, start + j] = np.asarray(table)[:, j - i + case.queries - 1]
        start += keys
    return query, key_values, mask, tables, bias


def reference(query, key_values, mask, bias, cotangent):
    """Attention and its gradients (query, keys, values, bias) in float64, by their formulas."""
    batch = len(query)
    repeated = lambda x: np.repeat(x.astype(np.float64), batch // len(x), axis=0)  # noqa: E731
    group = query.shape[2] // key_values[0].keys.shape[2]
    joined = lambda parts: np.repeat(np.concatenate(parts, axis=1), group, axis=2)  # noqa: E731
    keys = joined([repeated(m.keys) for m in key_values])
    values = joined([repeated(m.values) for m in key_values])
    logits = np.einsum("bqhd,bkhd->bhqk", query.astype(np.float64), keys)
    logits += 0 if bias is None else bias
    seen = np.broadcast_to(mask[:, None], logits.shape)
    logits = np.where(seen, logits, -1e10)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bhqk,bkhd->bqhd", weights, values)
    d_values = np.einsum("bhqk,bqhd->bkhd", weights, cotangent)
    d_weights = np.einsum("bqhd,bkhd->bhqk", cotangent, values)
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * seen
    d_query = np.einsum("bhqk,bkhd->bqhd", d_logits, keys)
    d_keys = np.einsum("bhqk,bqhd->bkhd", d_logits, query)
    gradients, start = [], 0
    for part in key_values:
        rows, count = part.keys.shape[:2]
        positions = slice(start, start + count)
        grouped = lambda x: x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(3)  # noqa: E731
        summed = lambda x: grouped(x.reshape(rows, -1, *x.shape[1:]).sum(1))  # noqa: E731, B023
        gradients.append(KeyValues(summed(d_keys[:, positions]), summed(d_values[:, positions])))
        start += count
    d_bias = None if bias is None else d_logits.sum(0)[None]
    return mixed, (d_query, gradients, d_bias)


def by_distance(d_bias, key_values, queries):
    """Sums `[heads, queries, keys]` to the gradients of the tables."""
    tables, start = [], 0
    for part in key_values:
        keys = part.keys.shape[1]
        block = d_bias[:, :, start : start + keys]
        offsets = range(1 - queries, keys)
        tables.append(np.stack([np.trace(block, offset, 1, 2) for offset in offsets], axis=1))
        start += keys
    return tables
