"""What must hold of the settings of other families than T5's, in every way that texts are read."""

import dataclasses

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import CONFIG, QUICK, hidden, make, read, run

from diffusion_t5x.networks import bound_network
from diffusion_t5x.networks.config import RopeScaling
from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.networks.encoder_decoder import EncoderDecoder
from diffusion_t5x.networks.kv_cache import grow

# Between them they have every setting; windows are shorter than the texts.
ROTARY = {
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "positions": "rotary",
    "rope_theta": 100.0,
    "rope_local_theta": 10.0,
    "rope_scaling": flax.core.FrozenDict(kind="linear", factor=2.0),
    "attention_scale": 0.5,
    "attention_softcap": 2.0,
    "logits_softcap": 3.0,
    "logits_scale": 1.0,
    "embedding_scale": 4.0,
    "qk_norm": True,
    "norm": "rms_plus_one",
    "post_norms": True,
    "sliding_window": 4,
    "sliding_period": 2,
}
LEARNED = {
    "positions": "learned",
    "max_positions": 20,
    "attention_scale": 0.3,
    "logits_scale": 1.0,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "norm": "layer",
    "mlp_activations": ("gelu_exact",),
}
WINDOWED_BIAS = {"sliding_window": 3, "num_kv_heads": 1, "relative_bias_per_layer": True}
SCANNED = {**ROTARY, "scan_layers": True, "num_layers": 4}
CONFIGS = {"rotary": SCANNED, "learned": LEARNED}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
PREFIX = np.array([[5, 6, 7, 8, 9, 2, 3], [3, 4, 0, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0, 0]])
TARGET = np.array([[2, 3, 4, 1, 5, 6], [9, 8, 1, 0, 0, 0], [7, 1, 0, 0, 2, 2]])


def _network(config, **overrides):
    return make(DecoderOnly, **{**config, **overrides})


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        (SCANNED, "bidirectional"),
        (LEARNED, "causal"),
        pytest.param(SCANNED, "causal", marks=pytest.mark.slow),
        pytest.param(LEARNED, "bidirectional", marks=pytest.mark.slow),
    ],
    ids=["rotary", "learned", "rotary causal", "learned bidirectional"],
)
def test_padding_and_packing_change_nothing(config, pattern):
    network, params = _network(config)
    apart = hidden(network, params, PREFIX, TARGET, pattern)
    padded = hidden(network, params, np.pad(PREFIX, [(0, 0), (0, 7)]), TARGET, pattern)
    np.testing.assert_allclose(padded, apart, atol=5e-5)
    packed = hidden(
        network, params, np.array([[5, 6, 7, 8, 9, 2, 3, 3, 4, 0]]), TARGET[:2].reshape(1, 12),
        pattern, np.array([[1] * 7 + [2, 2, 0]]), np.array([[1] * 6 + [2] * 6]),
    )  # fmt: skip
    np.testing.assert_allclose(packed[0], apart[:2].reshape(12, -1), atol=5e-5)


@each_config
def test_cached_decoding_equals_uncached(config):
    network, params = _network(config)
    full = hidden(network, params, PREFIX, TARGET, "causal")

    def decode(module):
        prefix = module.encode(PREFIX, deterministic=True)
        cache, state = module.prefill(prefix, "causal", 2, 2)
        states = [state]
        cache = grow(cache, TARGET.shape[1] - 2)
        for tokens in np.repeat(TARGET, 2, axis=0).T[:-1]:
            cache, state = module.append(cache, tokens[:, None])
            states.append(state[:, 0])
        return jnp.stack(states, axis=1)

    states = run(network, params, decode)
    np.testing.assert_allclose(states, np.repeat(full, 2, axis=0), atol=5e-5)


@each_config
def test_canvases_that_share_a_cached_prefix_with_blocks_equal_the_uncached(config):
    network, params = _network(config)
    canvases = np.random.default_rng(0).integers(0, 17, (6, 5))
    blocks = np.random.default_rng(1).integers(1, 17, (3, 4))

    def cached(module):
        prefix = module.encode(PREFIX, deterministic=True)
        cache = grow(module.cache_prefix(prefix, "causal_prefix"), 6)  # more than is needed
        return module.denoise(module.extend_cached(cache, blocks, "causal_prefix"), canvases)

    def whole(module):
        prefix = module.encode(PREFIX, deterministic=True)
        prefix = module.extend(prefix, blocks, np.full(3, 4))
        prefix = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), prefix)
        return module.decode(prefix, canvases, "causal_prefix", deterministic=True)

    np.testing.assert_allclose(*(run(network, params, f) for f in (cached, whole)), atol=5e-5)


