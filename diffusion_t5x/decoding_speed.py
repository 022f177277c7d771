"""How long a model takes to decode texts of some length; nothing is trained for it."""

from __future__ import annotations

import json
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffusion_t5x.evaluation.compiled_model import INIT_SHAPES, Predictor
from diffusion_t5x.runtime.files import write_atomically
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.train_state import create_params


def measure(
    *,
    model: Any,
    partitioner: PjitPartitioner,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    output_dir: str,
    repeats: int = 3,
    random_seed: int = 0,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Decodes random prefixes with fresh parameters, several times, and writes the median seconds.

    Args:
      model: of `models.Model`'s kind.
      partitioner: devices and sharding.
      task_feature_lengths: tokens of 'inputs' and 'targets'.
      batch_size: texts decoded at once.
      output_dir: gets `results.json`.
      repeats: timed decodings, after one that is not timed.
      random_seed: of parameters, prefixes and decoding.
      dry_run: say what would be measured, and stop.

    Returns:
      What `results.json` holds: 'seconds' for the batch, 'seconds_per_token', 'batch_size',
      'inputs', 'targets', 'repeats' and 'device'.

    Raises:
      ValueError: if there is nothing to repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats = {repeats}; expected at least 1.")
    inputs, targets = task_feature_lengths["inputs"], task_feature_lengths["targets"]
    if dry_run:
        print(f"{batch_size} texts of {targets} tokens after prefixes of {inputs}")
        return {}
    rng = jax.random.PRNGKey(random_seed)
    params = create_params(model, partitioner, INIT_SHAPES, {}, rng)
    tokens = np.random.default_rng(random_seed)
    prefixes = tokens.integers(2, model.input_vocabulary.vocab_size, (batch_size, inputs))
    canvas = np.zeros((batch_size, targets), np.int32)
    batch = {
        "encoder_input_tokens": prefixes.astype(np.int32),
        "decoder_input_tokens": canvas,
        "decoder_target_tokens": canvas,
    }
    predictor = Predictor(model, partitioner, random_seed)
    predictor("predict", params, batch, 0)
    seconds = []
    for index in range(1, repeats + 1):
        before = predictor.seconds
        predictor("predict", params, batch, index)
        seconds.append(predictor.seconds - before)
    median = statistics.median(seconds)
    results = {
        "seconds": median,
        "seconds_per_token": median / (batch_size * targets),
        "batch_size": batch_size,
        "inputs": inputs,
        "targets": targets,
        "repeats": repeats,
        "device": jax.devices()[0].device_kind,
    }
    if jax.process_index() == 0:
        write_atomically(pathlib.Path(output_dir) / "results.json", json.dumps(results, indent=1))
        print(f"{median:.4g} s for {batch_size} texts of {targets} tokens")
    return results
