"""A model's predict and score functions, compiled, and run over batches."""

from __future__ import annotations

import abc
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import jax
import numpy as np

from diffusion_t5x.checkpointing.checkpoints import RestoreCheckpointConfig
from diffusion_t5x.checkpointing.reading import restore_params
from diffusion_t5x.data import datasets
from diffusion_t5x.data.detokenize import close_holes, detokenize, end_text
from diffusion_t5x.evaluation.likelihoods import Likelihood
from diffusion_t5x.interfaces import FIXED_FEATURE
from diffusion_t5x.models import COSTS, Model
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.terminal import Progress
from diffusion_t5x.runtime.train_state import INIT_SHAPES, abstract_params

Output = TypeVar("Output")
Example = TypeVar("Example")


def restorer(
    model: Model, partitioner: PjitPartitioner, cfg: RestoreCheckpointConfig
) -> Callable[[str], Any]:
    """Returns the function that restores a model's parameters from the path of a checkpoint."""
    abstract = abstract_params(model, partitioner, INIT_SHAPES, {})
    verify = cfg.mode == "all"  # of other modes the selection has verified its one checkpoint
    return functools.partial(
        restore_params, abstract_params=abstract, verify=verify, parameters=cfg.parameters
    )


class Prediction(NamedTuple):
    """The decoded text of one example.

    Attributes:
      tokens: `[length]` int32, or `[num_samples, length]` with the best sample last; end-of-text
        tokens alone after the text, and no padding in what fills the holes of a text.
      aux: 'scores', `[]` or `[num_samples]`, and whatever else was asked of the model; with
        `return_cost` also 'tokens', of the best text those that were not given, its end included.
    """

    tokens: np.ndarray
    aux: dict[str, np.ndarray]

    @property
    def costs(self) -> dict[str, float]:
        """What the text cost, as far as the decoder counts it, for sums over examples."""
        return {name: float(self.aux[name]) for name in (*COSTS, "tokens") if name in self.aux}


def prediction_fields(tokens: np.ndarray, scores: np.ndarray, vocabulary: Any) -> dict[str, Any]:
    """Returns the best text and its score as fields of a line, and all 'samples' of several."""
    samples = [detokenize(row, vocabulary) for row in np.atleast_2d(tokens)]
    fields = {"prediction": samples[-1], "score": float(np.atleast_1d(scores)[-1])}
    return {**fields, "samples": samples} if len(samples) > 1 else fields


class CompiledFunction(abc.ABC, Generic[Output]):
    """A function of a model's parameters and a batch, compiled once per shape."""

    NAME: ClassVar[str]  # of the program, for people

    def __init__(
        self,
        model: Model,
        partitioner: PjitPartitioner,
        random_seed: int,
        batch_size: int,
        **flags: bool,
    ):
        """Prepares the function.

        Args:
          random_seed: Seed of the key that a batch's position is folded into.
          batch_size: Rows that a batch is padded to.
          **flags: Flags of the model's function.
        """
        self._model, self._flags = model, flags
        self._partitioner, self._batch_size = partitioner, batch_size
        self._function = partitioner.jit(self._run)
        self._rng = jax.random.PRNGKey(random_seed)
        self._compiled: dict[Any, Callable[..., Any]] = {}

    @abc.abstractmethod
    def _run(self, params: Any, batch: Mapping[str, jax.Array], rng: jax.Array) -> Any:
        """Calls the model."""

    @abc.abstractmethod
    def _split(self, result: Any, rows: int) -> list[Output]:
        """Returns the outputs of the first `rows` rows."""

    def __call__(
        self, params: Any, batch: datasets.Batch, *position: int
    ) -> tuple[list[Output], float]:
        """Runs one global batch of numpy rows, padded with rows of zeros to the batch size.

        Args:
          batch: `[rows, ...]` each, the same on every process.
          *position: Numbers that identify the batch, such as its index, and decide its random key.

        Returns:
          The output of each row, the same on every process, and the seconds that the device took,
          compilation left out.
        """
        rows = len(next(iter(batch.values())))
        padded = datasets.pad_batch(batch, self._batch_size)
        layout = self._partitioner.data_layout(self._batch_size)
        rng = functools.reduce(jax.random.fold_in, position, self._rng)
        args = params, self._partitioner.shard_batch(layout.local_rows(padded)), rng
        shapes = tuple((name, value.shape) for name, value in sorted(padded.items()))
        if shapes not in self._compiled:
            compiled = self._partitioner.compile(self.NAME, self._function, *args)
            self._compiled[shapes] = compiled
        started = time.monotonic()
        result = self._partitioner.gather(self._compiled[shapes](*args))
        return self._split(result, rows), time.monotonic() - started

    def run_batches(
        self,
        params: Any,
        batches: Iterable[tuple[Sequence[Example], datasets.Batch]],
        progress: Progress,
        *position: int,
        first: int = 0,
    ) -> tuple[list[tuple[Example, Output]], float]:
        """Runs batches, each with what identifies its rows, and counts the rows.

        A batch's position is `position`, then its number, from `first` on. Returns the pair of each
        row's identity and output, in order, and the seconds that the device took.
        """
        pairs: list[tuple[Example, Output]] = []
        seconds = 0.0
        for number, (examples, batch) in enumerate(batches, first):
            outputs, took = self(params, batch, *position, number)
            pairs += zip(examples, outputs, strict=True)
            seconds += took
            progress.update(len(examples))
        return pairs, seconds


class Predictor(CompiledFunction[Prediction]):
    """A model's `predict_batch_with_aux`, compiled."""

    NAME = "prediction"

    def _run(self, params: Any, batch: Mapping[str, jax.Array], rng: jax.Array) -> Any:
        found = self._model.predict_batch_with_aux(params, batch, rng, **self._flags)
        return *found, batch.get(FIXED_FEATURE)

    def _split(self, result: Any, rows: int) -> list[Prediction]:
        (canvas, aux, fixed), eos_id = result, self._model.output_vocabulary.eos_id
        given: np.ndarray | int = 0
        if fixed is not None:
            where = np.expand_dims(fixed != 0, tuple(range(1, canvas.ndim - 1)))
            where = np.broadcast_to(where, canvas.shape)
            given = np.sum(where & (canvas != 0), axis=-1)
            canvas = close_holes(canvas, where, eos_id)
        tokens = end_text(canvas, eos_id)
        if self._flags.get("return_cost"):
            text = np.sum(tokens != (eos_id or 0), axis=-1)
            last = np.minimum(text, canvas.shape[-1] - 1)[..., None]
            end = np.take_along_axis(canvas, last, axis=-1)[..., 0]
            count = text + ((end == eos_id) & (text < canvas.shape[-1])) - given
            aux = {**aux, "tokens": np.maximum(count if canvas.ndim == 2 else count[:, -1], 0)}
        return [
            Prediction(tokens[row], {name: value[row] for name, value in aux.items()})
            for row in range(rows)
        ]


class Scorer(CompiledFunction[Likelihood]):
    """A model's `score_batch_with_aux`, compiled."""

    NAME = "score"

    def _run(self, params: Any, batch: Mapping[str, jax.Array], rng: jax.Array) -> Any:
        return self._model.score_batch_with_aux(params, batch)

    def _split(self, result: Any, rows: int) -> list[Likelihood]:
        scores, aux = result
        columns = scores[:rows], aux["error"][:rows], aux["tokens"][:rows]
        return [
            Likelihood(float(score), float(error), int(tokens))
            for score, error, tokens in zip(*columns, strict=True)
        ]
