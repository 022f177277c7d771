"""Cached prefixes that are extended, against prefixes that are read at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import QUICK, make, run

from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.networks.encoder_decoder import EncoderDecoder
from diffusion_t5x.networks.kv_cache import grow

SCANNED = {"scan_layers": True, "relative_bias_per_layer": True}
CONFIGS = [
    {**SCANNED, "start_token": True},
    *[pytest.param(c, marks=pytest.mark.slow) for c in ({}, SCANNED, {"start_token": True})],
]
PREFIX = np.array([[5, 6, 7, 8, 9], [3, 4, 0, 0, 0], [0, 0, 0, 0, 0]])
CANVASES = jax.random.randint(jax.random.PRNGKey(1), (6, 5), 0, 17)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_an_extended_cached_prefix_equals_a_long_prefix(config):
    network, params = make(DecoderOnly, **config)
    blocks = jax.random.randint(jax.random.PRNGKey(3), (2, 3, 4), 1, 17)

    def grown(module):
        context = module.encode(PREFIX, deterministic=True)
        cache = grow(module.cache_prefix(context, "causal_prefix"), 8)
        for block in blocks:
            cache = module.extend_cached(cache, block, "causal_prefix")
        # Unused room must not be seen.
        return module.denoise(grow(cache, 3), CANVASES)

    def whole(module):
        # One row at a time, so that no padding stands between a prefix and its blocks.
        states = []
        for row in range(3):
            prefix = PREFIX[row][PREFIX[row] > 0]
            if not prefix.size and not config.get("start_token"):
                prefix = PREFIX[row][:1]  # The padding token that starts a text without a prefix.
            prefix = jnp.concatenate([prefix, *blocks[:, row]])[None]
            context = module.encode(jnp.repeat(prefix, 2, axis=0), deterministic=True)
            canvases = CANVASES[2 * row : 2 * row + 2]
            states.append(module.decode(context, canvases, "causal_prefix", deterministic=True))
        return jnp.concatenate(states)

    states = [run(network, params, method) for method in (grown, whole)]
    np.testing.assert_allclose(*states, atol=1e-5)


@pytest.mark.parametrize("network_class", [DecoderOnly, EncoderDecoder])
def test_canvases_after_cached_prefixes_attend_in_chunks_of_rows_too(network_class):
    # Neither padding before prefixes nor the encoder's mask has a row for each query.
    def denoise(network, params):
        def apply(module):
            context = module.encode(PREFIX, deterministic=True)
            return module.denoise(module.cache_prefix(context, "cached_prefix"), CANVASES)

        return network.apply({"params": params}, method=apply)

    results, loops = [], []
    for block_logits in (2**20, 2 * 2 * 5 * 6):  # all rows; a prefix and its canvases at a time
        network, params = make(network_class, attention_block_logits=block_logits)
        lowered = jax.jit(denoise, static_argnums=0, compiler_options=QUICK).lower(network, params)
        loops.append(lowered.as_text().count("stablehlo.while"))
        results.append(lowered.compile()(params))
    np.testing.assert_allclose(*results, atol=1e-5)
    # Two layers each: encoder, decoder, cross-attention; or canvas, and prefix, whose second layer
    # makes keys and values alone.
    assert loops == [0, 3 if network_class is DecoderOnly else 6]


@pytest.mark.parametrize(
    ("network_class", "pattern", "message"),
    [
        (DecoderOnly, "cached_prefix", "expected causal_prefix"),
        (EncoderDecoder, "causal_prefix", "block_length needs a decoder-only network"),
    ],
)
def test_prefixes_that_cannot_be_extended_are_refused(network_class, pattern, message):
    network, params = make(network_class)

    def read(module):
        cache = module.cache_prefix(module.encode(PREFIX, deterministic=True), pattern)
        return module.extend_cached(cache, CANVASES[:3], pattern)

    with pytest.raises(ValueError, match=message):
        run(network, params, read)
