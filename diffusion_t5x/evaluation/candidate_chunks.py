"""Many candidates per example, drawn in chunks: resumable, and judged while others are drawn."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
import seqio

from diffusion_t5x.runtime import resumable

# Index of an example -> tokens [candidates, length] and scores [candidates].
Outputs = dict[int, tuple[np.ndarray, np.ndarray]]


@runtime_checkable
class JudgingMetric(Protocol):
    """A metric that takes long over each candidate, and can judge some ahead of its call."""

    def __call__(self, targets: Sequence[Any], predictions: Sequence[Any]) -> Mapping[str, float]:
        """Returns the metric; candidates that `judge` has seen are not judged again."""
        ...

    def judge(
        self,
        targets: Sequence[Any],
        predictions: Sequence[Any],
        known: Mapping[str, Any] | None = None,
    ) -> Mapping[str, Any]:
        """Judges some candidates of every example, and returns a JSON object.

        `known` is what this method returned for the same arguments before a restart.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ChunkConfig:
    """Numbers of candidates.

    Attributes:
      num_decodes: Candidates per example.
      chunk_size: Candidates per example that are drawn between two savings.
    """

    num_decodes: int
    chunk_size: int

    def __post_init__(self) -> None:
        if self.num_decodes < 1 or self.chunk_size < 1:
            raise ValueError(
                f"NUM_DECODES = {self.num_decodes}, DECODES_PER_CHUNK = {self.chunk_size}; "
                "expected at least 1 of each."
            )

    def sizes(self) -> list[int]:
        """Returns the candidates per example of each chunk; the last one may have fewer."""
        whole, rest = divmod(self.num_decodes, self.chunk_size)
        return [self.chunk_size] * whole + [rest] * (rest > 0)


class TaskJudges:
    """The metrics of a task that judge ahead, and their arguments.

    Attributes:
      metrics: The metrics.
      targets: The targets of all examples, as a metric gets them.
    """

    def __init__(self, evaluator: seqio.Evaluator, name: str):
        """Reads the targets of task `name`, if it has such a metric."""
        self._task = seqio.get_mixture_or_task(name)
        self.metrics: list[JudgingMetric] = [
            metric for metric in self._task.predict_metric_fns if isinstance(metric, JudgingMetric)
        ]
        self._examples: list[Mapping[str, Any]] = []
        if self.metrics:
            self._examples = list(evaluator.cached_task_datasets[name].as_numpy_iterator())
        self._vocabulary = self._task.output_features["targets"].vocabulary
        self.targets = [self._target(example) for example in self._examples]

    def _target(self, example: Mapping[str, Any]) -> Any:
        if "targets_pretokenized" in example:
            text = example["targets_pretokenized"].decode("utf-8")
        else:
            text = self._vocabulary.decode(list(example["targets"]))
        return self._postprocess(text, example, True)

    def _postprocess(self, text: Any, example: Mapping[str, Any], is_target: bool) -> Any:
        if self._task.postprocess_fn is None:
            return text
        return self._task.postprocess_fn(text, example=example, is_target=is_target)

    def predictions(self, outputs: Outputs) -> list[Any]:
        """Returns the candidates of each example as a metric gets them."""
        return [
            self._postprocess(
                [self._vocabulary.decode(row) for row in outputs[index][0]], example, False
            )
            for index, example in enumerate(self._examples)
        ]


class ChunkFiles(NamedTuple):
    """The directory of chunks and judgements, and the key of all that decides the candidates."""

    directory: pathlib.Path
    key: str

    def load(self, name: str) -> dict[str, Any] | None:
        """Returns a file's object, or None if it is absent, damaged or of another key."""
        return resumable.load(self.directory / f"{name}.json", self.key)

    def save(self, name: str, values: Mapping[str, Any]) -> None:
        """Writes a file."""
        resumable.save(self.directory / f"{name}.json", self.key, values)

    def remove(self) -> None:
        """Removes all files, once the results are kept elsewhere."""
        if jax.process_index() == 0:
            shutil.rmtree(self.directory, ignore_errors=True)


def draw(
    draw_chunk: Callable[[int, int], tuple[Outputs, float]],
    cfg: ChunkConfig,
    judges: TaskJudges,
    files: ChunkFiles | None,
) -> tuple[Outputs, float]:
    """Draws all candidates of all examples; each chunk is judged while the next are drawn.

    Args:
      draw_chunk: Maps a chunk's number and candidates per example to the candidates and the seconds
        that decoding took; the same for the same arguments.
      cfg: Number and size of chunks.
      judges: The task's metrics that judge ahead.
      files: Files that keep chunks and judgements, of which none is made twice; None to keep none.

    Returns:
      Candidates in the order of chunks, and the seconds that decoding all of them took.
    """
    chunks, seconds, pending = [], 0.0, []
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        for number, size in enumerate(cfg.sizes()):
            chunk, took = _drawn(draw_chunk, number, size, files)
            chunks.append(chunk)
            seconds += took
            if judges.metrics:
                pending.append(pool.submit(_judge, judges, number, chunk, files))
            for judged in pending:
                if judged.done():
                    judged.result()  # a judge that fails ends the run before all is drawn
        for judged in pending:
            judged.result()
    finally:
        pool.shutdown(cancel_futures=True)
    outputs = {}
    for index in chunks[0]:
        tokens, scores = zip(*(chunk[index] for chunk in chunks), strict=True)
        outputs[index] = np.concatenate(tokens), np.concatenate(scores)
    if cfg.num_decodes > 1 and all((t == t[:1]).all() for t, _ in outputs.values()):
        print(
            f"all {cfg.num_decodes} candidates of every example are alike; "
            "does the decoder sample? (TEMPERATURE)"
        )
    return outputs, seconds


def _drawn(
    draw_chunk: Callable[[int, int], tuple[Outputs, float]],
    number: int,
    size: int,
    files: ChunkFiles | None,
) -> tuple[Outputs, float]:
    """Returns a chunk from its file, or draws and keeps it."""
    name = f"chunk-{number:05}"
    if files and (record := files.load(name)):
        outputs = {
            int(index): (np.asarray(tokens, np.int32), np.asarray(scores, np.float32))
            for index, (tokens, scores) in record["examples"].items()
        }
        return outputs, record["seconds"]
    outputs, seconds = draw_chunk(number, size)
    if files:
        examples = {index: [array.tolist() for array in pair] for index, pair in outputs.items()}
        files.save(name, {"seconds": seconds, "examples": examples})
    return outputs, seconds


def _judge(judges: TaskJudges, number: int, chunk: Outputs, files: ChunkFiles | None) -> None:
    """Has every metric judge a chunk, with what it judged before a restart."""
    predictions = judges.predictions(chunk)
    for index, metric in enumerate(judges.metrics):
        name = f"chunk-{number:05}.judged-{index}"
        known = files.load(name) if files else None
        judged = metric.judge(judges.targets, predictions, known)
        if files and known is None:
            files.save(name, judged)
