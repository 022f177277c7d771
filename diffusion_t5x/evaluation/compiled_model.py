"""A model's predict and score functions, compiled."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax

from diffusion_t5x.data import datasets
from diffusion_t5x.runtime.partitioning import PjitPartitioner

# A network's parameters do not depend on the lengths it is initialised with.
INIT_SHAPES = {"encoder_input_tokens": (1, 8), "decoder_input_tokens": (1, 8)}


class Predictor:
    """A model's compiled predict and score functions, reused wherever shapes are the same."""

    def __init__(self, model: Any, partitioner: PjitPartitioner, random_seed: int, **flags: Any):
        """Prepares the functions.

        Args:
          model: of `models.Model`'s kind.
          partitioner: devices and sharding.
          random_seed: a batch is decoded with the key that is folded with its position.
          **flags: for `predict_batch_with_aux`.
        """
        self._partitioner = partitioner
        self._rng = jax.random.PRNGKey(random_seed)
        self._functions = {
            "predict": partitioner.jit(
                lambda params, batch, rng: model.predict_batch_with_aux(params, batch, rng, **flags)
            ),
            "score": partitioner.jit(lambda params, batch, rng: model.score_batch(params, batch)),
        }
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self.seconds = 0.0

    def __call__(self, mode: str, params: Any, batch: datasets.Batch, *position: int) -> Any:
        """Runs one global batch of numpy rows; the result is numpy, whole, on every process.

        Args:
          mode: 'predict' or 'score'.
          params: the network's parameters.
          batch: `[rows, ...]` each, the same on every process.
          *position: numbers that tell the batch from others, such as its index, and decide its
            key.
        """
        layout = self._partitioner.data_layout(len(next(iter(batch.values()))))
        rng = functools.reduce(jax.random.fold_in, position, self._rng)
        args = params, self._partitioner.shard_batch(layout.local_rows(batch)), rng
        key = mode, tuple((name, value.shape) for name, value in sorted(batch.items()))
        if key not in self._compiled:
            self._compiled[key] = self._functions[mode].lower(*args).compile()
        started = time.monotonic()
        result = self._partitioner.gather(self._compiled[key](*args))
        self.seconds += time.monotonic() - started
        return result
