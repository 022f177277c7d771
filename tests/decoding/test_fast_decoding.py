"""What makes decoding cheaper, against the plain sampler and naive loops, and what it costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_network import perfect_network, table_network

from diffusion_t5x.decoding.diffusion import DiffusionDecoder
from diffusion_t5x.decoding.stopping import ScoreSettled, StableAndConfident, Unchanged
from diffusion_t5x.decoding.updates import ArgmaxUnrolled, EntropyBound, ResampleShare
from diffusion_t5x.objectives.corruption import UniformCorruption

VOCAB, BATCH, LENGTH = 7, 2, 6
KEY = jax.random.PRNGKey(3)
# Token t becomes t - 1, and 0 stays: every canvas is all padding after at most VOCAB - 1 steps.
COUNTDOWN = 5 * jnp.eye(VOCAB)[jnp.array([0, *range(VOCAB - 1)])]


def _decoder(**kwargs):
    return DiffusionDecoder(UniformCorruption(VOCAB), **{"temperature": 0.0, **kwargs})


def _random_table(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)), jnp.float32)


def _log_probs(table):
    table = np.asarray(table, np.float64)
    return table - np.log(np.exp(table).sum(-1, keepdims=True))


def test_stopping_when_nothing_changes_gives_what_all_steps_give_for_fewer_passes():
    plain = _decoder(num_steps=20, num_samples=3)
    network = table_network(COUNTDOWN, BATCH)
    whole = plain.decode(network, LENGTH, KEY, return_trajectory=True)
    early = dataclasses.replace(plain, stop=Unchanged()).decode(
        network, LENGTH, KEY, return_trajectory=True
    )
    np.testing.assert_array_equal(early.tokens, whole.tokens)
    np.testing.assert_allclose(early.scores, whole.scores, rtol=1e-6)
    np.testing.assert_array_equal(early.trajectory, whole.trajectory)
    # The largest first token counts down to 0, and one more pass sees that 0 stays.
    passes = int(whole.trajectory[:, :, 0].max()) + 1
    np.testing.assert_array_equal(whole.positions, [20 * 3 * LENGTH] * BATCH)
    np.testing.assert_array_equal(early.positions, [passes * 3 * LENGTH] * BATCH)


def test_a_settled_canvas_stays_as_it_is_while_others_go_on():
    # Token 1 stays at odds of 6 to 4, the others go round.
    table = np.full((VOCAB, VOCAB), -9.0)
    table[1] = np.log(0.4 / (VOCAB - 1))
    table[1, 1] = np.log(0.6)
    for token, following in {0: 2, 2: 3, 3: 4, 4: 5, 5: 6, 6: 0}.items():
        table[token, following] = 9.0
    network = table_network(jnp.asarray(table, jnp.float32), 4)
    plain = _decoder(num_steps=6, num_samples=16, temperature=1.0)
    settled = dataclasses.replace(plain, stop=Unchanged())
    decoded = [d.decode(network, 1, KEY, return_trajectory=True) for d in (plain, settled)]
    free, kept = (np.asarray(d.trajectory)[..., 0] for d in decoded)
    assert ((free[..., 0] == 1) & (free[..., 1:] != 1).any(-1)).any()
    ones = kept[..., 0] == 1
    assert 0 < ones.sum() < ones.size
    assert (kept[ones] == 1).all()
    assert (kept[~ones][:, 0] != kept[~ones][:, 1]).all()
    np.testing.assert_allclose(np.asarray(decoded[1].scores)[ones], np.log(0.6), rtol=1e-5)
    assert int(decoded[1].positions[0]) == 6 * 16


def test_halving_drops_what_a_naive_loop_drops_and_keeps_the_others_whole():
    table = _random_table(1)
    plain = _decoder(num_steps=5, num_samples=8)
    network = table_network(table, BATCH)
    canvases = np.asarray(plain.decode(network, LENGTH, KEY, return_trajectory=True).trajectory)
    decoded = dataclasses.replace(plain, halve_every=2).decode(
        network, LENGTH, KEY, return_trajectory=True
    )
    certainty = _log_probs(table).max(-1)
    for row in range(BATCH):
        left, expected = list(range(8)), []
        for step in range(1, 6):
            if step in (2, 4):
                left.sort(key=lambda i: certainty[canvases[row, i, step - 1]].sum())
                half = len(left) // 2
                expected += [(i, step) for i in left[:half]]
                left = left[half:]
        expected += [(i, 5) for i in left]
        naive = []
        for i, step in expected:
            read = canvases[row, i, step - 1]
            naive.append((_log_probs(table)[read, read].sum(), tuple(canvases[row, i, step])))
        naive.sort()
        np.testing.assert_allclose(decoded.scores[row], [score for score, _ in naive], rtol=1e-5)
        np.testing.assert_array_equal(decoded.tokens[row], [tokens for _, tokens in naive])
    np.testing.assert_array_equal(decoded.trajectory[:, :, -1], decoded.tokens)
    np.testing.assert_array_equal(decoded.positions, [(8 * 2 + 4 * 2 + 2) * LENGTH] * 2)


def test_halving_goes_down_to_one_canvas_whatever_the_number_it_starts_from():
    assert _decoder(num_samples=7, num_steps=9, halve_every=2)._stages() == [
        (7, 2),
        (4, 4),
        (2, 6),
        (1, 9),
    ]
    assert _decoder(num_samples=8, num_steps=4, halve_every=4)._stages() == [(8, 4)]


@pytest.mark.parametrize("trim_multiple", [4, 50])
def test_trimming_changes_nothing_where_positions_do_not_see_each_other(trim_multiple):
    plain = _decoder(num_steps=7, num_samples=2)
    network = table_network(COUNTDOWN, BATCH)
    whole = plain.decode(network, LENGTH, KEY, return_trajectory=True)
    trimmed = dataclasses.replace(plain, trim_multiple=trim_multiple).decode(
        network, LENGTH, KEY, return_trajectory=True
    )
    np.testing.assert_array_equal(trimmed.trajectory, whole.trajectory)
    np.testing.assert_allclose(trimmed.scores, whole.scores, rtol=1e-6)
    # Naively: a step reads as many positions as the step before left text in, over all canvases.
    canvases = np.asarray(whole.trajectory).reshape(-1, 8, LENGTH)
    used, cost = LENGTH, 0
    for step in range(7):
        cost += 2 * min(LENGTH, -(-used // trim_multiple) * trim_multiple)
        text = (canvases[:, step] != 0) | (canvases[:, step + 1] != 0)
        used = max(1, max((np.flatnonzero(row)[-1] + 1 for row in text if row.any()), default=1))
    np.testing.assert_array_equal(trimmed.positions, [cost] * BATCH)
    assert (cost < 7 * 2 * LENGTH) == (trim_multiple < LENGTH)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("update", "stop"),
    [
        (ArgmaxUnrolled(0.5), Unchanged()),
        (ResampleShare(0.5), ScoreSettled(0.01)),
        (EntropyBound(0.1), StableAndConfident()),
    ],
)
def test_settings_together_decode_a_perfect_network_perfectly(update, stop):
    targets = jnp.array([[1, 2, 3, 0, 0, 0], [4, 5, 6, 6, 2, 1]])
    decoded = _decoder(
        num_steps=25, num_samples=4, temperature=0.8, final_temperature=0.4, update=update,
        stop=stop, halve_every=15, trim_multiple=3,
    ).decode(perfect_network(targets, VOCAB), LENGTH, KEY, return_trajectory=True)  # fmt: skip
    np.testing.assert_array_equal(decoded.tokens[:, -1], targets)
    np.testing.assert_array_equal(decoded.trajectory[:, :, -1], decoded.tokens)
    assert (np.diff(np.asarray(decoded.scores), axis=1) >= 0).all()


def test_the_temperature_falls_linearly_to_the_last_step():
    decoder = _decoder(num_steps=5, temperature=0.8, final_temperature=0.4)
    values = [float(decoder._temperature(jnp.int32(step))) for step in range(5)]
    np.testing.assert_allclose(values, [0.8, 0.7, 0.6, 0.5, 0.4], rtol=1e-6)


def test_renoised_canvases_are_scored_by_what_they_would_become():
    table = _random_table(2)
    decoded = _decoder(
        num_steps=3, num_samples=4, temperature=1.0, update=EntropyBound(0.0)
    ).decode(table_network(table, BATCH), LENGTH, KEY, return_trajectory=True)
    read = np.asarray(decoded.trajectory)[:, :, -2]
    np.testing.assert_array_equal(decoded.tokens, np.asarray(table).argmax(-1)[read])
    np.testing.assert_allclose(decoded.scores, _log_probs(table).max(-1)[read].sum(-1), rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"halve_every": -1}, "halve_every = -1"),
        ({"trim_multiple": -2}, "trim_multiple = -2"),
        ({"temperature": 0.0, "final_temperature": 0.4}, "final_temperature = 0.4"),
        ({"stop": "unchanged"}, r"stop = 'unchanged'; expected a rule of .*stopping"),
        ({"update": None}, r"update = None; expected a rule of .*updates"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        _decoder(**settings)
