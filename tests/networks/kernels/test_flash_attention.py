"""The kernel, as Pallas interprets it, against float64 and against attention by XLA."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, make_arguments, reference
from small_networks import QUICK

from benchmarks.compiler import compiled_program
from diffusion_t5x.networks import attention
from diffusion_t5x.networks.kernels import flash_attention, fused_attention
from diffusion_t5x.networks.kv_cache import KeyValues
from diffusion_t5x.objectives.attention_patterns import ATTENTION_PATTERNS, make_mask
from diffusion_t5x.training import topologies

CASES = {
    "ragged tiles": Case(2, 37, (2,), (41,), (2, 64), (2, 37)),
    "prefixes that canvases share": Case(4, 18, (2, 4), (24, 18), (4, 32), (4, 1)),
    "prefixes of one token": Case(4, 18, (2, 4), (1, 18), (2, 64), (4, 1)),
    "no bias, a head of two registers": Case(1, 16, (1,), (17,), (1, 256), (1, 16), False),
}


@pytest.fixture
def interpreted(monkeypatch):
    """Interprets the kernel, with small tiles, in place of XLA; a list of all its calls."""
    calls = []
    real = flash_attention.forward

    def counted(*args):
        calls.append(args)
        return real(*args)

    call = functools.partial(flash_attention.pl.pallas_call, interpret=True)
    monkeypatch.setattr(flash_attention.pl, "pallas_call", call)
    monkeypatch.setattr(flash_attention, "QUERIES", 16)
    monkeypatch.setattr(flash_attention, "KEYS", 24)
    monkeypatch.setattr(flash_attention, "forward", counted)
    return calls


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if "share" in name else [pytest.mark.slow], id=name)
        for name, case in CASES.items()
    ],
)
def test_attention_is_that_of_float64(interpreted, case):
    query, key_values, mask, tables, bias = make_arguments(case)
    forward = jax.jit(flash_attention.forward, compiler_options=QUICK)
    mixed, _ = forward(query, key_values, mask, tables)
    assert len(interpreted) == 1
    expected, _ = reference(query, key_values, mask, bias, np.zeros_like(query))
    np.testing.assert_allclose(mixed, expected, atol=2e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_masks_of_all_patterns_are_as_by_xla(interpreted, packed):
    case = Case(2, 40, (2,), (40,), (2, 64), (2, 40))
    query, key_values, _, tables, bias = make_arguments(case)
    segments = np.ones((2, 40), int)
    segments[0, :5] = 0  # padding
    if packed:
        segments[1, 17:] = 2
    is_prefix = np.broadcast_to(np.arange(40) < 23, segments.shape)
    fused = jax.jit(lambda mask: flash_attention.forward(query, key_values, mask, tables)[0])
    plain = jax.jit(lambda mask: attention._attend(query, key_values, mask, bias, None))
    for pattern in ATTENTION_PATTERNS:
        mask = make_mask(pattern, segments, is_prefix)
        np.testing.assert_allclose(fused(mask), plain(mask), atol=2e-5, err_msg=pattern)
    assert interpreted


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        ((2, 64), True),
        ((4, 128), True),
        ((12, 64), True),
        ((3, 64), False),  # half a register
        ((8, 48), False),  # heads that straddle registers
        ((2, 8), False),
    ],
)
def test_it_supports_heads_that_fill_registers(heads, expected):
    query, keys = jnp.zeros((2, 2, *heads)), jnp.zeros((2, 3, *heads))
    assert flash_attention.supports(query, [KeyValues(keys, keys)]) is expected


def test_tpus_before_v5_are_left_to_xla(monkeypatch):
    keys = jnp.zeros((2, 3, 2, 64))
    for kind, expected in (("TPU v4", False), ("TPU v5 lite", True), ("TPU v5", True)):
        monkeypatch.setattr(flash_attention, "device_kind", lambda kind=kind: kind)
        assert flash_attention.supports(keys, [KeyValues(keys, keys)]) is expected


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_it_compiles_for_tpus_and_moves_no_row_to_another_chip():
    from benchmarks import tpu

    chips = topologies.devices("v5p:2x2x1")
    shape = jax.ShapeDtypeStruct
    keys = shape((8, 700, 12, 64), jnp.bfloat16)

    def run(part, tables, batch):
        query, mask = batch
        by_xla = functools.partial(attention._attend_in_chunks, 1, 8, None)
        shards = jax.sharding.get_abstract_mesh().shape["data"]
        tables = [jnp.broadcast_to(table, (shards, *table.shape)) for table in tables]
        return fused_attention.attend(by_xla, tables, query, [part], mask, None)

    batch = shape((8, 300, 12, 64), jnp.bfloat16), shape((8, 300, 700), bool)
    program = run, (KeyValues(keys, keys), [shape((12, 999), jnp.float32)], batch)
    for count in (1, 4):
        compiled = tpu.compile_for(program, chips[:count])
        text = compiled.as_text()
        assert "tpu_custom_call" in text
        assert not compiled_program.collectives(text)
        rows = 8 // count
        flops = 4 * rows * 300 * 700 * 768 / compiled_program.TPU_RATES["TPU v5"][0]
        assert compiled_program.estimated_seconds(compiled) > flops
