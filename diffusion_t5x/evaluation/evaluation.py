"""Evaluation of decoded text: during training, and of many checkpoints in a batch."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf

import diffusion_t5x
from diffusion_t5x.checkpointing.checkpoints import RestoreCheckpointConfig, select_checkpoints
from diffusion_t5x.checkpointing.reading import restore_params
from diffusion_t5x.data import datasets, vocabularies
from diffusion_t5x.data.detokenize import detokenize, end_text
from diffusion_t5x.evaluation import candidate_chunks, results
from diffusion_t5x.evaluation.compiled_model import INIT_SHAPES, Predictor
from diffusion_t5x.runtime.disk_space import stops_when_full
from diffusion_t5x.runtime.files import write_atomically
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.terminal import Progress, print_table
from diffusion_t5x.runtime.train_state import abstract_params

Metrics = dict[str, float]


def task_names(mixture_or_task_name: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    if isinstance(mixture_or_task_name, str):
        return (mixture_or_task_name,)
    return tuple(mixture_or_task_name)


class InferenceEvaluator:
    """Decodes tasks and computes their metrics through `seqio.Evaluator`.

    Attributes:
      tasks: names of the tasks with metrics.
      settings: what, besides the parameters, decides the results.
    """

    def __init__(
        self,
        model: Any,
        dataset_cfg: datasets.DatasetConfig,
        partitioner: PjitPartitioner,
        output_dir: str,
        random_seed: int = 0,
        num_examples: int | None = None,
        return_all_decodes: bool = False,
        num_decodes: int = 1,
        decodes_per_chunk: int = 8,
    ):
        """Reads the data.

        Args:
          model: of `models.Model`'s kind.
          dataset_cfg: which tasks and split; its lengths may be None for the longest example's.
          partitioner: devices and sharding.
          output_dir: gets `{task}/predictions-{step}.jsonl`.
          random_seed: of decoding.
          num_examples: at most so many of each task; None for all.
          return_all_decodes: hand all samples that the decoder reranks to the metrics.
          num_decodes: candidates per example, each a text that the decoder gave as its best; above
            1 the metrics get all of them, as pass@k wants.
          decodes_per_chunk: candidates per example that are decoded, kept and judged at a time;
            chunk `c` has keys of its own, so that it is the same whether others were drawn or not.
            A batch holds `batch_size` of them at once whatever this is.

        Raises:
          ValueError: if a task is unknown or of another vocabulary than the model, none has metrics
            on the split, or settings contradict each other.
        """
        if return_all_decodes and num_decodes > 1:
            raise ValueError(
                f"return_all_decodes = True and NUM_DECODES = {num_decodes}; expected one of them: "
                "either all samples of one decoding, or the best sample of each of several."
            )
        self._chunks = candidate_chunks.ChunkConfig(num_decodes, decodes_per_chunk)
        datasets.import_task_module(dataset_cfg.module)
        self._model, self._partitioner, self._cfg = model, partitioner, dataset_cfg
        self._output_dir = pathlib.Path(output_dir)
        self._predict = Predictor(
            model, partitioner, random_seed, return_all_decodes=return_all_decodes
        )
        self.settings = {
            "split": dataset_cfg.split,
            "decoder": repr(getattr(model, "decoder", None)),
            "batch_size": dataset_cfg.batch_size,
            "random_seed": random_seed,
            "num_examples": num_examples,
            "task_feature_lengths": dict(dataset_cfg.task_feature_lengths or {}) or None,
            "return_all_decodes": return_all_decodes,
            "num_decodes": num_decodes,
            "decodes_per_chunk": decodes_per_chunk if num_decodes > 1 else None,
            "version": diffusion_t5x.__version__,
        }
        self._evaluators: dict[str, seqio.Evaluator] = {}
        for name in task_names(dataset_cfg.mixture_or_task_name):
            for task in seqio.get_subtasks(datasets.get_mixture_or_task(name)):
                vocabularies.check_task(task, model.input_vocabulary, model.output_vocabulary)
                if dataset_cfg.split in task.splits and task.metric_fns:
                    self._evaluators[task.name] = self._make_evaluator(task.name, num_examples)
        if not self._evaluators:
            raise ValueError(
                f"no task of {dataset_cfg.mixture_or_task_name!r} has metrics and a split "
                f"{dataset_cfg.split!r}."
            )
        self.tasks = tuple(self._evaluators)

    def _make_evaluator(self, name: str, num_examples: int | None) -> seqio.Evaluator:
        return seqio.Evaluator(
            name,
            feature_converter=self._model.FEATURE_CONVERTER_CLS(pack=False),
            eval_split=self._cfg.split,
            use_cached=self._cfg.use_cached,
            seed=self._cfg.seed,
            sequence_length=self._cfg.task_feature_lengths,
            num_examples=num_examples,
        )

    def evaluate(
        self,
        params: Any,
        step: int,
        tasks: Sequence[str] | None = None,
        resume_key: str | None = None,
    ) -> dict[str, Metrics]:
        """Decodes and measures.

        Args:
          params: the network's parameters.
          step: they were trained for, in the names of files.
          tasks: some of `self.tasks`; by default all.
          resume_key: tells these parameters and settings from all others; with it, chunks of
            candidates are kept until `forget` is called, and are not drawn again.

        Returns:
          task -> metric -> value; besides the task's metrics 'examples' and
          'decode_seconds_per_example' (all candidates of one), which does not count compilation.
        """
        self._resume_key = resume_key
        return {name: self._evaluate(name, params, step) for name in tasks or self.tasks}

    def _chunk_dir(self, name: str, step: int, key: str) -> pathlib.Path:
        return self._output_dir / name / f".candidates-{step}-{key}"

    def forget(self, name: str, step: int, resume_key: str) -> None:
        """Removes the chunks of a task, whose results are known."""
        candidate_chunks.forget(self._chunk_dir(name, step, resume_key))

    def _draw(self, name: str, params: Any, step: int, dataset: Any) -> candidate_chunks.Outputs:
        """All candidates of a task's examples."""

        def chunk(number: int, size: int) -> tuple[candidate_chunks.Outputs, float]:
            self._predict.seconds = 0.0
            outputs = self._run("predict", name, params, dataset, (number,), size)
            return outputs, self._predict.seconds

        judges = candidate_chunks.TaskJudges(self._evaluators[name], name)
        key = self._resume_key
        directory = self._chunk_dir(name, step, key) if key else None
        outputs, self._predict.seconds = candidate_chunks.draw(
            chunk, self._chunks, judges, directory
        )
        return outputs

    def _evaluate(self, name: str, params: Any, step: int) -> Metrics:
        evaluator = self._evaluators[name]
        self._predict.seconds = 0.0
        predictions: dict[int, tuple[np.ndarray, Any]] = {}

        def predict(dataset: Any) -> list[tuple[int, np.ndarray]]:
            if self._chunks.num_decodes > 1:
                predictions.update(self._draw(name, params, step, dataset))
            else:
                predictions.update(self._run("predict", name, params, dataset))
            return [(index, tokens) for index, (tokens, _) in predictions.items()]

        def predict_with_aux(dataset: Any) -> tuple[list[tuple[int, np.ndarray]], dict[str, list]]:
            return predict(dataset), {"scores": [scores for _, scores in predictions.values()]}

        def score(dataset: Any) -> list[tuple[int, float]]:
            return list(self._run("score", name, params, dataset).items())

        future, _ = evaluator.evaluate(
            compute_metrics=True,
            step=step,
            predict_fn=predict,
            predict_with_aux_fn=predict_with_aux,
            score_fn=score,
        )
        values = {
            key: float(getattr(value, "value", value))
            for key, value in future.result()[name].items()
        }
        if predictions:
            values["examples"] = len(predictions)
            values["decode_seconds_per_example"] = self._predict.seconds / len(predictions)
            self._write_predictions(name, step, predictions)
        return values

    def _run(
        self,
        mode: str,
        name: str,
        params: Any,
        dataset: Any,
        position: tuple[int, ...] = (),
        repeats: int | None = None,
    ) -> dict[int, Any]:
        """index -> outputs of the examples of an enumerated dataset.

        Args:
          mode: 'predict' or 'score'.
          name: of the task.
          params: the network's parameters.
          dataset: of (index, features).
          position: numbers that, before a batch's index, decide its key.
          repeats: rows per example; its outputs are then stacked, `[repeats, ...]`.
        """
        outputs: dict[int, list[Any]] = {}
        size = self._cfg.batch_size
        eos_id = self._model.output_vocabulary.eos_id
        total = int(dataset.cardinality()) * (repeats or 1)
        if repeats is not None:
            dataset = dataset.flat_map(
                lambda *example: tf.data.Dataset.from_tensors(example).repeat(repeats)
            )
        title = " ".join([mode, name, *map(str, position)])
        with Progress(total if total >= 0 else None, title, "examples") as progress:
            for number, (indices, batch) in enumerate(dataset.batch(size).as_numpy_iterator()):
                padded = datasets.pad_batch(batch, size)
                result = self._predict(mode, params, padded, *position, number)
                for row, index in enumerate(indices):
                    output: Any
                    if mode == "score":
                        output = float(result[row])
                    else:
                        tokens, aux = result
                        output = end_text(tokens[row], eos_id), aux["scores"][row]
                    outputs.setdefault(int(index), []).append(output)
                progress.update(len(indices))
        if repeats is None:
            return {index: output for index, [output] in outputs.items()}
        return {
            index: tuple(np.stack(parts) for parts in zip(*several, strict=True))
            for index, several in outputs.items()
        }

    def _write_predictions(
        self, name: str, step: int, predictions: Mapping[int, tuple[np.ndarray, Any]]
    ) -> None:
        if jax.process_index() != 0:
            return
        vocabulary = self._model.output_vocabulary
        examples = self._evaluators[name].cached_task_datasets[name].as_numpy_iterator()
        lines = []
        for index, example in enumerate(examples):
            tokens, scores = predictions[index]
            samples = [detokenize(row, vocabulary) for row in np.atleast_2d(tokens)]
            record: dict[str, Any] = {
                "inputs": _text(example, "inputs", self._model.input_vocabulary),
                "target": _text(example, "targets", vocabulary),
                "prediction": samples[-1],
                "score": float(np.atleast_1d(scores)[-1]),
            }
            if len(samples) > 1:
                record["samples"] = samples
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        write_atomically(self._output_dir / name / f"predictions-{step}.jsonl", "".join(lines))


