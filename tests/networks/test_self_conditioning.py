"""Self-conditioning: what a pass reads of the pass before, in networks, training and decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import QUICK, make

from diffusion_t5x.decoding.diffusion import DiffusionDecoder
from diffusion_t5x.networks import bound_network
from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.networks.encoder_decoder import EncoderDecoder
from diffusion_t5x.networks.layers import SelfConditioning
from diffusion_t5x.networks.low_rank import LowRank
from diffusion_t5x.objectives import StepUnrolledDenoising
from diffusion_t5x.objectives.corruption import UniformCorruption
from diffusion_t5x.objectives.self_conditioning import self_condition

KEY = jax.random.PRNGKey(0)
CONFIG = {"self_conditioning": True}
PREFIX = np.array([[5, 6, 7], [3, 4, 0]])
CANVAS = jnp.array([[2, 3, 4, 1], [9, 8, 1, 0]])
BATCH = {"encoder_input_tokens": PREFIX, "decoder_input_tokens": CANVAS}
CORRUPTION = UniformCorruption(17)


def _bind(network, params, pattern="cached_prefix"):
    return bound_network.bind(network, params, BATCH, pattern)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recording(bound_network.BoundNetwork):
    """Keeps what each pass is given and returns; it never caches."""

    seen: list
    caches_prefix = False

    def forward(self, canvas, rng, conditioning=None):
        hidden = super().forward(canvas, rng, conditioning)
        self.seen.append((conditioning, hidden))
        return hidden


@pytest.mark.parametrize(
    "network_class", [DecoderOnly, pytest.param(EncoderDecoder, marks=pytest.mark.slow)]
)
def test_conditioning_of_zero_is_none_and_cached_prefixes_change_nothing(network_class):
    network, params = make(network_class, **CONFIG)
    assert set(params["self_conditioning"]) == {"pre_norm", "mlp"}

    def states(params):
        bound = _bind(network, params)
        given = bound.expect_embedding(bound.forward(CANVAS, None))
        return [
            b.forward(CANVAS, None, c)
            for b in (bound, bound.cache_prefix())
            for c in (None, jnp.zeros_like(given), given)
        ]

    none, zero, *others = jax.jit(states, compiler_options=QUICK)(params)
    np.testing.assert_array_equal(none, zero)
    assert np.abs(others[0] - none).max() > 0.1
    for cached, plain in zip(others[1:], (none, zero, others[0]), strict=True):
        np.testing.assert_allclose(cached, plain, atol=1e-5)


def test_it_begins_as_nothing_whatever_it_is_given():
    config = make(DecoderOnly)[0].config
    module = SelfConditioning(dataclasses.replace(config, mlp_bias=True, norm="layer"))
    x = jax.random.normal(KEY, (1, 2, 16))
    np.testing.assert_array_equal(module.init_with_output(KEY, x, True)[0], jnp.zeros_like(x))


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_expected_embedding_is_the_mean_under_the_softmax(tied, monkeypatch):
    monkeypatch.setattr(bound_network, "CHUNK_LOGITS", 17)  # one position at a time
    network, params = make(DecoderOnly, tied_logits=tied, embedding_scale=3.0, **CONFIG)
    bound = dataclasses.replace(_bind(network, params), forbidden=(4,))
    hidden = jax.random.normal(KEY, (2, 3, 16))
    logits = np.asarray(bound.logits(hidden), np.float64)
    likelihoods = np.exp(logits - logits.max(-1, keepdims=True))
    likelihoods /= likelihoods.sum(-1, keepdims=True)
    assert (likelihoods[..., 4] == 0).all()
    table = np.asarray(params["token_embedder"]["embedding"], np.float64)
    np.testing.assert_allclose(bound.expect_embedding(hidden), 3 * likelihoods @ table, rtol=1e-4)


@pytest.mark.slow
def test_it_is_diffusion_gemmas_before_the_norm_of_the_sum():
    torch = pytest.importorskip("torch")
    gemma = pytest.importorskip("transformers.models.diffusion_gemma.modeling_diffusion_gemma")
    text = gemma.DiffusionGemmaTextConfig(
        hidden_size=16, intermediate_size=24, rms_norm_eps=1e-6,
        hidden_activation="gelu_pytorch_tanh",
    )  # fmt: skip
    theirs = gemma.DiffusionGemmaSelfConditioning(text)
    params = make(DecoderOnly, **CONFIG)[1]["self_conditioning"]
    with torch.no_grad():
        theirs.pre_norm.weight.copy_(torch.tensor(np.asarray(params["pre_norm"]["scale"])))
        for name, own in (("gate_proj", "wi_0"), ("up_proj", "wi_1"), ("down_proj", "wo")):
            kernel = np.asarray(params["mlp"][own]["kernel"])
            getattr(theirs, name).weight.copy_(torch.tensor(kernel.T))
        embedded, given = np.random.default_rng(0).normal(size=(2, 1, 5, 16)).astype(np.float32)
        expected = theirs(torch.tensor(embedded), torch.tensor(given)).numpy()
    added = SelfConditioning(make(DecoderOnly)[0].config).apply({"params": params}, given, True)
    total = embedded + np.asarray(added)
    total /= np.sqrt((total**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(total, expected, atol=1e-5)


def test_later_passes_of_a_step_get_the_prediction_for_half_of_the_texts_and_no_gradient():
    network, params = make(DecoderOnly, **CONFIG)
    seen = []
    objective = StepUnrolledDenoising(CORRUPTION)

    def step(params, key):
        seen.clear()
        bound = _bind(network, params, "bidirectional")
        bound = Recording(**vars(bound), seen=seen)
        loss = objective.loss(bound, CANVAS, jnp.ones(CANVAS.shape), key)[0]
        (first, hidden), (second, _) = seen
        assert first is None
        return loss, (second, bound.expect_embedding(hidden))

    run = jax.jit(jax.grad(step, has_aux=True), compiler_options=QUICK)
    patterns = set()
    for seed in range(8):
        gradient, (given, expected) = run(params, jax.random.PRNGKey(seed))
        used = np.asarray(jnp.any(given != 0, axis=(1, 2)))
        patterns.add(tuple(used))
        np.testing.assert_allclose(given, np.where(used[:, None, None], expected, 0), atol=1e-6)
    assert len(patterns) > 2
    assert jnp.any(gradient["self_conditioning"]["mlp"]["wo"]["kernel"] != 0)


@pytest.mark.slow
def test_the_helper_for_one_pass_runs_another_without_gradient():
    network, params = make(DecoderOnly, **CONFIG)
    gradient = jax.grad(lambda p: jnp.sum(self_condition(_bind(network, p), CANVAS, KEY)))(params)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(gradient))
    assert self_condition(_bind(*make(DecoderOnly)), CANVAS, KEY) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"num_samples": 1, "num_steps": 2},
        pytest.param(
            {"num_samples": 4, "halve_every": 1, "trim_multiple": 2}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_decoding_hands_each_prediction_to_the_next_step(fields):
    network, params = make(DecoderOnly, **CONFIG)
    decoder = DiffusionDecoder(CORRUPTION, **{"num_steps": 3, "temperature": 0.5, **fields})

    def decode(decoder, params, config):
        bound = _bind(network.clone(config=config), params)
        return decoder.decode(bound, 4, KEY)

    run = jax.jit(decode, static_argnums=(0, 2), compiler_options=QUICK)
    plain = run(decoder, params, network.config)
    cached = run(dataclasses.replace(decoder, prefix_cache=True), params, network.config)
    np.testing.assert_array_equal(plain.tokens, cached.tokens)
    np.testing.assert_allclose(plain.scores, cached.scores, rtol=1e-4)
    without = run(decoder, params, dataclasses.replace(network.config, self_conditioning=False))
    assert np.abs(plain.scores - without.scores).max() > 1e-3
    if not decoder.halve_every:

        def stepped(params):
            bound, state = decoder.start(_bind(network, params), 4, KEY)
            for _ in range(decoder.num_steps):
                state = decoder.step(bound, state, KEY)
            return decoder.finish(state)

        np.testing.assert_array_equal(jax.jit(stepped)(params).tokens, plain.tokens)


def test_frozen_networks_refuse_what_would_stay_zero():
    with pytest.raises(ValueError, match="self_conditioning = True with low_rank"):
        make(DecoderOnly, low_rank=LowRank(), **CONFIG)