def test_scanning_recomputing_and_chunks_of_rows_change_no_number():
    network, params = _network(SCANNED, remat="full", attention_block_logits=1)
    plain, _ = _network(ROTARY, num_layers=4)
    layers = params["decoder"]["layers"]
    rest = {key: x for key, x in params["decoder"].items() if key != "layers"}
    single = {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(4)}

    def gradient(network):
        def loss(params):
            states = read(network, params, PREFIX, TARGET, "bidirectional")
            logits = network.apply({"params": params}, states, method=network.logits)
            return jnp.sum(jnp.sin(logits))

        return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)

    value, grads = gradient(network)(params)
    expected, wanted = gradient(plain)({**params, "decoder": {**rest, **single}})
    assert float(value) == pytest.approx(float(expected), rel=1e-4)
    for number in range(4):  # the second and the fourth see everything
        jax.tree.map(
            lambda x, y, n=number: np.testing.assert_allclose(x[n], y, rtol=1e-5, atol=1e-3),
            grads["decoder"]["layers"],
            wanted["decoder"][f"layers_{number}"],
        )


@pytest.mark.parametrize(
    ("overrides", "reach"),
    [
        ({"sliding_window": 3}, 2),
        ({"sliding_window": 3, "sliding_period": 2}, 2),  # a single layer is not the second
        ({"sliding_window": 3, "sliding_period": 1}, 11),
        ({"sliding_window": 3, "num_layers": 2}, 4),
        ({"sliding_window": 3, "num_layers": 2, "sliding_period": 2}, 11),
        ({"sliding_window": 3, "num_layers": 2, "scan_layers": True}, 4),
        ({"sliding_window": 3, "num_layers": 2, "sliding_period": 2, "scan_layers": True}, 11),
    ],
    ids=str,
)
def test_a_window_reaches_as_far_as_it_is_wide_and_both_ways_in_a_canvas(overrides, reach):
    network, params = make(DecoderOnly, **{"num_layers": 1, "positions": "rotary", **overrides})
    canvas = np.arange(1, 12)[None]
    for pattern, position in (("bidirectional", 5), ("causal", 0)):
        before, after = (
            hidden(network, params, np.array([[3]]), tokens, pattern)[0]
            for tokens in (canvas, np.where(np.arange(11) == position, 13, canvas))
        )
        changed = np.flatnonzero(np.abs(before - after).max(axis=1) > 1e-5)
        # Causal states are those of the token before.
        first, start = (max(0, position - reach), 0) if pattern != "causal" else (0, 1)
        expected = np.arange(first + start, min(11, position + reach + 1 + start))
        np.testing.assert_array_equal(changed, expected)


@pytest.mark.slow
def test_a_head_of_keys_serves_neighbouring_heads_of_queries():
    grouped, params = make(DecoderOnly, num_heads=4, num_kv_heads=2, num_layers=1)
    plain, _ = make(DecoderOnly, num_heads=4, num_layers=1)

    def repeat(path, x):
        if path[-2].key not in ("key", "value"):
            return x
        return jnp.repeat(x.reshape(16, 2, 8), 2, axis=1).reshape(16, 32)

    repeated = jax.tree_util.tree_map_with_path(repeat, params)
    states = hidden(grouped, params, PREFIX, TARGET, "bidirectional")
    expected = hidden(plain, repeated, PREFIX, TARGET, "bidirectional")
    np.testing.assert_allclose(states, expected, atol=1e-5)
    assert jax.tree.leaves(grouped.apply(
        {"params": params}, method=lambda m: m.cache_prefix(
            m.encode(PREFIX, deterministic=True), "cached_prefix"
        )
    ).key_values)[0].shape == (3, 7, 2, 8)  # fmt: skip


