"""One reading of the prefix for all passes of a training step, against a reading in each pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import QUICK, make

from diffusion_t5x.networks import bound_network
from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.networks.encoder_decoder import EncoderDecoder
from diffusion_t5x.objectives import StepUnrolledDenoising
from diffusion_t5x.objectives.attention_patterns import Opening
from diffusion_t5x.objectives.corruption import UniformCorruption

KEY = jax.random.PRNGKey(0)
PREFIX = np.array([[5, 6, 7, 8, 9], [3, 4, 0, 0, 0], [0, 0, 0, 0, 0]])
TARGET = jnp.array([[2, 3, 4, 1, 0, 0], [9, 8, 1, 0, 0, 0], [7, 1, 0, 0, 0, 0]])
FAMILY = {
    "num_layers": 2, "positions": "rotary", "sliding_window": 4, "sliding_period": 2,
    "num_kv_heads": 1, "scan_layers": True, "remat": "dots",
}  # fmt: skip
LEARNED = {"positions": "learned", "max_positions": 20, "norm": "layer", "qkv_bias": True}


def loss_and_gradient(network, params, pattern, shared, dropout=False, opening=None, **fields):
    """Those of a step, with one reading of the prefix for all passes or with one in each."""
    objective = StepUnrolledDenoising(UniformCorruption(17), attention_pattern=pattern, **fields)

    def loss(params):
        batch = {"encoder_input_tokens": PREFIX, "decoder_input_tokens": TARGET}
        bound = bound_network.bind(
            network, params, batch, pattern, shift=objective.shift, opening=opening,
            deterministic=not dropout, rng=KEY,
        )  # fmt: skip
        if not shared:
            bound = _Unshared(**vars(bound))
        return objective.loss(bound, TARGET, jnp.ones(TARGET.shape), KEY)[0]

    return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)


class _Unshared(bound_network.BoundNetwork):
    caches_prefix = False


@pytest.mark.parametrize(
    ("network_class", "config", "pattern", "settings"),
    [
        (DecoderOnly, FAMILY, "causal_prefix",
         {"opening": Opening(jnp.float32(0.5), KEY), "shift": True}),
        pytest.param(DecoderOnly, {"start_token": True}, "cached_prefix", {},
                     marks=pytest.mark.slow),
        pytest.param(DecoderOnly, LEARNED, "cached_prefix", {"num_unrolls": 2},
                     marks=pytest.mark.slow),
        pytest.param(EncoderDecoder, {"scan_layers": True, "relative_bias_per_layer": True},
                     "cached_prefix", {"opening": Opening(jnp.float32(0.5), KEY)},
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_loss_and_gradient_are_those_of_a_reading_in_each_pass(
    network_class, config, pattern, settings
):
    network, params = make(network_class, **config)
    results = [
        loss_and_gradient(network, params, pattern, shared, **settings) for shared in (True, False)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), *results)
