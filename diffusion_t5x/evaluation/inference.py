"""Inference: predictions or scores of a task's examples as JSON lines, sharded and resumable."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf
from etils import epath

from diffusion_t5x import paths
from diffusion_t5x.checkpointing import integrity
from diffusion_t5x.checkpointing.checkpoints import RestoreCheckpointConfig, select_checkpoints
from diffusion_t5x.data import datasets, lengths, task_checks
from diffusion_t5x.evaluation import likelihoods
from diffusion_t5x.evaluation.compiled_model import (
    CompiledFunction,
    Prediction,
    Predictor,
    Scorer,
    prediction_fields,
    restorer,
)
from diffusion_t5x.evaluation.task_metrics import find_tasks
from diffusion_t5x.models import Model
from diffusion_t5x.runtime import resumable
from diffusion_t5x.runtime.files import writing
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.terminal import Progress

Example = Mapping[str, Any]  # a task's features
ExampleBatch = tuple[list[Example], datasets.Batch]


def infer(
    *,
    model: Model,
    dataset_cfg: datasets.DatasetConfig,
    restore_checkpoint_cfg: RestoreCheckpointConfig,
    partitioner: PjitPartitioner,
    output_dir: str,
    mode: str = "predict",
    shard_id: int = 0,
    num_shards: int = 1,
    checkpoint_period: int = 100,
    random_seed: int = 0,
    return_all_decodes: bool = False,
    dry_run: bool = False,
) -> list[str]:
    """Writes `{output_dir}/{task}-{mode}.jsonl-{shard}-of-{shards}` for each task.

    A line is `{'inputs': {...}, 'prediction', 'score'}`, or `{'inputs', 'score', 'error', 'tokens',
    'bits_per_token'}` of the given targets (see `likelihoods.Likelihood`), in the order of the
    data; of the latter the perplexity is printed. After every `checkpoint_period` batches the lines
    so far are kept in a file; a run that is killed and started again resumes after the last such
    file.

    Args:
      restore_checkpoint_cfg: One checkpoint.
      mode: 'predict' or 'score'.
      shard_id: Index of this share of the examples.
      num_shards: Number of shares.
      checkpoint_period: Batches between savings.
      random_seed: Seed of decoding.
      return_all_decodes: Add all samples to a line, best last.
      dry_run: Print what would be done, and stop.

    Returns:
      The paths written.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      DamagedCheckpointError: if a checkpoint is not as it was written.
      CheckpointMismatchError: if it does not fit the model.
      OSError: if `output_dir` cannot be written to.
      ValueError: if settings are out of range, or a task is unknown, without the split, or of
        another vocabulary than the model.
    """
    if mode not in ("predict", "score"):
        raise ValueError(f"mode = {mode!r}; expected 'predict' or 'score'.")
    if not 0 <= shard_id < num_shards or checkpoint_period < 1:
        raise ValueError(
            f"shard_id = {shard_id}, num_shards = {num_shards}, checkpoint_period = "
            f"{checkpoint_period}; expected 0 <= shard_id < num_shards, checkpoint_period >= 1."
        )
    if dataset_cfg.task_feature_lengths is None:
        raise ValueError("TASK_FEATURE_LENGTHS = None; inference needs the lengths to decode.")
    directory = paths.writable(output_dir, "INFER_OUTPUT_DIR")
    datasets.import_task_module(dataset_cfg.module)
    _, path = select_checkpoints(restore_checkpoint_cfg)[-1]
    tasks = find_tasks(model, dataset_cfg)
    for task in tasks:
        task_checks.check_split(task, dataset_cfg.split)
        if mode == "score" and "targets" not in task.output_features:
            raise ValueError(f"mode = 'score': task {task.name!r} has no 'targets' to score.")
    suffix = f"{mode}.jsonl-{shard_id:05}-of-{num_shards:05}"
    outputs = [directory / f"{task.name}-{suffix}" for task in tasks]
    if dry_run:
        print("\n".join(f"{path} -> {output}" for output in outputs))
        return []
    if jax.process_index() == 0:
        lengths.report_cut(dataset_cfg)
    size = dataset_cfg.batch_size
    key = resumable.digest(
        [
            path, mode, random_seed, return_all_decodes, dataset_cfg.split, size,
            checkpoint_period, dict(dataset_cfg.task_feature_lengths),
            repr(getattr(model, "decoder", None)), integrity.save_number(path),
            restore_checkpoint_cfg.parameters,
            *([repr(model.objective)] if mode == "score" else []),
        ]
    )  # fmt: skip
    params = restorer(model, partitioner, restore_checkpoint_cfg)(path)
    vocabulary = model.output_vocabulary
    function: CompiledFunction[Any]
    if mode == "predict":
        function = Predictor(
            model, partitioner, random_seed, size, return_all_decodes=return_all_decodes
        )
    else:
        function = Scorer(model, partitioner, random_seed, size)

    def lines(batches: list[ExampleBatch], first: int, progress: Progress) -> str:
        pairs, _ = function.run_batches(params, batches, progress, first=first)
        return "".join(_line(example, output, vocabulary) for example, output in pairs)

    for task, output in zip(tasks, outputs, strict=True):
        if not _is_finished(output, key):
            examples = _examples(model, task, dataset_cfg, shard_id, num_shards)
            _write(output, key, _batches(examples, size), checkpoint_period, lines)
        if mode == "score" and jax.process_index() == 0:
            with output.open("r") as file:
                print(likelihoods.describe(output.name, map(likelihoods.of_line, file)), flush=True)
    return [str(output) for output in outputs]


def _examples(
    model: Model, task: seqio.Task, cfg: datasets.DatasetConfig, shard_id: int, num_shards: int
) -> Iterator[tuple[Example, Example]]:
    """Yields (task features, model features) of each example of this shard."""
    dataset = task.get_dataset(
        sequence_length=cfg.task_feature_lengths,
        split=cfg.split,
        shuffle=False,
        use_cached=cfg.use_cached,
        seed=cfg.seed,
        num_epochs=1,
    ).shard(num_shards, shard_id)
    if "targets" not in dataset.element_spec:  # a task with inputs alone
        dataset = dataset.map(lambda x: {**x, "targets": tf.zeros([0], tf.int32)})
    converted = model.FEATURE_CONVERTER_CLS(pack=False)(dataset, cfg.task_feature_lengths)
    pairs = tf.data.Dataset.zip((dataset, converted)).prefetch(64)
    yield from pairs.as_numpy_iterator()


def _batches(pairs: Iterator[tuple[Example, Example]], size: int) -> Iterator[ExampleBatch]:
    """Yields batches of `size` rows; the last one may have fewer."""
    while rows := list(itertools.islice(pairs, size)):
        examples, features = zip(*rows, strict=True)
        stacked = {name: np.stack([row[name] for row in features]) for name in features[0]}
        yield list(examples), stacked


def _line(
    example: Example, output: Prediction | likelihoods.Likelihood, vocabulary: seqio.Vocabulary
) -> str:
    """Returns an example's line: its features, then what was predicted, or its score."""
    record: dict[str, Any] = {"inputs": dict(example)}
    if isinstance(output, Prediction):
        scores = output.aux["scores"]
        record |= prediction_fields(output.tokens, scores, vocabulary)
        if "samples" in record:
            record["scores"] = scores.tolist()
    else:
        record |= likelihoods.fields(output)
    return json.dumps(record, ensure_ascii=False, default=_jsonable) + "\n"


