"""What must hold of both networks under every attention pattern."""

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import CONFIG, NETWORKS, QUICK, hidden, make, read, run

from diffusion_t5x.networks import attention, layers
from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.networks.encoder_decoder import EncoderDecoder
from diffusion_t5x.networks.low_rank import LowRank
from diffusion_t5x.runtime.train_state import named_leaves

PATTERNS = ("causal", "prefix_bidirectional", "bidirectional", "cached_prefix", "causal_prefix")
# An encoder-decoder only tells denoising patterns from autoregressive ones.
COMBINATIONS = [
    *[(DecoderOnly, pattern) for pattern in PATTERNS],
    (EncoderDecoder, "causal"),
    (EncoderDecoder, "cached_prefix"),
]
AUTOREGRESSIVE = [x for x in COMBINATIONS if x[1] in ("causal", "prefix_bidirectional")]
DENOISING = [x for x in COMBINATIONS if x not in AUTOREGRESSIVE]
PREFIX = jnp.array([[5, 6, 7, 8, 9], [3, 4, 0, 0, 0], [0, 0, 0, 0, 0]])
TARGET = jnp.array([[2, 3, 4, 1], [9, 8, 1, 0], [7, 1, 0, 0]])


@pytest.mark.parametrize(("network_class", "pattern"), COMBINATIONS)
def test_padding_of_the_prefix_changes_nothing(network_class, pattern):
    network, params = make(network_class)
    short = hidden(network, params, PREFIX, TARGET, pattern)
    long = hidden(network, params, jnp.pad(PREFIX, [(0, 0), (0, 30)]), TARGET, pattern)
    np.testing.assert_allclose(short, long, atol=1e-5)


@pytest.mark.parametrize(("network_class", "pattern"), COMBINATIONS)
def test_packing_changes_nothing(network_class, pattern):
    network, params = make(network_class)
    apart = hidden(network, params, PREFIX, TARGET, pattern)
    packed_prefix = jnp.array([[5, 6, 7, 8, 9, 3, 4, 0]])
    prefix_segments = jnp.array([[1, 1, 1, 1, 1, 2, 2, 0]])
    # The second target is padded inside its segment, as a canvas would be.
    packed_target = jnp.array([[2, 3, 4, 1, 9, 8, 1, 0, 0, 0]])
    target_segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 0, 0]])
    packed = hidden(
        network, params, packed_prefix, packed_target, pattern, prefix_segments, target_segments
    )
    np.testing.assert_allclose(packed[0, :4], apart[0], atol=1e-5)
    np.testing.assert_allclose(packed[0, 4:8], apart[1], atol=1e-5)


@pytest.mark.parametrize(("network_class", "pattern"), AUTOREGRESSIVE)
def test_the_state_that_predicts_a_token_sees_only_what_is_before_it(network_class, pattern):
    network, params = make(network_class)
    before = hidden(network, params, PREFIX, TARGET, pattern)
    for position in range(TARGET.shape[1]):
        changed = TARGET.at[:, position].set(13)
        after = hidden(network, params, PREFIX, changed, pattern)
        same = jnp.all(jnp.isclose(before, after, atol=1e-6), axis=(0, 2))
        assert same[: position + 1].all()
        assert not same[position + 1 :].any()


@pytest.mark.parametrize(("network_class", "pattern"), DENOISING)
def test_denoising_patterns_let_every_canvas_position_see_every_other(network_class, pattern):
    network, params = make(network_class)
    before = hidden(network, params, PREFIX, TARGET, pattern)
    for position in range(TARGET.shape[1]):
        after = hidden(network, params, PREFIX, TARGET.at[:, position].set(13), pattern)
        assert not jnp.any(jnp.all(jnp.isclose(before, after, atol=1e-6), axis=2))


@pytest.mark.parametrize(
    ("network_class", "config", "pattern"),
    [
        (DecoderOnly, {}, "causal_prefix"),
        *[
            (network_class, config, "cached_prefix")
            for network_class in NETWORKS
            for config in ({}, {"scan_layers": True})
        ],
        (DecoderOnly, {"start_token": True}, "cached_prefix"),
        *[
            pytest.param(
                network_class,
                {"relative_bias_per_layer": True},
                "cached_prefix",
                marks=pytest.mark.slow,
            )
            for network_class in NETWORKS
        ],
    ],
    ids=str,
)
def test_canvases_that_share_a_cached_prefix_equal_the_uncached(network_class, config, pattern):
    network, params = make(network_class, **config)
    canvases = jax.random.randint(jax.random.PRNGKey(1), (6, 4), 0, 17)
    full = hidden(network, params, jnp.repeat(PREFIX, 2, axis=0), canvases, pattern)

    def method(module):
        cache = module.cache_prefix(module.encode(PREFIX, deterministic=True), pattern)
        return module.denoise(cache, canvases)

    np.testing.assert_allclose(run(network, params, method), full, atol=1e-5)


