"""All blocks of a text in one pass, against each block after a prefix that ends before it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import QUICK, make

from diffusion_t5x.networks import bound_network
from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.objectives import StepUnrolledDenoising
from diffusion_t5x.objectives.attention_patterns import make_block_mask
from diffusion_t5x.objectives.corruption import UniformCorruption

KEY = jax.random.PRNGKey(0)
PREFIX = np.array([[5, 6, 7, 8, 9], [3, 4, 0, 0, 0], [0, 0, 0, 0, 0]])
# Of blocks of 3: two are used, three, one.
TARGET = jnp.array([[2, 3, 4, 1, 0, 0, 0, 0], [9, 8, 7, 6, 5, 4, 3, 1], [7, 1, 0, 0, 0, 0, 0, 0]])
FAMILY = {
    "num_layers": 2, "positions": "rotary", "sliding_window": 4, "sliding_period": 2,
    "num_kv_heads": 1, "scan_layers": True,
}  # fmt: skip
LEARNED = {"positions": "learned", "max_positions": 20, "norm": "layer"}


@dataclasses.dataclass(frozen=True)
class Fixed(UniformCorruption):
    """Noise that depends on tokens and times alone, so that it is that of a block in any pass."""

    def sample_times(self, rng, batch_size, length):
        return jnp.full((batch_size, 1), 0.5)

    def corrupt(self, rng, tokens, times):
        return (tokens * 5 + 3) % 17, jnp.ones(tokens.shape, bool)


@pytest.mark.parametrize(
    ("config", "shift"),
    [
        pytest.param(FAMILY, True, marks=pytest.mark.slow),
        ({"start_token": True}, False),
        pytest.param(LEARNED, True, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradient_are_the_sum_over_blocks_each_after_its_own_prefix(config, shift):
    network, params = make(DecoderOnly, **config)
    together = StepUnrolledDenoising(
        Fixed(17), attention_pattern="causal_prefix", block_length=3, all_blocks=True, shift=shift
    )
    alone = dataclasses.replace(together, block_length=0, all_blocks=False)
    weights = together.token_weights(TARGET, jnp.ones(TARGET.shape))

    def bound(params):
        batch = {"encoder_input_tokens": PREFIX, "decoder_input_tokens": TARGET}
        return bound_network.bind(network, params, batch, "causal_prefix", shift=shift)

    def one_pass(params):
        return together.loss(bound(params), TARGET, weights, KEY)[:2]

    def block_by_block(params):
        def loss(number):
            block = jnp.full(3, number)
            taken = together._take_block(bound(params), TARGET, weights, block)
            return jnp.array(alone.loss(*taken, KEY)[:2])

        return tuple(jnp.sum(jax.lax.map(loss, jnp.arange(3)), axis=0))

    results = [
        jax.jit(jax.value_and_grad(f, has_aux=True), compiler_options=QUICK)(params)
        for f in (one_pass, block_by_block)
    ]
    assert results[0][0][1] == 6 + 8 + 3  # the used blocks alone, and none beyond the text
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-4, atol=3e-4), *results)


def test_the_mask_is_that_of_the_block_diffusion_paper():
    # Section 3.1: queries and keys are [noisy; clean]; M_BD, M_OBC and M_BC.
    length, size = 12, 3
    block = np.tile(np.arange(length) // size, 2)
    noisy = np.arange(2 * length) < length
    q, k = block[:, None], block[None]
    block_diagonal = (q == k) & (noisy[:, None] == noisy)
    offset_block_causal = (q > k) & noisy[:, None] & ~noisy
    block_causal = (q >= k) & ~noisy[:, None] & ~noisy
    paper = block_diagonal | offset_block_causal | block_causal
    # The last block of the clean text is seen by no noisy one, so ours leaves it out.
    clean = paper[:length, length : 2 * length - size]
    assert not paper[:length, 2 * length - size :].any()
    # Five tokens of a prefix before, which all blocks see.
    ours = make_block_mask(jnp.int32(5), jnp.arange(5 + length - size), length, size)
    np.testing.assert_array_equal(ours[:, :5], True)
    np.testing.assert_array_equal(ours[:, 5:], np.hstack([clean, paper[:length, :length]]))


def test_each_block_has_a_noise_level_of_its_own():
    seen = {}

    class Recorded(Fixed):
        def sample_times(self, rng, batch_size, length):
            seen["asked"] = batch_size, length
            return jnp.arange(batch_size)[:, None] / batch_size

        def corrupt(self, rng, tokens, times):
            seen["times"] = times
            raise InterruptedError

    objective = StepUnrolledDenoising(
        Recorded(17), attention_pattern="causal_prefix", block_length=3, all_blocks=True
    )
    network = type("Network", (), {"self_conditioning": False, "cache_blocks": lambda *_: None})()
    with pytest.raises(InterruptedError):
        objective.loss(network, TARGET, jnp.ones(TARGET.shape), KEY)
    assert seen["asked"] == (9, 3)
    np.testing.assert_allclose(seen["times"], np.arange(9).repeat(3).reshape(3, 9) / 9)


def test_all_blocks_need_a_block_length():
    with pytest.raises(ValueError, match="all_blocks = True needs a block_length"):
        StepUnrolledDenoising(UniformCorruption(17), all_blocks=True)