def _jsonable(value: Any) -> Any:
    """Converts what JSON lacks: text to str, other bytes to base64, arrays to lists."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return value.tolist()


def _note(output: epath.Path) -> epath.Path:
    """Returns the path of the note that a finished file has beside it."""
    return output.with_name(f".{output.name}.settings")


def _is_finished(output: epath.Path, key: str) -> bool:
    """Returns whether a file is whole and of these settings."""
    note = resumable.load(_note(output), key)
    if note is None or not output.exists():
        return False
    whole = output.stat().length == note["bytes"]
    # Older versions noted no checksum.
    if whole and ("sha256" not in note or resumable.file_checksum(output) == note["sha256"]):
        return True
    resumable.report(output)
    return False


def _write(
    output: epath.Path,
    key: str,
    batches: Iterator[ExampleBatch],
    period: int,
    lines: Callable[[list[ExampleBatch], int, Progress], str],
) -> None:
    """Writes a file of lines in parts of `period` batches, of which finished ones are skipped."""
    directory = output.with_name(f".{output.name}.parts")
    parts: list[epath.Path] = []
    with Progress(None, output.name, "examples") as progress:
        while group := list(itertools.islice(batches, period)):
            part = directory / f"part-{len(parts):06}.jsonl"
            if resumable.load_text(part, key) is None:
                resumable.save_text(part, key, lines(group, len(parts) * period, progress))
            parts.append(part)
    if jax.process_index() != 0:
        return
    with writing(output) as whole:
        for part in parts:
            with part.open("rb") as file:
                file.readline()  # the part's key
                shutil.copyfileobj(file, whole)
    found = {"bytes": output.stat().length, "sha256": resumable.file_checksum(output)}
    resumable.save(_note(output), key, found)
    directory.rmtree(missing_ok=True)
