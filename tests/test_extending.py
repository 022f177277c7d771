"""docs/extending.md as it stands: an objective outside the package, trained, scored and tabled."""

import importlib
import json
import pathlib
import re
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_network import FakeNetwork

from diffusion_t5x import infer, sample
from diffusion_t5x.experiments import __main__ as experiments

PAGE = pathlib.Path(__file__).parents[1] / "docs/extending.md"
TEXT = PAGE.read_text(encoding="utf-8")
KEY = jax.random.PRNGKey(0)
MASK = 4
COMMANDS = {"experiments": experiments.main, "infer": infer.main, "sample": sample.main}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with the page's files; its module is importable, as beside a typed command."""
    directory = tmp_path_factory.mktemp("mine")
    for name, content in re.findall(r"```python\n# (\S+)\n(.*?)```", TEXT, re.DOTALL):
        (directory / name).write_text(content, encoding="utf-8")
    sys.path.insert(0, str(directory))
    yield directory
    sys.path.remove(str(directory))
    sys.modules.pop("masked", None)


@pytest.fixture
def masked(place):
    return importlib.import_module("masked")


def test_the_module_is_short_and_the_page_has_it_whole(place):
    assert sorted(path.name for path in place.iterdir()) == ["masked.gin", "masked.py", "quick.gin"]
    assert len((place / "masked.py").read_text().splitlines()) < 150


def network(batch, table):
    """Every canvas token selects a row of `table [vocab, vocab - 1]`; the mask is forbidden."""
    logits = jnp.pad(jnp.asarray(table, jnp.float32), ((0, 0), (0, 1)), constant_values=-1e9)
    return FakeNetwork(batch, logits, lambda canvas: jax.nn.one_hot(canvas, MASK + 1))


def test_the_noise_is_the_mask_alone_and_its_rates_cover_the_interval(masked):
    corruption = masked.MaskCorruption(MASK)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, MASK, (500, 40)))
    rates = corruption.sample_rate(KEY, 500)
    canvas, changed = corruption.corrupt(KEY, tokens, rates)
    np.testing.assert_array_equal(canvas, jnp.where(changed, MASK, tokens))
    np.testing.assert_allclose(changed.mean(axis=1), rates, atol=0.35)
    np.testing.assert_allclose(np.sort(rates), (np.arange(500) + 0.5) / 500, atol=0.02)


def test_loss_and_bound_are_the_chain_rule_in_expectation(masked):
    # Where a prediction depends on the masked token alone, the bound is tight whatever the order of
    # unmasking: the sum over positions of log p(target | mask).
    table = np.random.default_rng(1).normal(size=(MASK + 1, MASK))
    targets = np.array([[0, 1, 2, 3, 1, 0], [3, 3, 2, 1, 0, 0]])
    log_probs = table[MASK] - np.log(np.exp(table[MASK]).sum())
    exact = log_probs[targets].sum(axis=1)
    objective = masked.MaskedDiffusion(
        masked.MaskCorruption(MASK, min_rate=1e-4), score_samples=4000
    )
    batch = jnp.asarray(targets), jnp.ones(targets.shape)
    bound = jax.jit(lambda key: objective.score(network(2, table), *batch, key))(KEY)
    np.testing.assert_allclose(bound, exact, rtol=0.05)

    @jax.jit
    def loss(key):
        return objective.loss(network(2, table), *batch, key)[0]

    losses = jax.lax.map(loss, jax.random.split(KEY, 3000))
    np.testing.assert_allclose(losses.mean(), -exact.sum(), rtol=0.05)


@pytest.mark.parametrize("num_steps", [1, 5])
def test_the_sampler_reveals_every_position_once_and_scores_what_it_drew(masked, num_steps):
    from diffusion_t5x.decoding.diffusion import DiffusionDecoder

    table = np.random.default_rng(2).normal(size=(MASK + 1, MASK))
    decoder = DiffusionDecoder(
        masked.MaskCorruption(MASK), num_steps, num_samples=300, temperature=1.0,
        update=masked.Unmask(MASK),
    )  # fmt: skip
    decode = jax.jit(lambda key: decoder.decode(network(1, table), 6, key, return_trajectory=True))
    decoded = jax.device_get(decode(KEY))
    canvases = decoded.trajectory[0]  # [samples, steps + 1, length]
    assert (canvases[:, 0] == MASK).all()
    assert (canvases[:, -1] != MASK).all()
    for before, after in zip(canvases.swapaxes(0, 1), canvases.swapaxes(0, 1)[1:], strict=False):
        np.testing.assert_array_equal(after[before != MASK], before[before != MASK])
    left = (canvases[:, :-1] == MASK).mean(axis=(0, 2))
    np.testing.assert_allclose(left, 1 - np.arange(num_steps) / num_steps, atol=0.05)
    log_probs = table[MASK] - np.log(np.exp(table[MASK]).sum())
    np.testing.assert_allclose(decoded.scores[0], log_probs[decoded.tokens[0]].sum(-1), rtol=1e-4)
    frequency = np.bincount(decoded.tokens.ravel(), minlength=MASK) / decoded.tokens.size
    np.testing.assert_allclose(frequency, np.exp(log_probs), atol=0.04)


@pytest.mark.slow  # a minute and more: the tests above hold the page's code, others its commands
def test_the_pages_commands_train_score_sample_and_table_it_beside_diffusion(
    place, monkeypatch, capsys
):
    monkeypatch.chdir(place)
    commands = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    assert len(commands) == 3
    for command in commands:
        python, _, module, *arguments = shlex.split(command.replace("\\\n", " "))
        assert python == "python"
        COMMANDS[module.removeprefix("diffusion_t5x.")](arguments)
    printed = capsys.readouterr().out
    assert "<extra_id_31>" in printed  # a masked position of a canvas
    results = json.loads(next(place.glob("runs/*/results.json")).read_text())
    by_method = {row["name"]: row for row in results["rows"]}
    assert by_method.keys() == {"diffusion", "masked"}
    for row in by_method.values():
        assert 0 <= row["metrics"]["exact_match"] <= 1
    [file] = place.glob("runs/scores/embedded*score.jsonl-*")
    scores = [json.loads(line)["score"] for line in file.read_text().splitlines()]
    # About 24 positions of 767 tokens: a model of a few steps is not much worse than chance.
    assert all(-24 * np.log(767) * 1.5 < score < 0 for score in scores)
