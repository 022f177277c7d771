"""Bits per token and perplexity: of given likelihoods, of a task, and in score files."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from diffusion_t5x.checkpointing.checkpoints import RestoreCheckpointConfig
from diffusion_t5x.evaluation import evaluation, inference, likelihoods
from diffusion_t5x.evaluation.likelihoods import Likelihood
from diffusion_t5x.runtime.partitioning import PjitPartitioner


def test_every_token_weighs_the_same_and_errors_add_as_squares():
    found = likelihoods.summarize([Likelihood(-2.0, 0.3, 1), Likelihood(-4.0, 0.4, 3)])
    assert found == pytest.approx(
        {
            "perplexity": math.exp(1.5),
            "perplexity_error": math.exp(1.5) * 0.125,
            "bits_per_token": 1.5 / math.log(2),
            "bits_per_token_error": 0.125 / math.log(2),
            "nats_per_text": 3.0,
            "nats_per_text_error": 0.25,
        }
    )
    assert found.keys() == set(likelihoods.LIKELIHOOD_KEYS)
    assert likelihoods.summarize([Likelihood(-1e6, 0.0, 1)])["perplexity"] == math.inf
    assert likelihoods.summarize([Likelihood(0.0, 0.0, 0)]) == {}
    assert "no token to score in 0 texts" in likelihoods.describe("x", [])
    line = json.dumps(likelihoods.fields(Likelihood(-3.0, 0.0, 2)))
    assert json.loads(line)["bits_per_token"] == pytest.approx(1.5 / math.log(2))
    assert likelihoods.of_line(line) == (-3.0, 0.0, 2)


def _params(model):
    shapes = {"encoder_input_tokens": (2, 6), "decoder_input_tokens": (2, 6)}
    return jax.jit(lambda: model.get_initial_variables(jax.random.PRNGKey(0), shapes)["params"])()


@pytest.fixture(scope="module")
def plain():
    """A task without metrics."""
    return toy.register_with("toy_without_metrics")


@pytest.mark.parametrize(
    "objective", ["autoregressive", pytest.param("diffusion", marks=pytest.mark.slow)]
)
def test_a_task_without_metrics_has_a_perplexity_and_infer_agrees(
    objective, plain, tmp_path, monkeypatch, capsys
):
    model = toy.model(objective)
    params = _params(model)
    cfg = toy.dataset_cfg("validation", batch_size=4, mixture_or_task_name=plain)
    evaluator = evaluation.InferenceEvaluator(
        model, cfg, PjitPartitioner(), str(tmp_path), likelihood=True
    )
    found = evaluator.evaluate(params, 1)[plain]
    assert found["examples"] == 11
    assert (found["bits_per_token_error"] > 0) == (objective == "diffusion")
    monkeypatch.setattr(inference, "select_checkpoints", lambda cfg: [(1, "checkpoint_1")])
    monkeypatch.setattr(inference, "restorer", lambda *args: lambda path: params)
    monkeypatch.setattr(inference.integrity, "save_number", lambda path: None)
    [file] = inference.infer(
        model=model,
        dataset_cfg=cfg,
        restore_checkpoint_cfg=RestoreCheckpointConfig("run"),
        partitioner=PjitPartitioner(),
        output_dir=str(tmp_path / "scores"),
        mode="score",
    )
    with open(file, encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    assert [record["tokens"] for record in records] == [5] * 11  # 'v000' and its end
    bits = -sum(record["score"] for record in records) / (11 * 5) / math.log(2)
    assert found["bits_per_token"] == pytest.approx(bits, rel=1e-5)
    assert "11 texts, 55 tokens" in capsys.readouterr().out
    if objective == "autoregressive":
        texts = [toy.VOCABULARY.encode(f"v{number:03}") for number in range(11)]
        tokens = jnp.asarray([[*text, 1] for text in texts])
        batch = {"encoder_input_tokens": jnp.asarray(texts), "decoder_input_tokens": tokens}

        @jax.jit
        def read(params):
            network = model.bind(params, batch)
            return network.logits(network.forward(tokens, None))

        logits = np.asarray(read(params), np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        exact = np.take_along_axis(log_probs, np.asarray(tokens)[..., None], -1).sum()
        assert found["perplexity"] == pytest.approx(math.exp(-exact / 55), rel=1e-4)
        assert found["nats_per_text"] == pytest.approx(-exact / 11, rel=1e-4)


def test_what_has_no_targets_or_no_lengths_cannot_be_scored(plain, tmp_path):
    cfg = toy.dataset_cfg("validation", mixture_or_task_name=plain, task_feature_lengths=None)
    with pytest.raises(ValueError, match="has no metrics, and its likelihood needs the lengths"):
        evaluation.InferenceEvaluator(
            toy.model(), cfg, PjitPartitioner(), str(tmp_path), likelihood=True
        )


def perplexity(targets, predictions):
    return {"perplexity": 1.0}


def test_a_metric_with_the_key_of_the_likelihood_is_refused(tmp_path):
    name = toy.register_with("toy_perplexity", perplexity)
    cfg = toy.dataset_cfg("validation", mixture_or_task_name=name)
    with pytest.raises(ValueError, match="'likelihood = True' and perplexity both give"):
        evaluation.InferenceEvaluator(
            toy.model(), cfg, PjitPartitioner(), str(tmp_path), likelihood=True
        )
