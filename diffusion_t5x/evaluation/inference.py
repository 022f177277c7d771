"""Inference: predictions or scores of a task's examples as JSON lines, sharded and resumable."""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf

from diffusion_t5x.checkpointing.checkpoints import RestoreCheckpointConfig, select_checkpoints
from diffusion_t5x.checkpointing.reading import restore_params
from diffusion_t5x.data import datasets, vocabularies
from diffusion_t5x.data.detokenize import detokenize, end_text
from diffusion_t5x.evaluation.compiled_model import INIT_SHAPES, Predictor
from diffusion_t5x.evaluation.evaluation import task_names
from diffusion_t5x.runtime.disk_space import stops_when_full
from diffusion_t5x.runtime.files import write_atomically
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.terminal import Progress
from diffusion_t5x.runtime.train_state import abstract_params

MODES = ("predict", "score")


def infer(
    *,
    model: Any,
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

    A line is `{'inputs': {...}, 'prediction', 'score'}`, or `{'inputs', 'score'}` of the given
    targets, in the order of the data. After every `checkpoint_period` batches what is done is put
    aside in a file that appears whole; a run that is started again goes on behind it.

    Args:
      model: of `models.Model`'s kind.
      dataset_cfg: tasks, split and lengths.
      restore_checkpoint_cfg: one checkpoint.
      partitioner: devices and sharding.
      output_dir: directory for the files.
      mode: 'predict' or 'score'.
      shard_id: which share of the examples this is.
      num_shards: number of shares.
      checkpoint_period: batches between savings.
      random_seed: of decoding.
      return_all_decodes: add all samples to a line, best last.
      dry_run: say what would be done, and stop.

    Returns:
      The paths written.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      DamagedCheckpointError: if a checkpoint is not as it was written.
      CheckpointMismatchError: if it does not fit the model.
      DiskFull: if something cannot be written for lack of room.
      ValueError: if settings are out of range, or a task is unknown or of another vocabulary than
        the model.
    """
    if mode not in MODES:
        raise ValueError(f"mode = {mode!r}; expected 'predict' or 'score'.")
    if not 0 <= shard_id < num_shards or checkpoint_period < 1:
        raise ValueError(
            f"shard_id = {shard_id}, num_shards = {num_shards}, checkpoint_period = "
            f"{checkpoint_period}; expected 0 <= shard_id < num_shards, checkpoint_period >= 1."
        )
    if dataset_cfg.task_feature_lengths is None:
        raise ValueError("TASK_FEATURE_LENGTHS = None; inference needs the lengths to decode.")
    datasets.import_task_module(dataset_cfg.module)
    _, path = select_checkpoints(restore_checkpoint_cfg)[-1]
    tasks = [
        task
        for name in task_names(dataset_cfg.mixture_or_task_name)
        for task in seqio.get_subtasks(datasets.get_mixture_or_task(name))
    ]
    for task in tasks:
        vocabularies.check_task(task, model.input_vocabulary, model.output_vocabulary)
    suffix = f"{mode}.jsonl-{shard_id:05}-of-{num_shards:05}"
    outputs = [pathlib.Path(output_dir) / f"{task.name}-{suffix}" for task in tasks]
    if dry_run:
        print("\n".join(f"{path} -> {output}" for output in outputs))
        return []
    settings = [
        path, mode, random_seed, return_all_decodes, dataset_cfg.split, dataset_cfg.batch_size,
        checkpoint_period, dict(dataset_cfg.task_feature_lengths),
        repr(getattr(model, "decoder", None)),
    ]  # fmt: skip
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()
    params = restore_params(path, abstract_params(model, partitioner, INIT_SHAPES, {}))
    predictor = Predictor(model, partitioner, random_seed, return_all_decodes=return_all_decodes)
    records = functools.partial(_records, model, predictor, mode, params, dataset_cfg.batch_size)
    with stops_when_full(output_dir):
        for task, output in zip(tasks, outputs, strict=True):
            parts = output.with_name(f".{output.name}.{digest}")
            if not (output.exists() and _made_with(output) == digest):
                rows = _rows(model, task, dataset_cfg, shard_id, num_shards)
                batches = _batched(rows, dataset_cfg.batch_size)
                write = _PartWriter(parts, checkpoint_period, f"{mode} {task.name}")
                write.run(batches, records)
                write.join(output, digest)
    return [str(output) for output in outputs]


def _made_with(output: pathlib.Path) -> str | None:
    """The digest of the settings that a finished file was made with."""
    note = output.with_name(f".{output.name}.settings")
    return note.read_text(encoding="utf-8") if note.exists() else None


Row = tuple[Mapping[str, Any], datasets.Batch]


def _rows(
    model: Any, task: seqio.Task, cfg: datasets.DatasetConfig, shard_id: int, num_shards: int
) -> Iterator[Row]:
    """(task features, model features) of each example of this shard."""
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


def _batched(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while batch := list(itertools.islice(rows, size)):
        yield batch


def _records(
    model: Any,
    predictor: Predictor,
    mode: str,
    params: Any,
    size: int,
    index: int,
    rows: list[Row],
) -> list[str]:
    """JSON lines of one batch, filled to `size` rows where it is short."""
    features = [features for _, features in rows]
    batch = {name: np.stack([row[name] for row in features]) for name in features[0]}
    result = predictor(mode, params, datasets.pad_batch(batch, size), index)
    lines = []
    for row, (example, _) in enumerate(rows):
        record: dict[str, Any] = {"inputs": {k: _jsonable(v) for k, v in example.items()}}
        if mode == "score":
            record["score"] = float(result[row])
        else:
            vocabulary = model.output_vocabulary
            tokens = np.atleast_2d(end_text(result[0][row], vocabulary.eos_id))
            samples = [detokenize(sample, vocabulary) for sample in tokens]
            scores = np.atleast_1d(result[1]["scores"][row])
            record |= {"prediction": samples[-1], "score": float(scores[-1])}
            if scores.size > 1:
                record |= {"samples": samples, "scores": [float(score) for score in scores]}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return lines


def _jsonable(value: Any) -> Any:
    """Text as text, other bytes as base64, arrays as lists."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    if isinstance(value, np.ndarray):
        return [_jsonable(item) for item in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value


class _PartWriter:
    """Lines in parts of some batches each; a part is a file that appears whole."""

    def __init__(self, directory: pathlib.Path, period: int, description: str):
        self._directory, self._period, self._description = directory, period, description
        self._first = jax.process_index() == 0
        if self._first:
            directory.mkdir(parents=True, exist_ok=True)

    def _part(self, number: int) -> pathlib.Path:
        return self._directory / f"part-{number:06}.jsonl"

    def run(self, batches: Iterator[list[Row]], records: Any) -> None:
        """Computes the parts that are not there yet."""
        with Progress(None, self._description, "batches") as progress:
            for number in itertools.count():
                group = list(itertools.islice(batches, self._period))
                if not group:
                    return
                if not self._part(number).exists():
                    lines = []
                    for offset, batch in enumerate(group):
                        lines += records(number * self._period + offset, batch)
                        progress.update()
                    if self._first:
                        write_atomically(self._part(number), "".join(lines))

    def join(self, output: pathlib.Path, digest: str) -> None:
        """Puts all parts into one file, then removes them."""
        if not self._first:
            return
        temporary = output.with_name(output.name + ".tmp")
        with open(temporary, "wb") as whole:
            for part in sorted(self._directory.glob("part-*.jsonl")):
                with open(part, "rb") as file:
                    shutil.copyfileobj(file, whole)
        temporary.replace(output)
        write_atomically(output.with_name(f".{output.name}.settings"), digest)
        shutil.rmtree(self._directory)
