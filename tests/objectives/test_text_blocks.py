"""Texts cut into blocks, and the objective that trains on one block of each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from fake_network import table_network

from diffusion_t5x.models import Model
from diffusion_t5x.objectives.corruption import UniformCorruption
from diffusion_t5x.objectives.denoising import StepUnrolledDenoising
from diffusion_t5x.objectives.text_blocks import count_blocks, count_used_blocks, take_block

VOCAB = 9
# Of blocks of 3: all three are used, one (the text fills it), one (no text at all), two.
TARGETS = jnp.array(
    [
        [3, 4, 5, 6, 7, 8, 1, 0],
        [5, 6, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [2, 0, 4, 1, 0, 0, 0, 0],
    ]
)
USED = [3, 1, 1, 2]


def test_a_text_has_the_blocks_up_to_its_last_token():
    np.testing.assert_array_equal(count_used_blocks(TARGETS, 3), USED)
    assert [count_blocks(length, 3) for length in (1, 3, 4, 8, 9)] == [1, 1, 2, 3, 3]


def test_blocks_are_consecutive_and_the_last_is_padded():
    blocks = [take_block(TARGETS, jnp.array([i, 0, 2, 1]), 3) for i in range(3)]
    np.testing.assert_array_equal([b[0] for b in blocks], [[3, 4, 5], [6, 7, 8], [1, 0, 0]])
    np.testing.assert_array_equal(blocks[0][1:], [[5, 6, 1], [0, 0, 0], [1, 0, 0]])


def _objective(**kwargs):
    return StepUnrolledDenoising(
        UniformCorruption(VOCAB), attention_pattern="causal_prefix", block_length=3, **kwargs
    )


def test_blocks_that_no_decoder_writes_have_no_weight():
    weights = _objective(padding_weight=0.5).token_weights(TARGETS, jnp.ones(TARGETS.shape))
    np.testing.assert_array_equal(
        weights,
        [
            [1, 1, 1, 1, 1, 1, 1, 0.5],
            [1, 1, 1, 0, 0, 0, 0, 0],
            [0.5, 0.5, 0.5, 0, 0, 0, 0, 0],
            [1, 0.5, 1, 1, 0.5, 0.5, 0, 0],
        ],
    )


def test_the_loss_is_that_of_a_random_used_block_after_the_tokens_before_it():
    table = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32)
    objective = _objective(num_unrolls=0)
    weights = objective.token_weights(TARGETS, jnp.ones(TARGETS.shape))

    @jax.jit
    def run(rng):
        seen = {}
        network = table_network(jnp.asarray(table), 4, lambda canvas, _: seen.update(canvas=canvas))

        def extend(tokens, counts):
            seen.update(tokens=tokens, counts=counts)
            return network

        network.__dict__["extend_prefix"] = extend  # the dataclass is frozen
        return objective.loss(network, TARGETS, weights, rng)[:2], seen

    drawn = set()
    for seed in range(40):
        (loss, weight_sum), seen = run(jax.random.PRNGKey(seed))
        counts = np.asarray(seen["counts"])
        drawn.add(tuple(counts))
        np.testing.assert_array_equal(seen["tokens"], TARGETS[:, :6])
        total = total_weight = 0.0
        for row, start in enumerate(counts):
            target = np.pad(TARGETS[row], (0, 1))[start : start + 3]
            weight = USED[row] * np.pad(weights[row], (0, 1))[start : start + 3]
            logits = table.astype(np.float64)[np.asarray(seen["canvas"][row])]
            log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            total -= (log_probs[np.arange(3), target] * weight).sum()
            total_weight += weight.sum()
        assert loss == pytest.approx(total, rel=1e-5)
        assert weight_sum == pytest.approx(total_weight)
    assert drawn == {(3 * i, 0, 0, 3 * j) for i in range(3) for j in range(2)}


class _Sevens(UniformCorruption):
    """Noise that is not random."""

    def prior(self, rng, shape):
        return jnp.full(shape, 7, jnp.int32)


def _model(**config):
    plain = toy.model(**config)
    objective = StepUnrolledDenoising(
        _Sevens(toy.VOCABULARY.vocab_size), attention_pattern="causal_prefix", block_length=3
    )
    decoder = dataclasses.replace(plain.decoder, prefix_cache=True, block_length=3)
    return Model(plain.module, objective, decoder, toy.VOCABULARY, None), plain


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, {"start_token": True}], ids=str)
def test_the_score_of_a_text_is_that_of_its_blocks_each_after_a_prefix_written_out(config):
    model, plain = _model(**config)
    whole = Model(
        plain.module,
        dataclasses.replace(model.objective, block_length=0),
        plain.decoder,
        toy.VOCABULARY,
        None,
    )
    prefix = np.array([[5, 6, 7, 8], [3, 4, 0, 0], [9, 0, 0, 0], [6, 6, 6, 0]])
    targets = np.asarray(TARGETS)
    batch = {"encoder_input_tokens": prefix, "decoder_target_tokens": targets}
    # One position of a block has one order: with noise that is not random, scores are exact.
    weights = (np.arange(targets.shape[1]) % 3 == np.arange(4)[:, None] % 3).astype(float)
    batch["decoder_loss_weights"] = weights
    batch["decoder_input_tokens"] = targets
    shapes = {"encoder_input_tokens": (4, 4), "decoder_input_tokens": targets.shape}
    params = jax.jit(lambda: model.get_initial_variables(jax.random.PRNGKey(0), shapes))()["params"]
    scores = jax.jit(model.score_batch)(params, batch)

    def naive(row, block):
        text = [*prefix[row][prefix[row] > 0], *targets[row][: 3 * block]]
        text = np.pad(text, (0, 10 - len(text)))
        canvas = np.pad(targets[row], (0, 1))[3 * block : 3 * block + 3]
        return text, canvas, np.pad(weights[row], (0, 1))[3 * block : 3 * block + 3]

    rows = [(row, block) for row in range(4) for block in range(USED[row])]
    texts, canvases, counted = map(np.array, zip(*(naive(*pair) for pair in rows), strict=True))
    of_blocks = jax.jit(whole.score_batch)(
        params,
        {
            "encoder_input_tokens": texts,
            "decoder_target_tokens": canvases,
            "decoder_loss_weights": counted,
        },
    )
    expected = [
        sum(s for (r, _), s in zip(rows, of_blocks, strict=True) if r == row) for row in range(4)
    ]
    np.testing.assert_allclose(scores, expected, rtol=1e-4)


def test_blocks_need_a_prefix_that_may_grow():
    with pytest.raises(ValueError, match="blocks need 'causal_prefix'"):
        StepUnrolledDenoising(UniformCorruption(VOCAB), block_length=3)
    with pytest.raises(ValueError, match="block_length = -1; expected a value >= 0"):
        dataclasses.replace(_objective(), block_length=-1)


def test_an_encoder_decoder_network_cannot_train_on_blocks():
    plain = toy.model(architecture="encoder_decoder")
    objective = dataclasses.replace(
        plain.objective, attention_pattern="causal_prefix", block_length=3
    )
    decoder = dataclasses.replace(plain.decoder, prefix_cache=True, block_length=3)
    model = Model(plain.module, objective, decoder, toy.VOCABULARY, None)
    shapes = {name: (4, 8) for name in ("encoder_input_tokens", "decoder_input_tokens")}
    params = jax.eval_shape(lambda: model.get_initial_variables(jax.random.PRNGKey(0), shapes))
    batch = {"encoder_input_tokens": TARGETS, "decoder_target_tokens": TARGETS}
    with pytest.raises(ValueError, match="block_length needs a decoder-only network"):
        jax.eval_shape(model.loss_fn, params["params"], batch, jax.random.PRNGKey(0))


def test_objective_and_decoder_cut_texts_alike():
    model, plain = _model()
    decoder = dataclasses.replace(model.decoder, block_length=4)
    with pytest.raises(ValueError, match=r"block_length = 4, but the model is trained with.* 3"):
        Model(plain.module, model.objective, decoder, toy.VOCABULARY, None)