def _text(example: Mapping[str, Any], feature: str, vocabulary: Any) -> str | None:
    """A feature's own text where the task kept it, else its tokens decoded."""
    if f"{feature}_pretokenized" in example:
        return example[f"{feature}_pretokenized"].decode("utf-8", "replace")
    return detokenize(example[feature], vocabulary) if feature in example else None


def evaluate(
    *,
    model: Any,
    dataset_cfg: datasets.DatasetConfig,
    restore_checkpoint_cfg: RestoreCheckpointConfig,
    partitioner: PjitPartitioner,
    output_dir: str,
    inference_evaluator_cls: Callable[..., InferenceEvaluator] = InferenceEvaluator,
    best_metric: str | None = None,
    best_mode: str = "max",
    random_seed: int = 0,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Evaluates one, several or all checkpoints of a run; what is done already is not redone.

    Writes `{output_dir}/checkpoint_{step}/{task}.json` for each checkpoint and task as soon as it
    is known, `results.json` and `results.md` at the end.

    Args:
      model: of `models.Model`'s kind.
      dataset_cfg: tasks and split.
      restore_checkpoint_cfg: which checkpoints.
      partitioner: devices and sharding.
      output_dir: directory for results.
      inference_evaluator_cls: makes the evaluator.
      best_metric: metric that picks the best checkpoint, 'metric' or 'task/metric'; None for no
        choice.
      best_mode: whether the best is the 'max' or the 'min'.
      random_seed: of decoding.
      dry_run: read data and list checkpoints, and stop.

    Returns:
      What `results.json` holds: 'rows', each with 'step', 'task' and 'metrics', and 'best'.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      DamagedCheckpointError: if a checkpoint is not as it was written.
      CheckpointMismatchError: if one does not fit the model.
      DiskFull: if something cannot be written for lack of room.
      ValueError: if a task or the metric is unknown.
    """
    if best_mode not in ("max", "min"):
        raise ValueError(f"best_mode = {best_mode!r}; expected 'max' or 'min'.")
    checkpoints = select_checkpoints(restore_checkpoint_cfg)
    evaluator = inference_evaluator_cls(
        model=model,
        dataset_cfg=dataset_cfg,
        partitioner=partitioner,
        output_dir=output_dir,
        random_seed=random_seed,
    )
    if dry_run:
        print(f"tasks: {', '.join(evaluator.tasks)}")
        print(f"checkpoints: {', '.join(path for _, path in checkpoints)}")
        return {"rows": [], "best": None}
    abstract = abstract_params(model, partitioner, INIT_SHAPES, {})
    rows = []
    with stops_when_full(output_dir):
        with Progress(len(checkpoints), "evaluating", "checkpoints") as progress:
            for step, path in checkpoints:
                rows += _evaluate_checkpoint(
                    evaluator, abstract, pathlib.Path(output_dir), step, path
                )
                progress.update()
        best = results.choose_best(rows, best_metric, best_mode) if best_metric else None
        found = {"rows": rows, "best": best, "settings": evaluator.settings}
        if jax.process_index() == 0:
            results.write_results(output_dir, found)
            print_table(*results.tabulate(found))
    return found


def _evaluate_checkpoint(
    evaluator: InferenceEvaluator, abstract: Any, output_dir: pathlib.Path, step: int, path: str
) -> list[dict[str, Any]]:
    """Rows of one checkpoint, from files where they are known already."""
    settings = {**evaluator.settings, "checkpoint": path}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8)
    rows, params = [], None
    for task in evaluator.tasks:
        file = output_dir / f"checkpoint_{step}" / f"{task}.json"
        if file.exists():
            row = json.loads(file.read_text(encoding="utf-8"))
            if row["digest"] == digest.hexdigest():
                rows.append(row)
                continue
        if params is None:
            try:
                params = restore_params(path, abstract)
            except FileNotFoundError:
                print(f"{path} is gone: the run no longer keeps it; skipped.")
                return rows
        key = digest.hexdigest()
        row = {
            "step": step,
            "task": task,
            "metrics": evaluator.evaluate(params, step, [task], key)[task],
            "settings": settings,
            "digest": key,
        }
        if jax.process_index() == 0:
            write_atomically(file, json.dumps(row, indent=1))
        evaluator.forget(task, step, key)
        rows.append(row)
    return rows
