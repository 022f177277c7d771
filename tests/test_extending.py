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
from fake_network import table_network

from diffusion_t5x import infer, sample
from diffusion_t5x.decoding.diffusion import DiffusionDecoder
from diffusion_t5x.experiments import __main__ as experiments

PAGE = pathlib.Path(__file__).parents[1] / "docs/extending.md"
TEXT = PAGE.read_text(encoding="utf-8")
KEY = jax.random.PRNGKey(0)
VOCAB = 4
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
    sys.modules.pop("tail", None)


@pytest.fixture
def tail(place):
    return importlib.import_module("tail")


def test_the_module_is_short_and_the_page_has_it_whole(place):
    assert sorted(path.name for path in place.iterdir()) == ["quick.gin", "tail.gin", "tail.py"]
    assert len((place / "tail.py").read_text().splitlines()) < 150


def network(batch, table):
    """Every canvas token selects a row of `table [vocab, vocab]`."""
    return table_network(jnp.asarray(table, jnp.float32), batch)


def test_the_noise_is_the_tail_alone_and_all_at_the_end_of_time(tail):
    noise = tail.TailCorruption(VOCAB)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (500, 40)))
    times = noise.sample_times(KEY, 500, 40)
    canvas, changed = noise.corrupt(KEY, tokens, times)
    assert (changed | (canvas == tokens)).all()
    assert (np.diff(np.asarray(changed, int), axis=1) >= 0).all()
    np.testing.assert_allclose(changed.mean(axis=1), times[:, 0], atol=1 / 40)
    assert noise.corrupt(KEY, tokens, jnp.ones((500, 1)))[1].all()
    earlier = noise.posterior(KEY, canvas, tokens, times, times / 2)
    assert (earlier == jnp.where(noise.corrupt(KEY, tokens, times / 2)[1], canvas, tokens)).all()


def test_loss_and_bound_are_what_noise_says_of_each_token_in_expectation(tail):
    # Where a prediction depends on the noise at its place alone, the bound is the sum over
    # positions of the mean of log p(target | noise).
    table = np.random.default_rng(1).normal(size=(VOCAB, VOCAB))
    targets = np.array([[0, 1, 2, 3, 1, 0], [3, 3, 2, 1, 0, 0]])
    log_probs = table - np.log(np.exp(table).sum(-1, keepdims=True))
    each = log_probs.mean(axis=0)[targets]
    noise = tail.TailCorruption(VOCAB)
    batch = jnp.asarray(targets), jnp.ones(targets.shape)
    objective = tail.TailDenoising(noise, num_parts=4, score_draws=4000)
    bound, error = jax.jit(lambda key: objective.score(network(2, table), *batch, key))(KEY)
    np.testing.assert_array_less(np.abs(bound - each.sum(axis=1)), 4 * error)
    assert (error < 0.1).all()

    @jax.jit
    def loss(key):
        return objective.loss(network(2, table), *batch, key)[0]

    losses = jax.lax.map(loss, jax.random.split(KEY, 3000))
    share = (np.arange(6) + 1) / 6  # of times at which a position is noise
    np.testing.assert_allclose(losses.mean(), -(each * share).sum(), rtol=0.05)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_sampler_writes_every_position_once_and_scores_what_it_drew(tail, num_steps):
    table = np.random.default_rng(2).normal(size=(VOCAB, VOCAB))
    decoder = DiffusionDecoder(
        tail.TailCorruption(VOCAB), num_steps, num_samples=300, temperature=1.0,
        update=tail.PartByPart(),
    )  # fmt: skip
    decode = jax.jit(lambda key: decoder.decode(network(1, table), 6, key, return_trajectory=True))
    decoded = jax.device_get(decode(KEY))
    canvases = decoded.trajectory[0]  # [samples, steps + 1, length]
    log_probs = table - np.log(np.exp(table).sum(-1, keepdims=True))
    scores = np.zeros(300)
    for step in range(num_steps):
        begin, end = 6 * step // num_steps, 6 * (step + 1) // num_steps
        before, after = canvases[:, step], canvases[:, step + 1]
        np.testing.assert_array_equal(after[:, :begin], before[:, :begin])
        scores += log_probs[before[:, begin:end], after[:, begin:end]].sum(axis=1)
    np.testing.assert_allclose(decoded.scores[0], scores, rtol=1e-4)


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
    assert "in 5 minutes" in capsys.readouterr().out
    results = json.loads(next(place.glob("runs/*/results.json")).read_text())
    by_method = {row["name"]: row for row in results["rows"]}
    assert by_method.keys() == {"diffusion", "tail"}
    for row in by_method.values():
        assert 0 <= row["metrics"]["exact_match"] <= 1
    [file] = place.glob("runs/scores/embedded*score.jsonl-*")
    scores = [json.loads(line)["score"] for line in file.read_text().splitlines()]
    # About 24 positions of 768 tokens: a model of a few steps is not much worse than chance.
    assert all(-24 * np.log(768) * 1.5 < score < 0 for score in scores)
