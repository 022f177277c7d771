"""Many candidates per example, drawn chunk by chunk: resumable, and judged while drawing goes on.

A metric that takes long over each candidate, as one that runs programs does, may have two functions
as attributes. `judge(targets, predictions)` does the work for some candidates ahead of the metric's
call, remembers it, and returns it as a JSON value; `remember(targets, predictions, judged)` takes
that value back in a later process. Targets and predictions are those that the metric will be given,
a list of candidates per example.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import seqio

from diffusion_t5x.runtime.files import write_atomically

# Index of an example -> tokens [candidates, length] and scores [candidates].
Outputs = dict[int, tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class ChunkConfig:
    """How many candidates each example gets, and how many of them at a time.

    Attributes:
      num_decodes: candidates per example.
      chunk_size: candidates per example between two savings.
    """

    num_decodes: int
    chunk_size: int

    def __post_init__(self):
        if self.num_decodes < 1 or self.chunk_size < 1:
            raise ValueError(
                f"NUM_DECODES = {self.num_decodes}, DECODES_PER_CHUNK = {self.chunk_size}; "
                "expected at least 1 of each."
            )

    def sizes(self) -> list[int]:
        """Candidates per example of each chunk; the last one may have fewer."""
        whole, rest = divmod(self.num_decodes, self.chunk_size)
        return [self.chunk_size] * whole + [rest] * (rest > 0)


class TaskJudges:
    """The metrics of a task that judge ahead, and what they are given."""

    def __init__(self, evaluator: seqio.Evaluator, name: str):
        self._task = seqio.get_mixture_or_task(name)
        metric_fns = self._task.predict_metric_fns
        self.metric_fns = [metric_fn for metric_fn in metric_fns if hasattr(metric_fn, "judge")]
        self._examples = []
        if self.metric_fns:
            dataset = evaluator.cached_task_datasets[name]
            self._examples = list(dataset.as_numpy_iterator())
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
        """The candidates of each example as a metric is given them."""
        return [
            self._postprocess(
                [self._vocabulary.decode(row) for row in outputs[index][0]], example, False
            )
            for index, example in enumerate(self._examples)
        ]


def draw(
    draw_chunk: Callable[[int, int], tuple[Outputs, float]],
    cfg: ChunkConfig,
    judges: TaskJudges,
    directory: pathlib.Path | None,
) -> tuple[Outputs, float]:
    """All candidates of all examples, each chunk judged in the background once it is drawn.

    Args:
      draw_chunk: of a chunk's number and candidates per example, the candidates and the seconds
        that decoding took; the same for the same arguments.
      cfg: number and size of chunks.
      judges: of the task.
      directory: keeps chunks and judgements, and those it has already are not made again; None to
        keep nothing.

    Returns:
      Candidates in the order of chunks, and the seconds that decoding all of them took.
    """
    chunks, seconds, pending = [], 0.0, []
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        for number, size in enumerate(cfg.sizes()):
            chunk, took = _drawn(draw_chunk, number, size, directory)
            chunks.append(chunk)
            seconds += took
            if judges.metric_fns:
                pending.append(pool.submit(_judge, judges, number, chunk, directory))
            for judged in pending:
                if judged.done():
                    judged.result()  # a judge that fails is not waited for to the end
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


def forget(directory: pathlib.Path) -> None:
    """Removes the chunks, whose results are kept elsewhere by now."""
    if jax.process_index() == 0:
        shutil.rmtree(directory, ignore_errors=True)


def _drawn(
    draw_chunk: Callable[[int, int], tuple[Outputs, float]],
    number: int,
    size: int,
    directory: pathlib.Path | None,
) -> tuple[Outputs, float]:
    """A chunk from its file, or drawn and then kept there."""
    path = directory / f"chunk-{number:05}.json" if directory else None
    if path and path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        return dict(_read(record["examples"])), record["seconds"]
    outputs, seconds = draw_chunk(number, size)
    if path and jax.process_index() == 0:
        examples = {index: [part.tolist() for part in parts] for index, parts in outputs.items()}
        write_atomically(path, json.dumps({"seconds": seconds, "examples": examples}))
    return outputs, seconds


def _read(examples: Mapping[str, Sequence[Any]]) -> Iterator[tuple[int, Any]]:
    for index, (tokens, scores) in examples.items():
        yield int(index), (np.asarray(tokens, np.int32), np.asarray(scores, np.float32))


def _judge(judges: TaskJudges, number: int, chunk: Outputs, directory: pathlib.Path | None) -> None:
    """Has every metric judge a chunk, or remember what it judged."""
    predictions = judges.predictions(chunk)
    for metric_fn in judges.metric_fns:
        path = directory / f"chunk-{number:05}.{metric_fn.__name__}.json" if directory else None
        if path and path.exists():
            judged = json.loads(path.read_text(encoding="utf-8"))
            metric_fn.remember(judges.targets, predictions, judged)
            continue
        judged = metric_fn.judge(judges.targets, predictions)
        if path and jax.process_index() == 0:
            write_atomically(path, json.dumps(judged))
