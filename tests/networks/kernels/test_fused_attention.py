"""Networks with the kernel of a platform, as Pallas interprets it, and without."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import QUICK, hidden, make, run

from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.networks.encoder_decoder import EncoderDecoder
from diffusion_t5x.networks.kernels import (
    flash_attention,
    flash_attention_gradients,
    fused_attention,
    gpu_tiles,
)
from diffusion_t5x.networks.kv_cache import KeyValues, grow


@pytest.fixture
def interpreted(monkeypatch):
    """Interprets the kernels, with small tiles, on the platform named first; a list of calls."""
    calls = ["cuda"]

    def call(*args, **kwargs):
        calls.append(kwargs["name"])
        return real(*args, **kwargs, interpret=True)

    real = flash_attention.pl.pallas_call
    monkeypatch.setattr(flash_attention.pl, "pallas_call", call)
    monkeypatch.setattr(flash_attention, "QUERIES", 16)
    monkeypatch.setattr(flash_attention, "KEYS", 24)
    monkeypatch.setattr(flash_attention_gradients, "QUERIES", 128)
    monkeypatch.setattr(flash_attention_gradients, "KEYS", 16)
    monkeypatch.setattr(gpu_tiles, "TILE", (16, 16))

    def choose(*args, default, **of_platform):
        return of_platform.get(calls[0], default)(*args)

    monkeypatch.setattr(fused_attention, "by_platform", choose)
    return calls


PREFIX = np.array([[5, 6, 7, 8, 9, 2, 3], [3, 4, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
CANVASES = np.random.default_rng(0).integers(0, 17, (6, 8))


def _networks(network_class, **overrides):
    """The same parameters, with and without the kernel."""
    overrides = {"num_layers": 1, "head_dim": 64, **overrides}
    network, params = make(network_class, **overrides)
    fused = network_class(dataclasses.replace(network.config, attention_kernel="fused"))
    return params, network, fused


@pytest.mark.parametrize(
    ("platform", "config"),
    [
        ("cuda", {"relative_bias_per_layer": True, "num_kv_heads": 1}),
        pytest.param("tpu", {}, marks=pytest.mark.slow),
        *(
            pytest.param(
                platform,
                {"positions": "rotary", "sliding_window": 4, "attention_scale": 0.1},
                marks=pytest.mark.slow,
            )
            for platform in ("cuda", "tpu")
        ),
    ],
    ids=str,
)
def test_a_network_and_its_gradient_are_as_without_the_kernel(interpreted, platform, config):
    interpreted[0] = platform
    config = {"head_dim": 16 if platform == "cuda" else 64, **config}
    params, *networks = _networks(DecoderOnly, scan_layers=True, remat="full", **config)

    def loss(network, params):
        logits = network.apply({"params": params}, PREFIX, CANVASES[:3], "causal")
        return jnp.mean(jnp.sin(logits)), logits

    results = []
    for network in networks:
        gradient = jax.value_and_grad(functools.partial(loss, network), has_aux=True)
        results.append(jax.jit(gradient, compiler_options=QUICK)(params))
        assert (len(interpreted) > 1) == (network is networks[1])
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


@pytest.mark.parametrize(
    ("platform", "config"),
    [("tpu", {"num_kv_heads": 1}), ("tpu", {"attention_softcap": 2.0}), ("cuda", {"head_dim": 8})],
    ids=str,
)
def test_what_a_kernel_does_not_support_is_left_to_xla(interpreted, platform, config):
    interpreted[0] = platform
    params, *networks = _networks(DecoderOnly, **config)
    states = [hidden(network, params, PREFIX, CANVASES[:3], "causal") for network in networks]
    np.testing.assert_array_equal(*states)
    assert len(interpreted) == 1


def test_elsewhere_it_is_attention_by_xla():
    params, *networks = _networks(DecoderOnly)
    states = [hidden(network, params, PREFIX, CANVASES[:3], "causal") for network in networks]
    np.testing.assert_array_equal(*states)


def test_dropout_is_left_to_xla(interpreted):
    params, _, fused = _networks(DecoderOnly, dropout_rate=0.1)

    def train(module):
        return module.decode(module.encode(PREFIX, deterministic=False), CANVASES[:3], "causal",
                             deterministic=False)  # fmt: skip

    apply = functools.partial(fused.apply, {"params": params}, method=train)
    jax.eval_shape(lambda: apply(rngs={"dropout": jax.random.PRNGKey(0)}))
    assert len(interpreted) == 1


@pytest.mark.parametrize(
    ("kind", "queries", "kv_heads", "expected"),
    [
        ("cpu", 2, 2, ("cuda", "tpu")),  # which the compiler may yet be for
        ("cpu", 1, 2, ()),  # An AR token reads its cache once either way.
        ("NVIDIA H100 80GB HBM3", 2, 1, ("cuda",)),
        ("TPU v5 lite", 2, 2, ("tpu",)),
        ("TPU v5", 2, 1, ()),
        ("TPU v4", 2, 2, ()),
    ],
)
def test_each_platform_has_conditions_of_its_own(monkeypatch, kind, queries, kv_heads, expected):
    for module in (flash_attention, fused_attention):
        monkeypatch.setattr(module, "device_kind", lambda: kind)
    keys = jnp.zeros((2, 3, kv_heads, 64))
    query = jnp.zeros((2, queries, 2, 64))
    assert fused_attention.platforms(query, [KeyValues(keys, keys)]) == expected


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_gradients_of_all_blocks_flow_into_the_prefix_that_they_share(platform, interpreted):
    interpreted[0] = platform
    params, *networks = _networks(DecoderOnly)
    canvases, text = jnp.asarray(CANVASES[:3]), jnp.asarray(CANVASES[3:, :4])

    def loss(params, network):
        def read(module):
            prefix = module.encode(PREFIX, deterministic=True)
            prefix = module.extend(prefix, text, jnp.full(3, 4))
            cache = module.cache_prefix(prefix, "causal_prefix", keep_states=True)
            return jnp.sum(jnp.square(module.denoise(cache, canvases, True, block_length=4)))

        return network.apply({"params": params}, method=read)

    expected, ours = (
        jax.jit(jax.value_and_grad(loss), static_argnums=1, compiler_options=QUICK)(params, network)
        for network in networks
    )
    assert len(interpreted) > 1
    check = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)
    jax.tree.map(check, ours, expected)
