"""The kernel, as Pallas interprets it, against float64 and against attention by XLA."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, make_arguments, reference
from small_networks import QUICK, hidden, make, run

from benchmarks.compiler import compiled_program
from diffusion_t5x.networks import attention
from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.networks.encoder_decoder import EncoderDecoder
from diffusion_t5x.networks.kernels import flash_attention
from diffusion_t5x.networks.kv_cache import KeyValues, grow
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
    monkeypatch.setattr(flash_attention, "by_platform", lambda *args, tpu, default: tpu(*args))
    monkeypatch.setattr(flash_attention, "forward", counted)
    return calls


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if "share" in name else [pytest.mark.slow], id=name)
        for name, case in CASES.items()
    ],
)
def test_attention_and_its_gradient_are_those_of_float64(interpreted, case):
    query, key_values, mask, tables, bias = make_arguments(case)
    cotangent = np.random.default_rng(1).normal(size=query.shape).astype(np.float32)

    def by_xla(query, key_values, mask, bias):
        return attention._attend_in_chunks(1, min(case.rows), None, query, key_values, mask, bias)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def attend_and_differentiate(query, key_values, bias):
        def attend(query, key_values, bias):
            return flash_attention.attend(by_xla, tables, query, key_values, mask, bias)

        mixed, pull = jax.vjp(attend, query, key_values, bias)
        return mixed, pull(cotangent)

    mixed, gradients = attend_and_differentiate(query, key_values, bias)
    assert len(interpreted) == 1
    expected, expected_gradients = reference(query, key_values, mask, bias, cotangent)
    np.testing.assert_allclose(mixed, expected, atol=2e-5)
    for got, wanted in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        np.testing.assert_allclose(got, wanted, atol=1e-4)


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


PREFIX = np.array([[5, 6, 7, 8, 9, 2, 3], [3, 4, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
CANVASES = np.random.default_rng(0).integers(0, 17, (6, 8))


def _networks(network_class, **overrides):
    """The same parameters, with and without the kernel."""
    overrides = {"num_layers": 1, "head_dim": 64, **overrides}
    network, params = make(network_class, **overrides)
    fused = network_class(dataclasses.replace(network.config, attention_kernel="fused"))
    return params, network, fused


@pytest.mark.parametrize(
    "config",
    [
        {"relative_bias_per_layer": True},
        pytest.param(
            {"positions": "rotary", "sliding_window": 4, "attention_scale": 0.1},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_a_network_and_its_gradient_are_as_without_the_kernel(interpreted, config):
    params, *networks = _networks(DecoderOnly, scan_layers=True, remat="full", **config)

    def loss(network, params):
        logits = network.apply({"params": params}, PREFIX, CANVASES[:3], "causal")
        return jnp.mean(jnp.sin(logits)), logits

    results = []
    for network in networks:
        gradient = jax.value_and_grad(functools.partial(loss, network), has_aux=True)
        results.append(jax.jit(gradient, compiler_options=QUICK)(params))
        assert bool(interpreted) == (network is networks[1])
    ((_, plain), plain_gradient), ((_, fused), fused_gradient) = results
    np.testing.assert_allclose(fused, plain, atol=2e-4)
    for got, wanted in zip(
        jax.tree.leaves(fused_gradient), jax.tree.leaves(plain_gradient), strict=True
    ):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "network_class", [DecoderOnly, pytest.param(EncoderDecoder, marks=pytest.mark.slow)]
)
def test_canvases_that_share_a_cached_prefix_are_as_without_the_kernel(interpreted, network_class):
    params, *networks = _networks(network_class)

    def denoise(module):
        cache = module.cache_prefix(module.encode(PREFIX, deterministic=True), "causal_prefix")
        if network_class is DecoderOnly:  # room for blocks, one of which is there
            cache = module.extend_cached(grow(cache, 5), CANVASES[:3, :2], "causal_prefix")
        calls = len(interpreted)
        states = module.denoise(cache, CANVASES)
        assert (len(interpreted) > calls) == (module.config.attention_kernel == "fused")
        return states

    plain, fused = (run(network, params, denoise) for network in networks)
    np.testing.assert_allclose(fused, plain, atol=2e-4)


@pytest.mark.parametrize("config", [{"num_kv_heads": 1}, {"attention_softcap": 2.0}], ids=str)
def test_grouped_queries_and_soft_caps_are_left_to_xla(interpreted, config):
    params, *networks = _networks(DecoderOnly, **config)
    states = [hidden(network, params, PREFIX, CANVASES[:3], "causal") for network in networks]
    np.testing.assert_array_equal(*states)
    assert not interpreted


def test_elsewhere_it_is_attention_by_xla():
    params, *networks = _networks(DecoderOnly)
    states = [hidden(network, params, PREFIX, CANVASES[:3], "causal") for network in networks]
    np.testing.assert_array_equal(*states)


@pytest.mark.parametrize(
    ("queries", "heads", "expected"),
    [
        (2, (2, 64), True),
        (1, (2, 64), False),  # An AR token reads its cache once either way.
        (2, (4, 128), True),
        (2, (12, 64), True),
        (2, (3, 64), False),  # half a register
        (2, (8, 48), False),  # heads that straddle registers
        (2, (2, 8), False),
    ],
)
def test_it_applies_where_heads_fill_registers_and_there_are_several_queries(
    queries, heads, expected
):
    query, keys = jnp.zeros((2, queries, *heads)), jnp.zeros((2, 3, *heads))
    assert flash_attention.applies(query, [KeyValues(keys, keys)]) is expected


def test_tpus_before_v5_are_left_to_xla(monkeypatch):
    keys = jnp.zeros((2, 3, 2, 64))
    for kind, expected in (("TPU v4", False), ("TPU v5 lite", True), ("TPU v5", True)):
        monkeypatch.setattr(flash_attention, "device_kind", lambda kind=kind: kind)
        assert flash_attention.applies(keys, [KeyValues(keys, keys)]) is expected


def test_dropout_is_left_to_xla(interpreted):
    params, _, fused = _networks(DecoderOnly, dropout_rate=0.1)

    def train(module):
        return module.decode(module.encode(PREFIX, deterministic=False), CANVASES[:3], "causal",
                             deterministic=False)  # fmt: skip

    apply = functools.partial(fused.apply, {"params": params}, method=train)
    jax.eval_shape(lambda: apply(rngs={"dropout": jax.random.PRNGKey(0)}))
    assert not interpreted


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_it_compiles_for_tpus_and_moves_no_row_to_another_chip():
    from benchmarks import tpu

    chips = topologies.devices("v5p:2x2x1")
    shape = jax.ShapeDtypeStruct
    keys = shape((8, 700, 12, 64), jnp.bfloat16)

    def run(part, tables, batch):
        query, mask = batch
        by_xla = functools.partial(attention._attend_in_chunks, 1, 8, None)
        return flash_attention.attend(by_xla, tables, query, [part], mask, None)

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
