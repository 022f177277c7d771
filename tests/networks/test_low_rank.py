"""Low-rank adaptation in networks: where it begins, its gradients, and its patterns."""

import flax.traverse_util
import jax
import numpy as np
import pytest
import small_networks
import toy
from flax.linen import partitioning as nn_partitioning

from diffusion_t5x.interop.low_rank import is_low_rank
from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.networks.encoder_decoder import EncoderDecoder
from diffusion_t5x.networks.low_rank import LowRank
from diffusion_t5x.runtime.partitioning import standard_logical_axis_rules
from diffusion_t5x.runtime.train_state import INIT_SHAPES, named_leaves

LOW_RANK = LowRank(("self_attention/(query|value)", "mlp/wo"), rank=2, alpha=3.0)
TOKENS = np.random.RandomState(0).randint(1, 17, (2, 6)).astype(np.int32)


@pytest.mark.parametrize(
    ("network_class", "settings"),
    [
        (DecoderOnly, {"scan_layers": True, "remat": "full", "dtype": "bfloat16"}),
        (EncoderDecoder, {}),
    ],
)
def test_with_b_zero_the_network_is_the_one_that_it_adapts_bit_for_bit(network_class, settings):
    base, _ = small_networks.make(network_class, num_layers=1, **settings)
    adapted, params = small_networks.make(
        network_class, num_layers=1, **settings, low_rank=LOW_RANK
    )
    params = {n: 0 * x if n.endswith("_b") else x for n, x in named_leaves(params).items()}
    assert sum(map(is_low_rank, params)) == (9 if network_class is DecoderOnly else 18)
    ours = {name: x for name, x in params.items() if not is_low_rank(name)}
    arguments = TOKENS, TOKENS, "bidirectional"
    np.testing.assert_array_equal(
        small_networks.hidden(base, _nested(ours), *arguments),
        small_networks.hidden(adapted, _nested(params), *arguments),
    )


def _drawn(model, seed=0):
    """Random parameters of an adapted model, and those of its base with the sums as kernels."""
    init = lambda key: model.get_initial_variables(key, INIT_SHAPES)["params"]  # noqa: E731
    named = named_leaves(jax.eval_shape(init, jax.random.PRNGKey(0)))
    draws = np.random.RandomState(seed)
    named = {n: draws.normal(0.0, 0.3, x.shape).astype(np.float32) for n, x in named.items()}
    merged = {n: x for n, x in named.items() if not is_low_rank(n)}
    for name, a in named.items():
        if name.endswith("/low_rank_a"):
            parts = (named[name[:-1] + part] for part in ("b", "scale"))
            b, scale = (np.asarray(x, np.float64) for x in parts)
            kernel = name.replace("low_rank_a", "kernel")
            product = np.einsum("...,...ir,...ro->...io", scale, a.astype(np.float64), b)
            merged[kernel] = (merged[kernel] + product).astype(np.float32)
    return named, merged


def _nested(named):
    return flax.traverse_util.unflatten_dict(named, sep="/")


@pytest.mark.parametrize("scan_layers", [pytest.param(False, marks=pytest.mark.slow), True])
def test_loss_and_gradients_are_those_of_the_sum_of_kernel_and_product(scan_layers):
    settings = {"num_layers": 2, "scan_layers": scan_layers}
    adapted = toy.model("autoregressive", low_rank=LOW_RANK, **settings)
    base = toy.model("autoregressive", **settings)
    named, merged = _drawn(adapted)
    tokens = np.random.RandomState(1).randint(3, 250, (2, 6)).astype(np.int32)
    batch = dict.fromkeys(
        ("encoder_input_tokens", "decoder_target_tokens", "decoder_input_tokens"), tokens
    )
    grads = {}
    for model, params in ((adapted, named), (base, merged)):
        value_and_grad = jax.value_and_grad(lambda p, m=model: m.eval_fn(p, batch)[0])
        loss, grad = jax.jit(value_and_grad, compiler_options=small_networks.QUICK)(_nested(params))
        grads[model] = loss, named_leaves(grad)
    (loss, grad), (merged_loss, full) = grads[adapted], grads[base]
    np.testing.assert_allclose(loss, merged_loss, rtol=1e-6)
    count = 0
    for name, b_grad in grad.items():
        if not name.endswith("/low_rank_b"):
            continue
        a, b = (np.float64(named[name[:-1] + part]) for part in "ab")
        scale = np.float64(named[name[:-1] + "scale"])
        d_kernel = np.float64(full[name.replace("low_rank_b", "kernel")])
        d_a = np.einsum("...,...io,...ro->...ir", scale, d_kernel, b)
        d_b = np.einsum("...,...ir,...io->...ro", scale, a, d_kernel)
        for ours, expected in ((grad[name[:-1] + "a"], d_a), (b_grad, d_b)):
            np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max())
        count += 1
    assert count == (3 if scan_layers else 6)


def test_cached_decoding_of_factors_is_that_of_their_sum():
    adapted = toy.model("autoregressive", low_rank=LOW_RANK)
    named, merged = _drawn(adapted)
    tokens = np.random.RandomState(1).randint(3, 250, (2, 6)).astype(np.int32)
    batch = {"encoder_input_tokens": tokens, "decoder_input_tokens": tokens}
    one, other = (
        jax.jit(model.predict_batch_with_aux)(_nested(params), batch)
        for model, params in ((adapted, named), (toy.model("autoregressive"), merged))
    )
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_allclose(one[1]["scores"], other[1]["scores"], rtol=1e-5)


def test_factors_are_split_as_their_kernels_are():
    model = toy.model(low_rank=LOW_RANK)
    axes = jax.eval_shape(lambda key: model.get_initial_variables(key, INIT_SHAPES),
                          jax.random.PRNGKey(0))["params_axes"]  # fmt: skip
    axes = nn_partitioning.get_axis_names(axes)["decoder"]["layers_0"]["self_attention"]["query"]
    assert tuple(axes["kernel"]) == ("embed", "joined_kv")
    assert tuple(axes["low_rank_a"]) == ("embed", "low_rank")
    assert tuple(axes["low_rank_b"]) == ("low_rank", "joined_kv")
    assert ("low_rank", None) in standard_logical_axis_rules()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projections": "self_attention/qery"}, "did you mean 'self_attention/query'"),
        (
            {"projections": ("mlp/wo", "attention/query")},
            "projections has 'attention/query', which",
        ),
        ({"also_trained": "token_embeder/embedding"}, "did you mean 'token_embedder/embedding'"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(settings, message):
    model = toy.model(low_rank=LowRank(**settings))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda key: model.get_initial_variables(key, INIT_SHAPES), jax.random.key(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank = 0"),
        ({"alpha": 0.0}, "alpha = 0.0"),
        ({"projections": ()}, "projections is empty"),
        ({"also_trained": "(norm"}, r"also_trained has '\(norm', which is no regular expression"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LowRank(**settings)


def test_an_optimizer_that_would_train_everything_is_refused():
    with pytest.raises(ValueError, match="T5X's optimizers train every parameter"):
        toy.model(optimizer=object(), low_rank=LOW_RANK)
