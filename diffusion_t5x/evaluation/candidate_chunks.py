"""Many candidates per example, drawn in chunks: resumable, and judged while others are drawn."""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import seqio
from etils import epath

from diffusion_t5x.evaluation.costs import Costs
from diffusion_t5x.runtime import resumable

# Index of an example -> tokens [candidates, length] and scores [candidates].
Outputs: TypeAlias = dict[int, tuple[np.ndarray, np.ndarray]]
# A chunk's number and candidates per example -> the candidates, and what they cost.
DrawChunk: TypeAlias = Callable[[int, int], tuple[Outputs, Costs]]


@runtime_checkable
class JudgingMetric(Protocol):
    """A metric that takes long over each candidate, and can judge some ahead of its call."""

    def __call__(self, targets: Sequence[Any], predictions: Sequence[Any]) -> Mapping[str, float]:
        """Returns the metric; candidates that `judge` has seen are not judged again."""
        ...

    def check(self, targets: Sequence[Any]) -> None:
        """Refuses, within seconds, targets that cannot be judged here."""
        ...

    def prepare(
        self, targets: Sequence[Any], known: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """Judges what the targets hold themselves, says so, and returns a JSON object.

        `known` is what this method returned for the same targets before.
        """
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


def chunk_sizes(num_decodes: int, chunk_size: int) -> list[int]:
    """Returns the candidates per example of each chunk; the last one may have fewer.

    Raises:
      ValueError: if there are none.
    """
    if num_decodes < 1 or chunk_size < 1:
        raise ValueError(
            f"NUM_DECODES = {num_decodes}, DECODES_PER_CHUNK = {chunk_size}; "
            "expected at least 1 of each."
        )
    whole, rest = divmod(num_decodes, chunk_size)
    return [chunk_size] * whole + [rest] * (rest > 0)


class TaskJudges:
    """The metrics of a task that judge ahead, and all targets as a metric gets them."""

    def __init__(self, evaluator: Any, name: str):
        """Reads the targets of task `name`, if it has such a metric."""
        self._task = seqio.get_mixture_or_task(name)
        self.metrics: list[JudgingMetric] = [
            metric for metric in self._task.predict_metric_fns if isinstance(metric, JudgingMetric)
        ]
        examples = evaluator.cached_task_datasets[name].as_numpy_iterator()
        self._examples: list[Mapping[str, Any]] = list(examples) if self.metrics else []
        self._vocabulary = self._task.output_features["targets"].vocabulary
        self.targets = [self.target(example) for example in self._examples]

    def text(self, example: Mapping[str, Any]) -> str:
        """Returns the text of an example's target."""
        if "targets_pretokenized" in example:
            return example["targets_pretokenized"].decode("utf-8")
        return self._vocabulary.decode(list(example["targets"]))

    def target(self, example: Mapping[str, Any]) -> Any:
        """Returns an example's target as a metric gets it."""
        return self._task.postprocess_fn(self.text(example), example=example, is_target=True)

    def check(self) -> None:
        """Refuses targets that cannot be judged here."""
        for metric in self.metrics:
            metric.check(self.targets)

    def prepare(self, directory: epath.Path) -> None:
        """Has every metric prepare, once for the same targets and directory."""
        key = resumable.digest(repr(self.targets))
        for index, metric in enumerate(self.metrics):
            file = directory / f"prepared-{index}.json"
            known = resumable.load(file, key)
            prepared = metric.prepare(self.targets, known)
            if prepared != known:
                resumable.save(file, key, prepared)

    def predictions(self, outputs: Outputs) -> list[Any]:
        """Returns the candidates of each example as a metric gets them."""
        return [
            self._task.postprocess_fn(
                [self._vocabulary.decode(row) for row in outputs[index][0]],
                example=example,
                is_target=False,
            )
            for index, example in enumerate(self._examples)
        ]


class ChunkFiles(NamedTuple):
    """The directory of chunks and judgements, and the key of all that decides the candidates."""

    directory: epath.Path
    key: str

    def load(self, name: str) -> dict[str, Any] | None:
        return resumable.load(self.directory / f"{name}.json", self.key)

    def save(self, name: str, values: Mapping[str, Any]) -> None:
        resumable.save(self.directory / f"{name}.json", self.key, values)


def draw(
    draw_chunk: DrawChunk, sizes: Sequence[int], judges: TaskJudges, files: ChunkFiles | None
) -> tuple[Outputs, Costs]:
    """Draws chunks of `sizes` candidates; each is judged while the next are drawn.

    Args:
      draw_chunk: Gives the same for the same arguments.
      sizes: Candidates per example of each chunk.
      judges: The task's metrics that judge ahead.
      files: Keep chunks and judgements, of which none is made twice; None to keep none.

    Returns:
      Candidates in the order of chunks, and what decoding all of them cost.
    """
    chunks, pending = [], []
    costs: collections.defaultdict[str, float] = collections.defaultdict(float)
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        for number, size in enumerate(sizes):
            chunk, took = _drawn(draw_chunk, number, size, files)
            chunks.append(chunk)
            for name, cost in took.items():
                costs[name] += cost
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
    if sum(sizes) > 1 and all((t == t[:1]).all() for t, _ in outputs.values()):
        print(
            f"all {sum(sizes)} candidates of every example are alike; "
            "does the decoder sample? (TEMPERATURE)"
        )
    return outputs, costs


def _drawn(
    draw_chunk: DrawChunk, number: int, size: int, files: ChunkFiles | None
) -> tuple[Outputs, Costs]:
    """Returns a chunk from its file, or draws and keeps it."""
    name = f"chunk-{number:05}"
    record = files.load(name) if files else None
    if record and "costs" in record:  # older versions noted the seconds alone
        outputs = {
            int(index): (np.asarray(tokens, np.int32), np.asarray(scores, np.float32))
            for index, (tokens, scores) in record["examples"].items()
        }
        return outputs, record["costs"]
    outputs, costs = draw_chunk(number, size)
    if files:
        examples = {index: [array.tolist() for array in pair] for index, pair in outputs.items()}
        files.save(name, {"costs": costs, "examples": examples})
    return outputs, costs


def _judge(judges: TaskJudges, number: int, chunk: Outputs, files: ChunkFiles | None) -> None:
    """Has every metric judge a chunk, with what it judged before a restart."""
    predictions = judges.predictions(chunk)
    for index, metric in enumerate(judges.metrics):
        name = f"chunk-{number:05}.judged-{index}"
        known = files.load(name) if files else None
        judged = metric.judge(judges.targets, predictions, known)
        if files and known is None:
            files.save(name, judged)
