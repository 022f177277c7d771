"""Canvases read in part, and prefixes that grow, against networks that read everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import NETWORKS, make, run

from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.networks.encoder_decoder import EncoderDecoder
from diffusion_t5x.networks.kv_cache import grow

CONFIGS = [{}, {"scan_layers": True}, {"relative_bias_per_layer": True}]
PREFIX = np.array([[5, 6, 7, 8, 9], [3, 4, 0, 0, 0], [0, 0, 0, 0, 0]])
CANVASES = jax.random.randint(jax.random.PRNGKey(1), (6, 5), 0, 17)
POSITIONS = jnp.array([[4, 0], [1, 3], [2, 3], [0, 1], [3, 2], [4, 1]])


def _take(x, positions):
    return jnp.take_along_axis(x, positions[..., None], axis=1)


def _recompute(module, canvases, tokens, positions):
    """A whole pass over canvases, then a pass over `tokens` at some of their positions."""
    cache = module.cache_prefix(module.encode(PREFIX, deterministic=True), "cached_prefix")
    whole, key_values = module.denoise(cache, canvases)
    seen = jnp.ones(canvases.shape, bool)
    some, key_values = module.denoise_at(cache, key_values, tokens, positions, seen)
    return whole, some, key_values


@pytest.mark.parametrize("network_class", NETWORKS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_recomputed_positions_have_the_same_states(network_class, config):
    network, params = make(network_class, **config)
    tokens = jnp.take_along_axis(CANVASES, POSITIONS, axis=1)
    whole, some, _ = run(
        network, params, lambda module: _recompute(module, CANVASES, tokens, POSITIONS)
    )
    np.testing.assert_allclose(some, _take(whole, POSITIONS), atol=1e-5)


@pytest.mark.parametrize(
    ("network_class", "scan_layers"), [(DecoderOnly, False), (EncoderDecoder, True)]
)
def test_recomputing_every_position_equals_a_whole_pass(network_class, scan_layers):
    network, params = make(network_class, scan_layers=scan_layers)
    other = (CANVASES + 3) % 17
    order = jnp.argsort(jax.random.uniform(jax.random.PRNGKey(2), other.shape), axis=1)

    def read(module):
        tokens = jnp.take_along_axis(other, order, axis=1)
        _, changed, *changed_key_values = _recompute(module, CANVASES, tokens, order)
        whole, same, *same_key_values = _recompute(module, other, tokens, order)
        return (changed, same, _take(whole, order)), (changed_key_values, same_key_values)

    states, key_values = run(network, params, read)
    np.testing.assert_allclose(states[0], states[2], atol=1e-5)
    np.testing.assert_allclose(states[1], states[2], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *key_values)


@pytest.mark.parametrize("network_class", NETWORKS)
def test_positions_that_have_left_the_canvas_are_not_seen(network_class):
    network, params = make(network_class)
    positions = POSITIONS % 3
    tokens = jnp.take_along_axis(CANVASES, positions, axis=1)

    def read(module):
        noise = CANVASES.at[:, 3:].set(11)
        # The first three positions are those of canvases of three; noise follows.
        short, _, key_values = _recompute(module, CANVASES[:, :3], tokens, positions)
        cache = module.cache_prefix(module.encode(PREFIX, deterministic=True), "cached_prefix")
        _, of_noise = module.denoise(cache, noise)
        key_values = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b[:, 3:]], axis=1), key_values, of_noise
        )
        seen = jnp.broadcast_to(jnp.arange(5) < 3, noise.shape)
        some, _ = module.denoise_at(cache, key_values, tokens, positions, seen)
        return short, some

    short, some = run(network, params, read)
    np.testing.assert_allclose(some, _take(short, positions), atol=1e-5)


@pytest.mark.parametrize("config", [*CONFIGS, {"start_token": True}], ids=str)
def test_an_extended_cached_prefix_equals_a_long_prefix(config):
    network, params = make(DecoderOnly, **config)
    blocks = jax.random.randint(jax.random.PRNGKey(3), (2, 3, 4), 1, 17)

    def grown(module):
        context = module.encode(PREFIX, deterministic=True)
        cache = grow(module.cache_prefix(context, "causal_prefix"), 8)
        for block in blocks:
            cache = module.extend_cached(cache, block, "causal_prefix")
        # Unused room must not be seen.
        return module.denoise(grow(cache, 3), CANVASES)[0]

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


@pytest.mark.parametrize(
    ("network_class", "pattern", "message"),
    [
        (DecoderOnly, "cached_prefix", "train with 'causal_prefix'"),
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