def test_t5s_bias_may_have_windows_and_grouped_queries():
    network, params = _network(WINDOWED_BIAS)
    canvases = np.random.default_rng(0).integers(0, 17, (6, 5))
    full = hidden(network, params, np.repeat(PREFIX, 2, axis=0), canvases, "cached_prefix")

    def cached(module):
        cache = module.cache_prefix(module.encode(PREFIX, deterministic=True), "cached_prefix")
        return module.denoise(cache, canvases)

    np.testing.assert_allclose(run(network, params, cached), full, atol=5e-5)


@pytest.mark.parametrize("tied_logits", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_fresh_network_of_any_family_begins_with_logits_near_one(tied_logits):
    config = dataclasses.replace(
        CONFIG, embed_dim=256, vocab_size=500, positions="rotary", attention_scale=8**-0.5,
        logits_scale=1.0, tied_logits=tied_logits, embedding_scale=16.0,
    )  # fmt: skip
    network = DecoderOnly(config)
    variables = jax.jit(network.init, static_argnums=3)(
        jax.random.PRNGKey(0), PREFIX, TARGET, "causal"
    )
    logits = network.apply(variables, PREFIX, TARGET, "causal")
    assert 0.5 < float(jnp.std(logits)) < 2


def test_bfloat16_differs_from_float32_by_its_rounding_alone():
    exact, params = _network(ROTARY)
    rough, _ = _network(ROTARY, dtype="bfloat16")
    states = [hidden(n, params, PREFIX, TARGET, "causal") for n in (exact, rough)]
    assert states[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(states[1].astype(np.float32), states[0], atol=0.3)


def test_texts_longer_than_the_table_of_positions_are_refused():
    batch = {"encoder_input_tokens": PREFIX, "decoder_input_tokens": TARGET}
    bound_network.bind(*_network(LEARNED, max_positions=13), batch, "causal")
    with pytest.raises(ValueError, match=r"up to 13 tokens, but TransformerConfig.max_positions"):
        bound_network.bind(*_network(LEARNED, max_positions=12), batch, "causal")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positions": "rotery"}, "did you mean 'rotary'"),
        ({"norm": "rmsnorm"}, "norm = 'rmsnorm'"),
        ({"num_kv_heads": 3}, "num_kv_heads = 3 does not divide num_heads = 2"),
        ({"num_kv_heads": 0}, "num_kv_heads = 0; expected at least 1"),
        ({"positions": "learned"}, "needs max_positions"),
        ({"max_positions": 9}, "max_positions = 9 needs positions = 'learned'"),
        ({"rope_scaling": RopeScaling("linear", 2.0)}, "rope_scaling = .* needs positions"),
        ({"positions": "rotary", "rope_local_theta": 1.0}, "rope_local_theta .* sliding_window"),
        ({"rope_scaling": {"kind": "linear"}}, "expected a kind and a factor"),
        ({"rope_scaling": {"kind": "linear", "facto": 2.0}}, "did you mean 'factor'"),
        ({"sliding_period": 2}, "sliding_period = 2 needs a sliding_window"),
        ({"sliding_window": 0}, "sliding_window = 0"),
        ({"positions": "rotary", "head_dim": 7}, "head_dim = 7"),
        ({"positions": "rotary", "relative_bias_per_layer": True}, "relative_bias_per_layer"),
        ({"attention_softcap": -1.0}, "attention_softcap = -1.0"),
        ({"logits_scale": 0.0}, "logits_scale = 0.0"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **settings)


def test_scalings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="did you mean 'llama3'"):
        RopeScaling("llama", 2.0)
    with pytest.raises(ValueError, match="expected factor >= 1"):
        RopeScaling("linear", 0.5)
    with pytest.raises(ValueError, match="low_freq_factor < high_freq_factor"):
        RopeScaling("llama3", 8.0, 4.0, 1.0)


@pytest.mark.parametrize("settings", [LEARNED, {"sliding_window": 4}, {"post_norms": True}])
def test_an_encoder_decoder_refuses_what_it_does_not_have(settings):
    config = dataclasses.replace(CONFIG, **settings)
    with pytest.raises(ValueError, match="use DecoderOnly"):
        EncoderDecoder(config)
