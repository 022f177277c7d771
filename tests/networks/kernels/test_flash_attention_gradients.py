"""The gradients' kernel, as Pallas interprets it, against float64 and against attention by XLA."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, by_distance, make_arguments, reference
from small_networks import QUICK

from diffusion_t5x.networks import attention
from diffusion_t5x.networks.kernels import flash_attention, flash_attention_gradients
from diffusion_t5x.networks.kv_cache import KeyValues
from diffusion_t5x.training import topologies

CASES = {
    "ragged tiles, queries in two chunks": Case(2, 150, (2,), (41,), (2, 64), (2, 150)),
    "prefixes that rows share": Case(4, 18, (2, 4), (1, 18), (2, 64), (4, 1)),
    "no bias, heads of a register": Case(1, 16, (1,), (32,), (2, 128), (1, 16), False),
    "four heads in a register": Case(2, 130, (1, 2), (17, 9), (4, 32), (1, 130)),
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Interprets the kernels, with small tiles, and chunks of 128 queries in two registers."""
    call = functools.partial(flash_attention.pl.pallas_call, interpret=True)
    monkeypatch.setattr(flash_attention.pl, "pallas_call", call)
    monkeypatch.setattr(flash_attention, "QUERIES", 16)
    monkeypatch.setattr(flash_attention, "KEYS", 24)
    monkeypatch.setattr(flash_attention_gradients, "QUERIES", 128)
    monkeypatch.setattr(flash_attention_gradients, "KEYS", 16)
    monkeypatch.setattr(flash_attention_gradients, "CHUNK_BYTES", 4 * 128 * 128)


@functools.partial(jax.jit, compiler_options=QUICK)
def _forward_and_backward(query, key_values, mask, tables, cotangent):
    mixed, log_sum_exp = flash_attention.forward(query, key_values, mask, tables)
    gradients = flash_attention_gradients.backward(
        query, key_values, mask, tables, mixed, log_sum_exp, cotangent
    )
    return mixed, log_sum_exp, gradients


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if "four" in name else [], id=name)
        for name, case in CASES.items()
    ],
)
def test_results_and_gradients_are_those_of_float64(case):
    query, key_values, mask, tables, bias = make_arguments(case)
    cotangent = np.random.default_rng(1).normal(size=query.shape).astype(np.float32)
    mixed, log_sum_exp, gradients = _forward_and_backward(
        query, key_values, mask, tables, cotangent
    )
    expected, (d_query, d_key_values, d_bias) = reference(query, key_values, mask, bias, cotangent)
    np.testing.assert_allclose(mixed, expected, atol=5e-5)
    assert log_sum_exp.shape == (case.batch, case.heads[0], case.queries)
    d_tables = None if bias is None else by_distance(d_bias[0], key_values, case.queries)
    wanted = d_query, d_key_values, d_tables
    assert jax.tree.structure(gradients) == jax.tree.structure(wanted)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-4), gradients, wanted)


def test_gradients_in_bfloat16_are_as_by_xla():
    case = Case(2, 18, (2,), (25,), (2, 64), (2, 18))
    query, key_values, mask, tables, _ = make_arguments(case)
    query, key_values = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (query, key_values))
    cotangent = jnp.cos(jnp.arange(query.size)).reshape(query.shape).astype(jnp.bfloat16)

    def by_xla(query, key_values, tables):
        bias = tables[0][None, :, np.arange(25) - np.arange(18)[:, None] + 17]
        return attention._attend(query, key_values, mask, bias, None)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def plain(query, key_values, tables, cotangent):
        mixed, pull = jax.vjp(by_xla, query, key_values, tables)
        return mixed, pull(cotangent)

    mixed, _, gradients = _forward_and_backward(query, key_values, mask, tables, cotangent)
    for got, wanted in zip(
        jax.tree.leaves((mixed, gradients)),
        jax.tree.leaves(plain(query, key_values, tables, cotangent)),
        strict=True,
    ):
        assert got.dtype == wanted.dtype
        assert jnp.abs(got - wanted).max() < 0.03 * jnp.abs(wanted).max()


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(
    ("lengths", "heads", "dtype"),
    [
        ((300, 700), (12, 64), jnp.bfloat16),
        pytest.param((2000, 2048), (32, 128), jnp.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_compiles_for_tpus_and_keeps_no_logits(monkeypatch, lengths, heads, dtype):
    monkeypatch.undo()
    from benchmarks import tpu
    from benchmarks.compiler import compiled_program

    queries, keys = lengths
    shape = jax.ShapeDtypeStruct
    query, part = shape((2, queries, *heads), dtype), shape((2, keys, *heads), dtype)
    log_sum_exp = shape((2, heads[0], queries), jnp.float32)

    def run(table, batch):
        query, part, mask, log_sum_exp = batch
        return flash_attention_gradients.backward(
            query, [part], mask, [table], query, log_sum_exp, query
        )

    batch = query, KeyValues(part, part), shape((2, queries, keys), bool), log_sum_exp
    program = run, (shape((heads[0], queries + keys - 1), jnp.float32), batch)
    compiled = tpu.compile_for(program, topologies.devices("v5p:2x2x1")[:1])
    assert "flash_attention_gradients" in compiled.as_text()
    logits = 4 * 2 * heads[0] * queries * keys
    assert compiled_program.memory(compiled).temporaries < logits
    flops = 10 * 2 * queries * keys * heads[0] * heads[1]
    rate = compiled_program.TPU_RATES["TPU v5"][0]
    assert compiled_program.estimated_seconds(compiled) > flops / rate