def test_a_prefix_that_sees_the_canvas_is_not_cached():
    network, params = make(DecoderOnly)
    with pytest.raises(ValueError, match=r"'bidirectional'.*expected one of cached_prefix"):
        network.apply(
            {"params": params},
            method=lambda module: module.cache_prefix(
                module.encode(PREFIX, deterministic=True), "bidirectional"
            ),
        )


@pytest.mark.parametrize(("network_class", "pattern"), COMBINATIONS)
def test_the_order_of_canvas_and_prefix_tokens_matters(network_class, pattern):
    network, params = make(network_class)
    states = hidden(network, params, PREFIX, TARGET, pattern)[0]
    swapped = hidden(network, params, PREFIX[:, ::-1], TARGET, pattern)[0]
    assert not jnp.allclose(states[-1], swapped[-1], atol=1e-4)
    turned = hidden(network, params, PREFIX, TARGET[:, ::-1], pattern)[0]
    assert not jnp.allclose(states[-1], turned[0], atol=1e-4)


def test_under_causal_attention_prefix_tokens_do_not_see_later_ones_and_otherwise_they_do():
    network, params = make(DecoderOnly, num_layers=2)
    changed = PREFIX[:1].at[0, 4].set(11)

    def first_key_moves(pattern):
        # Only what token 0 has become can tell a later state of this change: mask all else by
        # looking at the cache of the second layer.
        def method(module):
            prefix = module.encode(jnp.concatenate([PREFIX[:1], changed]), deterministic=True)
            cache, _ = module.prefill(prefix, pattern, 1, 1)
            return cache.key_values[1].keys[:, 0]

        one, other = run(network, params, method)
        return not jnp.allclose(one, other, atol=1e-6)

    assert not first_key_moves("causal")
    for pattern in ("prefix_bidirectional", "cached_prefix"):
        assert first_key_moves(pattern)


@pytest.mark.parametrize("network_class", NETWORKS)
@pytest.mark.parametrize(
    ("pattern", "scan_layers"), [("causal", False), ("prefix_bidirectional", True)]
)
def test_cached_decoding_equals_uncached(network_class, pattern, scan_layers):
    network, params = make(network_class, scan_layers=scan_layers)
    full = hidden(network, params, PREFIX, TARGET, pattern)

    def prefill(module):
        prefix = module.encode(PREFIX, deterministic=True)
        return module.prefill(prefix, pattern, TARGET.shape[1], 2)

    @jax.jit
    def step(cache, tokens):
        return network.apply({"params": params}, cache, tokens[:, None], method=network.append)

    cache, state = run(network, params, prefill)
    states = [state]
    for tokens in jnp.repeat(TARGET, 2, axis=0).T[:-1]:
        cache, state = step(cache, tokens)
        states.append(state[:, 0])
    np.testing.assert_allclose(jnp.stack(states, axis=1), jnp.repeat(full, 2, axis=0), atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"scan_layers": True}, {"low_rank": LowRank(rank=2, alpha=4.0)}]
)
def test_kernels_prepared_for_decoding_are_cast_and_transposed_once_and_change_no_number(
    monkeypatch, settings
):
    config = {**settings, "dtype": "bfloat16"}
    network, params = make(DecoderOnly, **config)
    plain = hidden(network, params, PREFIX, TARGET, "causal")
    for kind in ("cpu", "NVIDIA H100 80GB HBM3"):
        monkeypatch.setattr(layers, "device_kind", lambda kind=kind: kind)
        prepared = layers.prepare_kernels(params, network.config.dtype)
        names = named_leaves(prepared)
        transposed = [name for name in names if name.endswith("/transposed_kernel")]
        assert bool(transposed) == kind.startswith("NVIDIA")
        kernels = transposed or [name for name in names if name.endswith("/kernel")]
        assert len(kernels) == (7 if "scan_layers" in settings else 7 * network.config.num_layers)
        assert all(names[name].dtype == jnp.bfloat16 for name in kernels)
        assert names["token_embedder/embedding"].dtype == jnp.float32
        again = hidden(network, prepared, PREFIX, TARGET, "causal")
        np.testing.assert_allclose(*(x.astype(np.float32) for x in (again, plain)), atol=1e-6)


