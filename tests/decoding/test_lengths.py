"""A cache that grows while a text is decoded."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_t5x import models
from diffusion_t5x.decoding import autoregressive
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.lengths import bucket_lengths, cache_lengths
from diffusion_t5x.networks.config import TransformerConfig
from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.networks.encoder_decoder import EncoderDecoder
from diffusion_t5x.objectives import NextToken

VOCAB, LENGTH = 19, 12
VOCABULARY = types.SimpleNamespace(vocab_size=VOCAB, eos_id=None)
CONFIG = TransformerConfig(
    vocab_size=VOCAB, embed_dim=8, num_layers=2, num_heads=2, head_dim=4, mlp_dim=16
)


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, [1]), (4, [4]), (5, [4, 5]), (8, [4, 8]), (33, [4, 8, 16, 32, 33])],
)
def test_a_cache_doubles_until_it_holds_the_text(length, expected):
    assert cache_lengths(length, first=4) == expected


def test_short_texts_need_one_cache():
    assert cache_lengths(128) == [128]
    assert cache_lengths(1000) == [128, 256, 512, 1000]


@pytest.mark.parametrize(
    ("length", "multiple", "expected"),
    [
        (1, 8, [1]),
        (8, 8, [8]),
        (24, 8, [8, 16, 24]),
        (50, 4, [4, 8, 12, 16, 24, 32, 48, 50]),
        (13, 1, [1, 2, 3, 4, 6, 8, 12, 13]),
    ],
)
def test_what_is_read_of_a_canvas_has_two_lengths_for_each_doubling(length, multiple, expected):
    assert bucket_lengths(length, multiple) == expected


def test_a_long_canvas_needs_few_programs():
    assert len(bucket_lengths(4096, 8)) == 18


@pytest.mark.parametrize("scan_layers", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "network_class", [DecoderOnly, pytest.param(EncoderDecoder, marks=pytest.mark.slow)]
)
def test_a_growing_cache_decodes_what_a_whole_one_does(network_class, scan_layers, monkeypatch):
    config = dataclasses.replace(CONFIG, scan_layers=scan_layers)
    decoder = AutoregressiveDecoder(num_samples=2, temperature=1.0, eos_id=-1)
    model = models.Model(network_class(config), NextToken(), decoder, VOCABULARY, None)
    prefix = jax.random.randint(jax.random.PRNGKey(1), (3, 5), 2, VOCAB)
    blank = jnp.zeros((3, LENGTH), jnp.int32)
    batch = {"encoder_input_tokens": prefix, "decoder_input_tokens": blank}
    shapes = {name: value.shape for name, value in batch.items()}
    initial = jax.jit(lambda: model.get_initial_variables(jax.random.PRNGKey(0), shapes))
    params = initial()["params"]
    decoded = []
    for first in (LENGTH, 2):
        lengths = functools.partial(cache_lengths, first=first)
        monkeypatch.setattr(autoregressive, "cache_lengths", lengths)
        predict = functools.partial(model.predict_batch_with_aux, return_all_decodes=True)
        decoded.append(jax.jit(predict)(params, batch))
    (whole, whole_aux), (grown, grown_aux) = decoded
    assert len(np.unique(whole)) > 5
    np.testing.assert_array_equal(grown, whole)
    np.testing.assert_allclose(grown_aux["scores"], whole_aux["scores"], rtol=1e-5)
