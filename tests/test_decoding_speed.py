"""Timing of decoding."""

import json

import jax
import jax.numpy as jnp
import pytest
import toy

from diffusion_t5x import speed
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding_speed import measure
from diffusion_t5x.evaluation.compiled_model import Predictor
from diffusion_t5x.experiments import __main__ as experiments
from diffusion_t5x.runtime.partitioning import PjitPartitioner

LENGTHS = {"inputs": 6, "targets": 4}


def _measure(tmp_path, **kwargs):
    return measure(
        model=toy.model(),
        partitioner=PjitPartitioner(),
        task_feature_lengths=LENGTHS,
        batch_size=2,
        output_dir=str(tmp_path),
        **kwargs,
    )


def test_the_median_of_the_decodings_after_the_first_is_written(tmp_path, monkeypatch):
    seconds = iter([100.0, 4.0, 1.0, 2.0])
    calls = []

    def decode(self, mode, params, batch, index):
        calls.append((index, batch["encoder_input_tokens"].shape, batch["decoder_input_tokens"]))
        self.seconds += next(seconds)

    monkeypatch.setattr(Predictor, "__call__", decode)
    results = _measure(tmp_path)
    assert results["seconds"] == 2.0
    assert results["seconds_per_token"] == 0.25
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert [index for index, *_ in calls] == [0, 1, 2, 3]
    assert {shape for _, shape, _ in calls} == {(2, 6)}


def test_a_real_decoding_takes_some_time(tmp_path):
    assert 0.0 < _measure(tmp_path, repeats=1)["seconds"] < 60.0


def test_an_ar_model_decodes_every_text_to_its_full_length_as_figure_3_asks(tmp_path, monkeypatch):
    [stage, *_] = experiments.Run("figure3", "embedded", tmp_path).stages
    steps = []

    def sample(self, rng, logits):
        jax.debug.callback(steps.append, rng)
        return jnp.ones(len(logits), jnp.int32)  # what ends a text elsewhere

    monkeypatch.setattr(AutoregressiveDecoder, "sample", sample)
    speed.main(
        [
            *stage.argv(tmp_path),
            "--gin.TASK_FEATURE_LENGTHS={'inputs': 4, 'targets': 5}",
            "--gin.REPEATS=1",
        ]
    )
    assert len(steps) == 2 * 5


def test_a_dry_run_writes_nothing_and_no_repeats_are_refused(tmp_path):
    assert _measure(tmp_path / "new", dry_run=True) == {}
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="repeats = 0"):
        _measure(tmp_path, repeats=0)
