"""What must hold of both networks under every attention pattern."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_t5x.networks import attention
from diffusion_t5x.networks.config import TransformerConfig
from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.networks.encoder_decoder import EncoderDecoder

CONFIG = TransformerConfig(
    vocab_size=17, embed_dim=16, num_heads=2, num_layers=2, head_dim=8, mlp_dim=24
)
NETWORKS = (DecoderOnly, EncoderDecoder)
PATTERNS = ("causal", "prefix_bidirectional", "bidirectional", "cached_prefix", "causal_prefix")
PREFIX = jnp.array([[5, 6, 7, 8, 9], [3, 4, 0, 0, 0], [0, 0, 0, 0, 0]])
TARGET = jnp.array([[2, 3, 4, 1], [9, 8, 1, 0], [7, 1, 0, 0]])


@functools.lru_cache
def _make(network_class, **overrides):
    network = network_class(dataclasses.replace(CONFIG, **overrides))
    init = jax.jit(network.init, static_argnums=3)
    return network, init(jax.random.PRNGKey(0), PREFIX, TARGET, "causal")["params"]


@functools.partial(jax.jit, static_argnums=(0, 4))
def _hidden(network, params, prefix, target, pattern, prefix_segments=None, target_segments=None):
    def run(module):
        context = module.encode(prefix, prefix_segments, deterministic=True)
        return module.decode(context, target, pattern, target_segments, deterministic=True)

    return network.apply({"params": params}, method=run)


@pytest.mark.parametrize("network_class", NETWORKS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_of_the_prefix_changes_nothing(network_class, pattern):
    network, params = _make(network_class)
    short = _hidden(network, params, PREFIX[1:2, :2], TARGET[1:2], pattern)
    padded = jnp.pad(PREFIX[1:2, :2], [(0, 0), (0, 30)])
    long = _hidden(network, params, padded, TARGET[1:2], pattern)
    np.testing.assert_allclose(short, long, atol=1e-5)


@pytest.mark.parametrize("network_class", NETWORKS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_packing_changes_nothing(network_class, pattern):
    network, params = _make(network_class)
    apart = _hidden(network, params, PREFIX[:2], TARGET[:2], pattern)
    packed_prefix = jnp.array([[5, 6, 7, 8, 9, 3, 4, 0]])
    prefix_segments = jnp.array([[1, 1, 1, 1, 1, 2, 2, 0]])
    # The second target is padded inside its segment, as a canvas would be.
    packed_target = jnp.array([[2, 3, 4, 1, 9, 8, 1, 0, 0, 0]])
    target_segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 0, 0]])
    packed = _hidden(
        network, params, packed_prefix, packed_target, pattern, prefix_segments, target_segments
    )
    np.testing.assert_allclose(packed[0, :4], apart[0], atol=1e-5)
    np.testing.assert_allclose(packed[0, 4:8], apart[1], atol=1e-5)


@pytest.mark.parametrize("network_class", NETWORKS)
@pytest.mark.parametrize("pattern", ["causal", "prefix_bidirectional"])
def test_the_state_that_predicts_a_token_sees_only_what_is_before_it(network_class, pattern):
    network, params = _make(network_class)
    before = _hidden(network, params, PREFIX, TARGET, pattern)
    for position in range(TARGET.shape[1]):
        changed = TARGET.at[:, position].set(13)
        after = _hidden(network, params, PREFIX, changed, pattern)
        same = jnp.all(jnp.isclose(before, after, atol=1e-6), axis=(0, 2))
        assert same[: position + 1].all()
        assert not same[position + 1 :].any()


@pytest.mark.parametrize("network_class", NETWORKS)
@pytest.mark.parametrize("pattern", ["bidirectional", "cached_prefix", "causal_prefix"])
def test_denoising_patterns_let_every_canvas_position_see_every_other(network_class, pattern):
    network, params = _make(network_class)
    before = _hidden(network, params, PREFIX, TARGET, pattern)
    for position in range(TARGET.shape[1]):
        after = _hidden(network, params, PREFIX, TARGET.at[:, position].set(13), pattern)
        assert not jnp.any(jnp.all(jnp.isclose(before, after, atol=1e-6), axis=2))


@pytest.mark.parametrize("network_class", NETWORKS)
@pytest.mark.parametrize(
    "config",
    [{}, {"scan_layers": True}, {"relative_bias_per_layer": True}, {"start_token": True}],
    ids=str,
)
@pytest.mark.parametrize("pattern", ["cached_prefix", "causal_prefix"])
def test_canvases_that_share_a_cached_prefix_equal_the_uncached(network_class, config, pattern):
    network, params = _make(network_class, **config)
    canvases = jax.random.randint(jax.random.PRNGKey(1), (6, 4), 0, 17)
    full = _hidden(network, params, jnp.repeat(PREFIX, 2, axis=0), canvases, pattern)

    def run(module):
        cache = module.cache_prefix(module.encode(PREFIX, deterministic=True), pattern)
        return module.denoise(cache, canvases)[0]

    np.testing.assert_allclose(network.apply({"params": params}, method=run), full, atol=1e-5)


def test_a_prefix_that_sees_the_canvas_is_not_cached():
    network, params = _make(DecoderOnly)
    with pytest.raises(ValueError, match=r"'bidirectional'.*diffusion_cached_prefix"):
        network.apply(
            {"params": params},
            method=lambda module: module.cache_prefix(
                module.encode(PREFIX, deterministic=True), "bidirectional"
            ),
        )


@pytest.mark.parametrize("network_class", NETWORKS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_order_of_canvas_and_prefix_tokens_matters(network_class, pattern):
    network, params = _make(network_class)
    hidden = _hidden(network, params, PREFIX[:1], TARGET[:1], pattern)
    swapped = _hidden(network, params, PREFIX[:1, ::-1], TARGET[:1], pattern)
    assert not jnp.allclose(hidden[:, -1], swapped[:, -1], atol=1e-4)
    turned = _hidden(network, params, PREFIX[:1], TARGET[:1, ::-1], pattern)
    assert not jnp.allclose(hidden[:, -1], turned[:, 0], atol=1e-4)


def test_under_causal_attention_prefix_tokens_do_not_see_later_ones_and_otherwise_they_do():
    network, params = _make(DecoderOnly, num_layers=2)
    changed = PREFIX[:1].at[0, 4].set(11)

    def first_key_moves(pattern):
        # Only what token 0 has become can tell a later state of this change: mask all else by
        # looking at the cache of the second layer.
        def run(module):
            caches = [
                module.prefill(module.encode(prefix, deterministic=True), pattern, 1, 1)[0]
                for prefix in (PREFIX[:1], changed)
            ]
            return [cache.key_values[1].keys[0, 0] for cache in caches]

        one, other = network.apply({"params": params}, method=run)
        return not jnp.allclose(one, other, atol=1e-6)

    assert not first_key_moves("causal")
    for pattern in ("prefix_bidirectional", "cached_prefix"):
        assert first_key_moves(pattern)


@pytest.mark.parametrize("network_class", NETWORKS)
@pytest.mark.parametrize("pattern", ["causal", "prefix_bidirectional"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_cached_decoding_equals_uncached(network_class, pattern, scan_layers):
    network, params = _make(network_class, scan_layers=scan_layers)
    full = _hidden(network, params, PREFIX, TARGET, pattern)

    def run(module):
        context = module.encode(PREFIX, deterministic=True)
        cache, hidden = module.prefill(context, pattern, TARGET.shape[1], 2)
        states = [hidden]
        for position in range(TARGET.shape[1] - 1):
            tokens = jnp.repeat(TARGET[:, position], 2)
            cache, hidden = module.step(cache, tokens, pattern)
            states.append(hidden)
        return jnp.stack(states, axis=1)

    cached = network.apply({"params": params}, method=run)
    np.testing.assert_allclose(cached, jnp.repeat(full, 2, axis=0), atol=1e-5)


@pytest.mark.parametrize("network_class", NETWORKS)
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_scanning_layers_and_recomputing_activations_change_no_number(network_class, remat):
    looped, params = _make(network_class)
    scanned = network_class(dataclasses.replace(CONFIG, scan_layers=True, remat=remat))

    def stack(stack_params):
        layers = [stack_params[f"layers_{i}"] for i in range(CONFIG.num_layers)]
        rest = {k: v for k, v in stack_params.items() if not k.startswith("layers_")}
        return {**rest, "layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}

    stacked = {k: v if k == "token_embedder" else stack(v) for k, v in params.items()}

    def loss(network):
        return lambda p: jnp.sum(jnp.sin(_hidden(network, p, PREFIX, TARGET, "bidirectional")))

    value, grads = jax.value_and_grad(loss(looped))(params)
    other_value, other_grads = jax.value_and_grad(loss(scanned))(stacked)
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
    network, params = _make(DecoderOnly, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    hidden = _hidden(network, params, PREFIX, TARGET, "bidirectional")
    assert hidden.dtype == jnp.bfloat16
    logits = network.apply({"params": params}, hidden, method=network.logits)
    assert logits.dtype == jnp.float32
    exact = _hidden(_make(DecoderOnly)[0], params, PREFIX, TARGET, "bidirectional")
    np.testing.assert_allclose(hidden.astype(jnp.float32), exact, atol=0.15)


def test_separate_logits_have_their_own_kernel():
    _, tied = _make(DecoderOnly)
    network, separate = _make(DecoderOnly, tied_logits=False)
    assert "logits_kernel" not in tied["token_embedder"]
    kernel = separate["token_embedder"]["logits_kernel"]
    assert kernel.shape == (CONFIG.embed_dim, CONFIG.vocab_size)
    hidden = jnp.ones((1, 1, CONFIG.embed_dim))
    logits = network.apply({"params": separate}, hidden, method=network.logits)
    np.testing.assert_allclose(logits[0, 0], kernel.sum(0), rtol=1e-5)


def test_dropout_needs_a_key_changes_the_result_and_is_off_when_deterministic():
    network, params = _make(DecoderOnly, dropout_rate=0.5)

    def run(key):
        def method(module):
            context = module.encode(PREFIX, deterministic=False)
            return module.decode(context, TARGET, "bidirectional", deterministic=False)

        return network.apply({"params": params}, method=method, rngs={"dropout": key})

    one, two = run(jax.random.PRNGKey(0)), run(jax.random.PRNGKey(1))
    assert not jnp.allclose(one, two)
    np.testing.assert_array_equal(one, run(jax.random.PRNGKey(0)))


def test_unknown_names_are_refused_with_the_nearest():
    network, params = _make(DecoderOnly)
    with pytest.raises(ValueError, match="did you mean 'bidirectional'"):
        _hidden(network, params, PREFIX, TARGET, "bidirectinal")
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
    network, params = _make(DecoderOnly, start_token=True)
    segments = jnp.ones_like(PREFIX), jnp.ones_like(TARGET)
    with pytest.raises(ValueError, match="start_token = True: packed rows"):
        _hidden(network, params, PREFIX, TARGET, "bidirectional", *segments)
    canvas = _hidden(network, params, PREFIX, TARGET, "bidirectional")
    zero_first = jnp.pad(PREFIX[:1], [(0, 0), (1, 0)])
    plain, _ = _make(DecoderOnly)
    by_hand = _hidden(plain, params, zero_first, TARGET[:1], "bidirectional")
    np.testing.assert_allclose(canvas[:1], by_hand, atol=1e-5)


@pytest.mark.parametrize("network_class", NETWORKS)
@pytest.mark.parametrize("pattern", ["prefix_bidirectional", "bidirectional"])
def test_attention_in_blocks_of_rows_changes_no_number_and_keeps_no_weights(network_class, pattern):
    network, params = _make(network_class)
    blocked, _ = _make(network_class, attention_block_logits=1)

    def gradient(network):
        loss = lambda p: jnp.sum(jnp.sin(_hidden(network, p, PREFIX, TARGET, pattern)))  # noqa: E731
        return jax.value_and_grad(loss)

    whole, whole_grads = gradient(network)(params)
    value, grads = gradient(blocked)(params)
    assert float(value) == pytest.approx(float(whole), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), grads, whole_grads)
    queries = TARGET.shape[1] + (PREFIX.shape[1] if network_class is DecoderOnly else 0)
    weights = f"[3,2,1,{queries},{queries}]"
    assert weights in str(jax.make_jaxpr(gradient(network))(params))
    assert weights not in str(jax.make_jaxpr(gradient(blocked))(params))


@pytest.mark.parametrize("network_class", NETWORKS)
def test_canvases_of_a_cached_prefix_stay_together_in_blocks(network_class):
    canvases = jnp.repeat(TARGET, 2, axis=0).at[1::2, 1].set(2)
    states = []
    for block_logits in (2**20, 1):
        network, params = _make(network_class, attention_block_logits=block_logits)

        def run(module):
            context = module.encode(PREFIX, deterministic=True)
            cache = module.cache_prefix(context, "cached_prefix")
            return module.denoise(cache, canvases)[0]

        states.append(network.apply({"params": params}, method=run))
    np.testing.assert_allclose(*states, atol=1e-5)


def test_dropout_of_attention_weights_is_the_same_for_all_queries_and_keeps_the_mean():
    dropped = attention.Dropout(0.25, jax.random.PRNGKey(0))(jnp.ones((50, 4, 1, 3, 40)))
    assert (dropped == dropped[..., :1, :]).all()
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert np.mean(dropped) == pytest.approx(1.0, abs=0.03)


def test_blocks_of_rows_draw_their_own_dropout():
    network, params = _make(DecoderOnly, dropout_rate=0.5, attention_block_logits=1)
    same = jnp.repeat(TARGET[:1], 3, axis=0)

    def run(module, deterministic):
        context = module.encode(PREFIX[:1].repeat(3, axis=0), deterministic=True)
        return module.decode(context, same, "causal", deterministic=deterministic)

    def apply(key):
        rngs = {"dropout": jax.random.PRNGKey(key)}
        return network.apply({"params": params}, False, method=run, rngs=rngs)

    np.testing.assert_array_equal(apply(0), apply(0))
    assert not np.allclose(apply(0)[0], apply(0)[1])
    assert not np.allclose(apply(0), apply(1))
