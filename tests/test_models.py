"""The model contract, for both networks under both objectives."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_networks

from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.diffusion import DiffusionDecoder
from diffusion_t5x.models import Model, make_metric
from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.networks.encoder_decoder import EncoderDecoder
from diffusion_t5x.objectives import NextToken, StepUnrolledDenoising
from diffusion_t5x.objectives.corruption import MaskCorruption, UniformCorruption
from diffusion_t5x.objectives.losses import CrossEntropy
from diffusion_t5x.training.hooks import compute

VOCAB = 19
CORRUPTION = UniformCorruption(VOCAB)
SIZES = {"vocab_size": VOCAB, "num_layers": 1}
KEY = jax.random.PRNGKey(0)
NETWORKS = (DecoderOnly, EncoderDecoder)
# What the network does not decide is tested with one of them by default.
ONE_NETWORK = [DecoderOnly, pytest.param(EncoderDecoder, marks=pytest.mark.slow)]
OBJECTIVES = ("autoregressive", "diffusion")


def make_model(network_class, objective, dropout_rate=0.0, **kwargs):
    network, _ = small_networks.make(network_class, **SIZES, dropout_rate=dropout_rate)
    if objective == "autoregressive":
        parts = NextToken(cross_entropy=CrossEntropy(z_loss=1e-3)), AutoregressiveDecoder()
    else:
        parts = (
            StepUnrolledDenoising(CORRUPTION, cross_entropy=CrossEntropy(z_loss=1e-3)),
            DiffusionDecoder(CORRUPTION, num_steps=3, num_samples=4),
        )
    vocabulary = types.SimpleNamespace(vocab_size=VOCAB, eos_id=1)
    return Model(network, *parts, vocabulary, None, **kwargs)


def make_batch(rows=3, seed=0):
    rng = np.random.default_rng(seed)
    prefix = rng.integers(2, VOCAB, (rows, 6))
    target = rng.integers(2, VOCAB, (rows, 5))
    prefix[0, 3:] = 0
    target[0, 2:] = [1, 0, 0]
    return {
        "encoder_input_tokens": jnp.asarray(prefix),
        "decoder_target_tokens": jnp.asarray(target),
        "decoder_input_tokens": jnp.asarray(np.pad(target, [(0, 0), (1, 0)])[:, :-1]),
        "decoder_loss_weights": jnp.asarray(target != 0, jnp.int32),
    }


def init(model):
    return small_networks.make(type(model.module), **SIZES)[1]


def predict(model, params, batch, rng=KEY, **settings):
    """`predict_batch_with_aux`, compiled."""
    return jax.jit(functools.partial(model.predict_batch_with_aux, **settings))(params, batch, rng)


@pytest.mark.parametrize("network_class", ONE_NETWORK)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_prefix_tokens_are_never_corrupted_or_decoded(network_class, objective):
    seen = []
    model = make_model(network_class, objective)
    batch = make_batch()
    params = init(model)
    original = model.module.encode

    class Spy:
        config = model.module.config
        decode, logits = model.module.decode, model.module.logits
        output_weights = model.module.output_weights
        prefill, append, encode = model.module.prefill, model.module.append, original

        def apply(self, variables, *args, method, **kwargs):
            if method == original:
                jax.debug.callback(seen.append, args[0])
            return network.apply(variables, *args, method=method, **kwargs)

    network = model.module
    model.module = Spy()
    jax.jit(model.loss_fn)(params, batch, jax.random.PRNGKey(1))
    predict(model, params, batch)
    jax.effects_barrier()
    assert len(seen) == 2
    for tokens in seen:
        np.testing.assert_array_equal(tokens, batch["encoder_input_tokens"])


@pytest.mark.parametrize("network_class", ONE_NETWORK)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "factor",
    [
        *(pytest.param(x, marks=pytest.mark.slow) for x in (None, 3.0, "NUM_TOTAL_TARGET_TOKENS")),
        "NUM_REAL_TARGET_TOKENS",
        "AVERAGE_PER_SEQUENCE",
    ],
)
def test_microbatch_losses_add_up_to_the_batch_loss(network_class, objective, factor):
    model = make_model(network_class, objective, loss_normalizing_factor=factor)
    batch = make_batch(rows=4)
    params = init(model)
    if objective == "diffusion":  # the same noise whichever rows are together
        object.__setattr__(model.objective, "corruption", _NoCorruption())
    halves = [jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(0, 2), slice(2, 4))]
    loss_fn = jax.jit(model.loss_fn)
    whole = loss_fn(params, batch, KEY)[0]
    parts = sum(loss_fn(params, half, KEY)[0] * model.loss_normalization(half) for half in halves)
    parts /= model.loss_normalization(batch)
    assert float(whole) == pytest.approx(float(parts), rel=1e-5)


class _NoCorruption:
    vocab_size = VOCAB
    forbidden = ()

    def sample_times(self, rng, batch_size, length):
        return jnp.zeros((batch_size, 1))

    def rate(self, times):
        return times

    def corrupt(self, rng, tokens, times):
        return tokens, jnp.zeros(tokens.shape, bool)


@pytest.mark.parametrize("network_class", ONE_NETWORK)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_of_batch_padding_change_neither_loss_nor_metrics(network_class, objective):
    model = make_model(network_class, objective, loss_normalizing_factor="NUM_REAL_TARGET_TOKENS")
    batch = make_batch()
    params = init(model)
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, 2), (0, 0)]), batch)
    if objective == "diffusion":
        object.__setattr__(model.objective, "corruption", _NoCorruption())
    eval_fn = jax.jit(model.eval_fn)
    loss, metrics = eval_fn(params, batch)
    padded_loss, padded_metrics = eval_fn(params, padded)
    assert float(loss) == pytest.approx(float(padded_loss), rel=1e-5)
    for name in metrics:
        expected = pytest.approx(float(padded_metrics[name].compute()), rel=1e-5)
        assert float(metrics[name].compute()) == expected


@pytest.mark.parametrize("network_class", ONE_NETWORK)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_depends_on_the_key_and_evaluation_does_not_need_one(network_class, objective):
    model = make_model(network_class, objective, dropout_rate=0.3)
    batch = make_batch()
    params = init(model)
    loss_fn, eval_fn = jax.jit(model.loss_fn), jax.jit(model.eval_fn)
    losses = [float(loss_fn(params, batch, jax.random.PRNGKey(i))[0]) for i in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert eval_fn(params, batch)[0] == eval_fn(params, batch)[0]
    assert loss_fn(params, batch, None)[0] == eval_fn(params, batch)[0]


@pytest.mark.parametrize("network_class", ONE_NETWORK)
def test_greedy_decoding_with_a_cache_is_the_argmax_of_the_uncached_network(network_class):
    model = make_model(network_class, "autoregressive")
    batch = make_batch()
    params = init(model)
    tokens, aux = predict(model, params, batch, None)
    assert tokens.shape == (3, 5)
    ended = jnp.cumsum(jnp.pad(tokens == 1, [(0, 0), (1, 0)])[:, :-1], axis=1) > 0

    @jax.jit
    def uncached(params, batch, tokens):
        network = model.bind(params, batch)
        return network.logits(network.forward(tokens, None))

    argmax = jnp.argmax(uncached(params, batch, tokens), axis=-1)
    np.testing.assert_array_equal(tokens, jnp.where(ended, 0, argmax))
    scored = {
        **batch,
        "decoder_target_tokens": tokens,
        "decoder_loss_weights": (~ended).astype(jnp.int32),
    }
    scores = jax.jit(model.score_batch)(params, scored)
    np.testing.assert_allclose(aux["scores"], scores, rtol=1e-4)


@pytest.mark.parametrize("network_class", ONE_NETWORK)
def test_diffusion_scores_are_the_model_score_of_the_last_canvas_recomputed(network_class):
    model = make_model(network_class, "diffusion")
    batch = make_batch()
    params = init(model)
    tokens, aux = predict(
        model, params, batch, return_all_decodes=True, return_trajectory=True
    )  # fmt: skip

    @jax.jit
    def score(params, canvas):
        network = model.bind(params, batch)
        return CrossEntropy().log_likelihood(network, canvas, jnp.ones(canvas.shape))

    assert tokens.shape == (3, 4, 5)
    assert aux["trajectory"].shape == (3, 4, 4, 5)
    for sample in range(4):
        canvas = aux["trajectory"][:, sample, -2]
        np.testing.assert_allclose(aux["scores"][:, sample], score(params, canvas), rtol=1e-4)


@pytest.mark.parametrize("network_class", ONE_NETWORK)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"halve_every": 1, "trim_multiple": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_cached_prefix_decodes_the_same_for_fewer_positions(network_class, settings):
    model = make_model(network_class, "diffusion")
    model.objective = StepUnrolledDenoising(CORRUPTION, attention_pattern="cached_prefix")
    batch = make_batch()
    params = init(model)

    def decode(**more):
        return predict(
            model, params, batch, return_all_decodes=True, return_cost=True, **settings, **more
        )

    tokens, aux = decode()
    cached_tokens, cached_aux = decode(prefix_cache=True)
    np.testing.assert_array_equal(tokens, cached_tokens)
    np.testing.assert_allclose(aux["scores"], cached_aux["scores"], rtol=1e-4)
    if not settings:  # 3 steps, 4 canvases of 5
        for cost in (aux, cached_aux):
            np.testing.assert_array_equal(cost["passes"], [3 * 4] * 3)
            np.testing.assert_array_equal(cost["positions"], [3 * 4 * 5] * 3)


def test_the_papers_attention_pattern_does_not_allow_a_cached_prefix():
    model = make_model(DecoderOnly, "diffusion")
    batch = make_batch()
    with pytest.raises(ValueError, match="the prefix sees the canvas"):
        model.predict_batch_with_aux(init(model), batch, KEY, prefix_cache=True)


@pytest.mark.parametrize("network_class", ONE_NETWORK)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_decoder_settings_may_be_overridden_per_call(network_class, objective):
    model = make_model(network_class, objective)
    batch = make_batch()
    params = init(model)
    tokens, aux = predict(model, params, batch, return_all_decodes=True, num_samples=2)
    assert tokens.shape == (3, 2, 5)
    assert aux["scores"].shape == (3, 2)
    with pytest.raises(ValueError, match="did you mean 'num_samples'"):
        model.predict_batch_with_aux(params, batch, num_sample=3)


@pytest.mark.parametrize("network_class", ONE_NETWORK)
def test_diffusion_learns_where_the_text_ends_because_padding_counts(network_class):
    model = make_model(network_class, "diffusion", loss_normalizing_factor=None)
    batch = make_batch()
    batch["decoder_loss_weights"] = jnp.ones_like(batch["decoder_loss_weights"])
    params = init(model)
    grads = jax.jit(jax.grad(lambda p: model.loss_fn(p, batch, KEY)[0]))(params)
    ignoring = make_model(network_class, "diffusion", loss_normalizing_factor=None)
    object.__setattr__(ignoring.objective, "padding_weight", 0.0)
    without = jax.jit(jax.grad(lambda p: ignoring.loss_fn(p, batch, KEY)[0]))(params)
    pad_row = lambda tree: tree["token_embedder"]["embedding"][0]  # noqa: E731
    assert not jnp.allclose(pad_row(grads), pad_row(without), atol=1e-3)


def test_attention_opens_with_the_steps_of_a_run_and_not_in_evaluation():
    model = make_model(DecoderOnly, "diffusion")
    batch, params = make_batch(), init(model)
    object.__setattr__(model.objective, "corruption", _NoCorruption())
    loss_fn = jax.jit(model.loss_fn)
    wide = loss_fn(params, batch, KEY)[0]
    model.objective = dataclasses.replace(model.objective, opening_steps=4)
    opening = jax.jit(model.loss_fn)
    losses, metrics = zip(*(opening(params, batch, KEY, step) for step in range(6)), strict=True)
    shares = [float(metric["openness"].compute()) for metric in metrics]
    assert shares == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert losses[3] == losses[4] == wide
    assert len({*map(float, losses)}) == 4
    assert jax.jit(model.eval_fn)(params, batch)[0] == wide
    with pytest.raises(ValueError, match=r"opening_steps = 4 needs the step.*OPENING_STEPS = 0"):
        model.loss_fn(params, batch, KEY)


def test_ar2diff_needs_no_new_parameter():
    shapes = {name: value.shape for name, value in make_batch().items()}

    def parameters(network_class, objective):
        model = make_model(network_class, objective)
        return jax.eval_shape(lambda key: model.get_initial_variables(key, shapes), KEY)

    for network_class in NETWORKS:
        first, second = (parameters(network_class, objective) for objective in OBJECTIVES)
        assert first == second


def test_parts_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match=r"set VOCAB_SIZE"):
        model = make_model(DecoderOnly, "diffusion")
        Model(
            model.module, model.objective, model.decoder, types.SimpleNamespace(vocab_size=20), None
        )
    with pytest.raises(ValueError, match="knows only 19 tokens"):
        model = make_model(DecoderOnly, "diffusion")
        Model(
            model.module,
            StepUnrolledDenoising(UniformCorruption(99)),
            model.decoder,
            model.output_vocabulary,
            None,
        )
    with pytest.raises(ValueError, match=r"AutoregressiveDecoder.eos_id = 1, .* token 2; set it"):
        model = make_model(DecoderOnly, "autoregressive")
        vocabulary = types.SimpleNamespace(vocab_size=VOCAB, eos_id=2)
        Model(model.module, model.objective, model.decoder, vocabulary, None)
    with pytest.raises(ValueError, match=r"shift = True, but .*set SHIFT = False"):
        model = make_model(EncoderDecoder, "diffusion")
        objective = dataclasses.replace(model.objective, shift=True)
        Model(model.module, objective, model.decoder, model.output_vocabulary, None)
    with pytest.raises(ValueError, match="loss_normalizing_factor"):
        make_model(DecoderOnly, "diffusion", loss_normalizing_factor="SUM")


def _noisy_model(noise, decoded=None, extra_tokens=0, **settings):
    network, _ = small_networks.make(DecoderOnly, **SIZES, extra_tokens=extra_tokens)
    objective = StepUnrolledDenoising(noise, **settings)
    decoder = DiffusionDecoder(decoded or noise, num_steps=2, num_samples=2)
    vocabulary = types.SimpleNamespace(vocab_size=VOCAB, eos_id=1)
    return Model(network, objective, decoder, vocabulary, None)


def test_noise_that_the_network_has_no_token_for_is_refused():
    mask = MaskCorruption(VOCAB, mask_id=VOCAB)
    with pytest.raises(ValueError, match=r"vocab_size = 20, .* 19 tokens; .*extra_tokens = 1"):
        _noisy_model(mask)
    with pytest.raises(ValueError, match=r"tokens from 19 on are extra_tokens, .*at most 19"):
        _noisy_model(UniformCorruption(VOCAB + 1), extra_tokens=1)
    with pytest.raises(ValueError, match=r"UniformCorruption with mask tokens \(\), .*\(19,\)"):
        _noisy_model(mask, CORRUPTION, extra_tokens=1)
    inside = MaskCorruption(VOCAB, mask_id=VOCAB - 1)
    for noise in (CORRUPTION, inside):
        with pytest.raises(ValueError, match=r"extra_tokens = 1, but \w+ has no such token"):
            _noisy_model(noise, extra_tokens=1)
    smoothing = CrossEntropy(label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing = 0\.1, but .* forbids"):
        _noisy_model(inside, cross_entropy=smoothing)
    _noisy_model(mask, extra_tokens=1, cross_entropy=smoothing)  # which smoothing never predicts


def test_losses_by_rate_are_logged_by_name_and_smoothed_without_empty_parts():
    sums, counts = jnp.array([2.0, 0.0, 9.0, 0.0]), jnp.array([1.0, 0.0, 3.0, 0.0])
    metric = make_metric("cross_entropy/by_rate", sums, counts)
    pair = jnp.float32(5.0), jnp.float32(2.0)
    merged = metric.merge(make_metric("cross_entropy/by_rate", sums, counts.at[0].set(3.0)))
    values = compute({"cross_entropy/by_rate": merged, "loss": make_metric("loss", *pair)})
    assert values == {
        "cross_entropy/by_rate": pytest.approx((1.0 + 3.0) / 2),
        "cross_entropy/rate_0.25": 1.0,
        "cross_entropy/rate_0.75": 3.0,
        "loss": 2.5,
    }
    nothing = jax.tree.map(jnp.zeros_like, merged)
    assert compute({"a/by_rate": nothing}).keys() == {"a/by_rate"}
