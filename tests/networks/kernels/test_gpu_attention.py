"""NVIDIA's kernels, as Pallas interprets them, against float64; and compiled for an H100."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, by_distance, make_arguments, reference
from small_networks import QUICK

from diffusion_t5x.networks import attention
from diffusion_t5x.networks.kernels import (
    fused_attention,
    gpu_attention,
    gpu_attention_gradients,
    gpu_tiles,
)
from diffusion_t5x.networks.kv_cache import KeyValues
from diffusion_t5x.training import topologies

CASES = {
    "prefixes that rows share, two heads": Case(4, 18, (2, 4), (1, 23), (2, 16), (4, 18), group=2),
    "one row of the mask for all queries": Case(4, 18, (2, 4), (1, 18), (1, 16), (4, 1)),
    "no bias": Case(1, 16, (1,), (17,), (2, 32), (1, 16), False),
    "one mask, shared prefixes and heads": Case(4, 33, (1, 4), (17, 9), (4, 16), (1, 33), group=2),
}


@functools.partial(jax.jit, compiler_options=QUICK)
def _forward_and_backward(query, key_values, mask, tables, cotangent):
    keys = [part.keys.shape[1] for part in key_values]
    seen = gpu_tiles.see(mask, query.shape[1], keys, gpu_tiles.is_wide(query))
    arguments = query, key_values, mask, tables, seen
    mixed, log_sum_exp = gpu_attention.forward(*arguments)
    return mixed, gpu_attention_gradients.backward(*arguments, mixed, log_sum_exp, cotangent)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if "two" in name else pytest.mark.slow, id=name)
        for name, case in CASES.items()
    ],
)
@pytest.mark.parametrize("causal", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_results_and_gradients_are_those_of_float64(monkeypatch, case, causal):
    call = functools.partial(gpu_attention.pl.pallas_call, interpret=True)
    monkeypatch.setattr(gpu_attention.pl, "pallas_call", call)
    monkeypatch.setattr(gpu_tiles, "TILE", (16, 16))
    query, key_values, mask, tables, bias = make_arguments(case)
    if causal and mask.shape[1] > 1:
        mask = mask & (np.arange(mask.shape[2]) <= np.arange(case.queries)[:, None])
    cotangent = np.random.default_rng(1).normal(size=query.shape).astype(np.float32)
    mixed, gradients = _forward_and_backward(query, key_values, mask, tables, cotangent)
    expected, (d_query, d_key_values, d_bias) = reference(query, key_values, mask, bias, cotangent)
    np.testing.assert_allclose(mixed, expected, atol=2e-5)
    d_tables = None if bias is None else by_distance(d_bias[0], key_values, case.queries)
    wanted = d_query, d_key_values, d_tables
    assert jax.tree.structure(gradients) == jax.tree.structure(wanted)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), gradients, wanted)


def test_a_table_stands_for_the_bias_of_all_distances():
    _, key_values, _, tables, bias = make_arguments(CASES["one row of the mask for all queries"])
    expanded = [gpu_tiles.toeplitz(table, 18) for table in tables]
    assert [x.shape[-1] for x in expanded] == [part.keys.shape[1] for part in key_values]
    np.testing.assert_array_equal(np.concatenate(expanded, axis=-1), bias[0])


def _has_cuda_compiler():
    try:
        topologies.devices("h100:1x1")
    except RuntimeError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "head_dim"), [(jnp.bfloat16, 64), (jnp.float32, 128)], ids=str)
def test_it_compiles_for_h100s_and_moves_no_row_to_another(dtype, head_dim):
    if not _has_cuda_compiler():
        pytest.skip("needs the CUDA compiler")
    from flax.linen import partitioning

    from benchmarks.compiler import compiled_program
    from diffusion_t5x.runtime.partitioning import standard_logical_axis_rules

    cards = topologies.devices("h100:1x2")
    mesh = jax.sharding.Mesh(cards.reshape(2, 1), ("data", "model"))
    rows = jax.NamedSharding(mesh, jax.P("data"))

    def attend(table, query, part, mask):
        by_xla = functools.partial(attention._attend_in_chunks, 1, 8, None)
        return fused_attention.attend(by_xla, [table], query, [part], mask, None)

    def run(table, query, part, mask):
        mixed, pull = jax.vjp(functools.partial(attend, mask=mask), table, query, part)
        return pull(mixed)

    shape = functools.partial(jax.ShapeDtypeStruct, sharding=rows)
    query, keys = shape((8, 300, 4, head_dim), dtype), shape((8, 700, 2, head_dim), dtype)
    table = shape((2, 4, 999), jnp.float32)
    arguments = table, query, KeyValues(keys, keys), shape((8, 300, 700), bool)
    with jax.set_mesh(mesh), partitioning.axis_rules(standard_logical_axis_rules()):
        options = topologies.compiler_options(cards[0])
        compiled = jax.jit(run).lower(*arguments).compile(compiler_options=options)
    text = compiled.as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 4
    assert not compiled_program.collectives(text)
    assert compiled_program.memory(compiled).temporaries < 4 * 8 * 4 * 300 * 700 / 2
