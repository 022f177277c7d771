"""Reading only the unsettled positions of a canvas, with the keys and values of others kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from fake_network import table_network, with_cached_prefix

from diffusion_t5x.decoding.active_set import ActiveSet
from diffusion_t5x.decoding.diffusion import DiffusionDecoder
from diffusion_t5x.decoding.stopping import Unchanged
from diffusion_t5x.models import Model
from diffusion_t5x.objectives.corruption import UniformCorruption

VOCAB, BATCH, LENGTH = 7, 2, 6
KEY = jax.random.PRNGKey(3)
# Token t becomes t - 1, and 0 stays.
COUNTDOWN = 9 * jnp.eye(VOCAB)[jnp.array([0, *range(VOCAB - 1)])]
BATCH_OF_TEXTS = {
    "encoder_input_tokens": jnp.array([[5, 6, 7, 8], [3, 4, 0, 0]]),
    "decoder_input_tokens": jnp.zeros((2, LENGTH), jnp.int32),
}


def _decode(decoder, architecture="decoder_only"):
    """Every sample of a random model's texts, with what decoding cost."""
    plain = toy.model(architecture=architecture, num_layers=2)
    objective = dataclasses.replace(plain.objective, attention_pattern="cached_prefix")
    model = Model(plain.module, objective, decoder, toy.VOCABULARY, None)
    shapes = {name: value.shape for name, value in BATCH_OF_TEXTS.items()}
    params = jax.jit(lambda: model.get_initial_variables(KEY, shapes))()["params"]
    predict = functools.partial(
        model.predict_batch_with_aux,
        return_all_decodes=True,
        return_trajectory=True,
        return_position_forwards=True,
    )
    return jax.jit(predict)(params, BATCH_OF_TEXTS, KEY)


ALWAYS_WHOLE = ActiveSet(refresh_every=1, multiple=2)
NOTHING_SETTLED = ActiveSet(refresh_every=9, settled_log_prob=0.0)


@pytest.mark.parametrize(
    ("architecture", "active_set"),
    [
        ("decoder_only", ALWAYS_WHOLE),
        ("decoder_only", NOTHING_SETTLED),
        ("encoder_decoder", NOTHING_SETTLED),
    ],
    ids=["always whole", "nothing settled", "nothing settled, with an encoder"],
)
def test_an_active_set_of_every_position_gives_what_the_plain_sampler_gives(
    architecture, active_set
):
    corruption = UniformCorruption(toy.VOCABULARY.vocab_size)
    plain = DiffusionDecoder(corruption, num_steps=4, num_samples=2, prefix_cache=True)
    decoders = plain, dataclasses.replace(plain, active_set=active_set)
    (tokens, aux), (active_tokens, active_aux) = (_decode(d, architecture) for d in decoders)
    assert len(np.unique(aux["trajectory"])) > 20
    np.testing.assert_array_equal(active_tokens, tokens)
    np.testing.assert_array_equal(active_aux["trajectory"], aux["trajectory"])
    np.testing.assert_allclose(active_aux["scores"], aux["scores"], rtol=1e-5)
    np.testing.assert_array_equal(active_aux["position_forwards"], aux["position_forwards"])


@pytest.mark.parametrize("refresh_every", [3, 50])
@pytest.mark.parametrize("trim_multiple", [0, 4])
def test_an_active_set_is_exact_and_cheaper_where_positions_do_not_see_each_other(
    refresh_every, trim_multiple
):
    network = with_cached_prefix(table_network(COUNTDOWN, BATCH))
    plain = DiffusionDecoder(
        UniformCorruption(VOCAB), num_steps=9, num_samples=2, temperature=0.0, prefix_cache=True
    )
    whole = plain.decode(network, LENGTH, KEY, return_trajectory=True)
    active = dataclasses.replace(
        plain,
        active_set=ActiveSet(refresh_every, settled_log_prob=-0.01, multiple=2),
        trim_multiple=trim_multiple,
    ).decode(network, LENGTH, KEY, return_trajectory=True)
    np.testing.assert_array_equal(active.trajectory, whole.trajectory)
    np.testing.assert_allclose(active.scores, whole.scores, rtol=1e-5)
    # Naively: a token must be read again until it has been read as the 0 that stays; the canvas
    # with most such tokens says how many positions each canvas reads.
    canvases = np.asarray(whole.trajectory).reshape(-1, 10, LENGTH)
    used, cost = LENGTH, 0
    for step in range(9):
        window = LENGTH
        if trim_multiple:
            window = min(LENGTH, -(-used // trim_multiple) * trim_multiple)
        unsettled = canvases[:, step - 1] != 0 if step else np.ones((len(canvases), LENGTH))
        longest = max(1, int(unsettled.sum(-1).max()))
        cost += 2 * (window if step % refresh_every == 0 else -(-longest // 2) * 2)
        text = (canvases[:, step] != 0) | (canvases[:, step + 1] != 0)
        used = max(1, max((np.flatnonzero(row)[-1] + 1 for row in text if row.any()), default=1))
    np.testing.assert_array_equal(active.position_forwards, [cost] * BATCH)
    assert cost < int(whole.position_forwards[0])


def test_each_stage_of_halving_begins_with_a_whole_pass_and_done_canvases_are_not_read():
    network = with_cached_prefix(table_network(COUNTDOWN, BATCH))
    decoder = DiffusionDecoder(
        UniformCorruption(VOCAB), num_steps=8, num_samples=4, temperature=0.0, prefix_cache=True,
        halve_every=3, stop=Unchanged(), active_set=ActiveSet(99, -0.01, multiple=1),
    )  # fmt: skip
    decoded = decoder.decode(network, LENGTH, KEY)
    assert (np.asarray(decoded.tokens[:, -1]) == 0).all()
    # Three stages of 4, 2 and 1 canvases: each begins with all of its canvas.
    cost = int(decoded.position_forwards[0])
    assert (4 + 2 + 1) * LENGTH < cost < (4 * 3 + 2 * 3 + 2) * LENGTH


def test_a_decoder_without_cached_prefixes_has_no_active_set():
    with pytest.raises(ValueError, match="set prefix_cache = True"):
        DiffusionDecoder(UniformCorruption(VOCAB), active_set=ActiveSet())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refresh_every": 0}, "refresh_every = 0; expected at least 1"),
        ({"multiple": 0}, "multiple = 0; expected at least 1"),
        ({"settled_log_prob": 0.1}, "settled_log_prob = 0.1; expected a value <= 0"),
    ],
)
def test_an_active_set_without_a_meaning_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ActiveSet(**settings)