def _gradient(network, pattern):
    """The traced gradient of a scalar of the hidden states."""

    def loss(params):
        return jnp.sum(jnp.sin(read(network, params, PREFIX, TARGET, pattern)))

    return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK).trace(make(type(network))[1])


@functools.lru_cache
def _value_and_gradient(network_class, pattern):
    network, params = make(network_class)
    return _gradient(network, pattern).lower().compile()(params)


@pytest.mark.parametrize(
    ("network_class", "remat"),
    [
        (DecoderOnly, "dots"),
        pytest.param(DecoderOnly, "full", marks=pytest.mark.slow),
        pytest.param(EncoderDecoder, "none", marks=pytest.mark.slow),
    ],
)
def test_scanning_layers_and_recomputing_activations_change_no_number(network_class, remat):
    _, params = make(network_class)
    scanned = network_class(dataclasses.replace(CONFIG, scan_layers=True, remat=remat))

    def stack(stack_params):
        layers = [stack_params[f"layers_{i}"] for i in range(CONFIG.num_layers)]
        rest = {k: v for k, v in stack_params.items() if not k.startswith("layers_")}
        return {**rest, "layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}

    stacked = {k: v if k == "token_embedder" else stack(v) for k, v in params.items()}

    def loss(params):
        return jnp.sum(jnp.sin(read(scanned, params, PREFIX, TARGET, "bidirectional")))

    gradient = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
    value, grads = _value_and_gradient(network_class, "bidirectional")
    other_value, other_grads = gradient(stacked)
    assert float(value) == pytest.approx(float(other_value), rel=1e-5)
    np.testing.assert_allclose(
        other_grads["decoder"]["layers"]["mlp"]["wo"]["kernel"][1],
        grads["decoder"]["layers_1"]["mlp"]["wo"]["kernel"],
        atol=1e-4,
    )


@pytest.mark.parametrize("network_class", NETWORKS)
def test_ar_and_diffusion_have_the_same_parameters(network_class):
    network = network_class(CONFIG)
    shapes = [
        jax.eval_shape(lambda p=pattern: network.init(jax.random.PRNGKey(0), PREFIX, TARGET, p))
        for pattern in PATTERNS
    ]
    assert all(shape == shapes[0] for shape in shapes)


def test_bfloat16_activations_keep_float32_parameters_and_logits():
    network, params = make(DecoderOnly, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    states = hidden(network, params, PREFIX, TARGET, "bidirectional")
    assert states.dtype == jnp.bfloat16
    logits = network.apply({"params": params}, states, method=network.logits)
    assert logits.dtype == jnp.float32
    exact = hidden(make(DecoderOnly)[0], params, PREFIX, TARGET, "bidirectional")
    np.testing.assert_allclose(states.astype(jnp.float32), exact, atol=0.15)


def test_separate_logits_have_their_own_kernel():
    _, tied = make(DecoderOnly)
    network, separate = make(DecoderOnly, tied_logits=False)
    assert "logits_kernel" not in tied["token_embedder"]
    kernel = separate["token_embedder"]["logits_kernel"]
    assert kernel.shape == (CONFIG.embed_dim, CONFIG.vocab_size)
    states = jnp.ones((1, 1, CONFIG.embed_dim))
    logits = network.apply({"params": separate}, states, method=network.logits)
    np.testing.assert_allclose(logits[0, 0], kernel.sum(0), atol=1e-5)


def test_dropout_needs_a_key_changes_the_result_and_is_off_when_deterministic():
    network, params = make(DecoderOnly, dropout_rate=0.5)

    def method(module):
        context = module.encode(PREFIX, deterministic=False)
        return module.decode(context, TARGET, "bidirectional", deterministic=False)

    @jax.jit
    def apply(key):
        return network.apply({"params": params}, method=method, rngs={"dropout": key})

    one, two = apply(jax.random.PRNGKey(0)), apply(jax.random.PRNGKey(1))
    assert not jnp.allclose(one, two)
    np.testing.assert_array_equal(one, apply(jax.random.PRNGKey(0)))
    plain, _ = make(DecoderOnly)
    assert not jnp.allclose(one, hidden(plain, params, PREFIX, TARGET, "bidirectional"))
    with pytest.raises(flax.errors.InvalidRngError):
        jax.eval_shape(lambda: network.apply({"params": params}, method=method))


def test_unknown_names_are_refused_with_the_nearest():
    network, params = make(DecoderOnly)
    with pytest.raises(ValueError, match="did you mean 'bidirectional'"):
        hidden(network, params, PREFIX, TARGET, "bidirectinal")
    with pytest.raises(ValueError, match="did you mean 'full'"):
        dataclasses.replace(CONFIG, remat="ful")
    with pytest.raises(ValueError, match=r"attention_kernel = 'fusd' .* did you mean 'fused'"):
        dataclasses.replace(CONFIG, attention_kernel="fusd")
    with pytest.raises(ValueError, match="mlp_activations"):
        dataclasses.replace(CONFIG, mlp_activations=("gellu",))
    with pytest.raises(ValueError, match="decoder_relative_buckets = 33; expected an even"):
        dataclasses.replace(CONFIG, decoder_relative_buckets=33)
    with pytest.raises(ValueError, match="num_layers = 0"):
        dataclasses.replace(CONFIG, num_layers=0)


def test_texts_that_begin_with_a_zero_have_no_room_for_it_in_packed_canvases():
    network, params = make(DecoderOnly, start_token=True)
    segments = jnp.ones_like(PREFIX), jnp.ones_like(TARGET)
    with pytest.raises(ValueError, match="start_token = True: packed rows"):
        hidden(network, params, PREFIX, TARGET, "bidirectional", *segments)
    canvas = hidden(network, params, PREFIX, TARGET, "bidirectional")
    zero_first = jnp.pad(PREFIX[:1], [(0, 0), (1, 0)])
    plain, _ = make(DecoderOnly)
    by_hand = hidden(plain, params, zero_first, TARGET[:1], "bidirectional")
    np.testing.assert_allclose(canvas[:1], by_hand, atol=1e-5)


@pytest.mark.parametrize(
    "network_class", [DecoderOnly, pytest.param(EncoderDecoder, marks=pytest.mark.slow)]
)
def test_attention_in_row_chunks_changes_no_number_and_keeps_no_weights(network_class):
    network, params = make(network_class)
    chunked, _ = make(network_class, attention_block_logits=1)
    gradient = _gradient(chunked, "bidirectional")
    whole, whole_grads = _value_and_gradient(network_class, "bidirectional")
    value, grads = gradient.lower().compile()(params)
    assert float(value) == pytest.approx(float(whole), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-5), grads, whole_grads
    )
    queries = TARGET.shape[1] + (PREFIX.shape[1] if network_class is DecoderOnly else 0)
    weights = f"[3,2,1,{queries},{queries}]"
    assert weights in str(_gradient(network, "bidirectional").jaxpr)
    assert weights not in str(gradient.jaxpr)


@pytest.mark.parametrize(
    "network_class", [DecoderOnly, pytest.param(EncoderDecoder, marks=pytest.mark.slow)]
)
def test_canvases_of_a_cached_prefix_stay_together_in_row_chunks(network_class):
    canvases = jnp.repeat(TARGET, 2, axis=0).at[1::2, 1].set(2)
    states = []
    for block_logits in (2**20, 1):
        network, params = make(network_class, attention_block_logits=block_logits)

        def method(module):
            context = module.encode(PREFIX, deterministic=True)
            cache = module.cache_prefix(context, "cached_prefix")
            return module.denoise(cache, canvases)

        states.append(run(network, params, method))
    np.testing.assert_allclose(*states, atol=1e-5)


def test_dropout_of_attention_weights_is_the_same_for_all_queries_and_keeps_the_mean():
    dropped = attention.Dropout(0.25, jax.random.PRNGKey(0))(jnp.ones((50, 4, 1, 3, 40)))
    assert (dropped == dropped[..., :1, :]).all()
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert np.mean(dropped) == pytest.approx(1.0, abs=0.03)


def test_row_chunks_draw_their_own_dropout():
    network, params = make(DecoderOnly, dropout_rate=0.5, attention_block_logits=1)
    same = jnp.repeat(TARGET[:1], 3, axis=0)

    def method(module):
        context = module.encode(PREFIX[:1].repeat(3, axis=0), deterministic=True)
        return module.decode(context, same, "causal", deterministic=False)

    @jax.jit
    def apply(key):
        return network.apply({"params": params}, method=method, rngs={"dropout": key})

    one = apply(jax.random.PRNGKey(0))
    np.testing.assert_array_equal(one, apply(jax.random.PRNGKey(0)))
    assert not np.allclose(one[0], one[1])
    assert not np.allclose(one, apply(jax.random.PRNGKey(1)))
