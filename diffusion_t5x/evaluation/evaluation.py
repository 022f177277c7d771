"""Evaluation of decoded text: during training, and of many checkpoints in a batch.

Long, because both share the evaluator, whose every result is also a file that a restart reads.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf
from etils import epath

import diffusion_t5x
from diffusion_t5x import paths
from diffusion_t5x.checkpointing import integrity
from diffusion_t5x.checkpointing.checkpoints import RestoreCheckpointConfig, select_checkpoints
from diffusion_t5x.checkpointing.integrity import DamagedCheckpointError
from diffusion_t5x.data import datasets, lengths, programs, task_checks
from diffusion_t5x.data.detokenize import detokenize
from diffusion_t5x.data.task_checks import MetricError
from diffusion_t5x.evaluation import candidate_chunks, checkpoint_queue, results, task_metrics
from diffusion_t5x.evaluation.candidate_chunks import ChunkFiles, Outputs
from diffusion_t5x.evaluation.compiled_model import (
    CompiledFunction,
    Output,
    Prediction,
    Predictor,
    Scorer,
    prediction_fields,
    restorer,
)
from diffusion_t5x.evaluation.costs import Costs, cost_metrics, sum_costs
from diffusion_t5x.evaluation.likelihoods import LIKELIHOOD_KEYS, Likelihood, summarize
from diffusion_t5x.models import Model
from diffusion_t5x.runtime import directory_lock, resumable
from diffusion_t5x.runtime.files import write_atomically
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.terminal import Progress, print_table

Metrics = dict[str, Any]
Predictions = list[tuple[int, np.ndarray]]  # (index of the example, tokens), as SeqIO asks for


class InferenceEvaluator:
    """Decodes tasks and computes their metrics through `seqio.Evaluator`.

    Attributes:
      tasks: Names of the tasks with metrics; there may be none.
    """

    def __init__(
        self,
        model: Model,
        dataset_cfg: datasets.DatasetConfig,
        partitioner: PjitPartitioner,
        output_dir: str,
        random_seed: int = 0,
        num_examples: int | None = None,
        return_all_decodes: bool = False,
        num_decodes: int = 1,
        decodes_per_chunk: int = 8,
        likelihood: bool = False,
    ):
        """Reads the data.

        Args:
          dataset_cfg: Tasks and split; its lengths may be None for the longest example's.
          output_dir: Directory that gets `{task}/predictions-{step}.jsonl`.
          random_seed: Seed of decoding.
          num_examples: Maximum number of examples per task; None for all.
          return_all_decodes: Pass all samples that the decoder reranks to the metrics.
          num_decodes: Candidates per example, each a text that the decoder gave as its best; above
            1 the metrics get all of them, as pass@k needs.
          decodes_per_chunk: Candidates per example that are decoded, kept and judged at a time;
            a chunk has random keys of its own. Batches hold `batch_size` of them in any case.
          likelihood: Also compute bits per token and perplexity of the targets of every task, of
            one without metrics too (see `likelihoods.summarize`).

        Raises:
          ValueError: if a task is unknown, of another vocabulary than the model or without an
            example, two of its metrics give the same key, or settings contradict each other.
          Exception: of a metric that cannot judge the targets here.
        """
        if return_all_decodes and num_decodes > 1:
            raise ValueError(
                f"return_all_decodes = True and NUM_DECODES = {num_decodes}; expected one of them: "
                "either all samples of one decoding, or the best sample of each of several."
            )
        self._chunk_sizes = candidate_chunks.chunk_sizes(num_decodes, decodes_per_chunk)
        self._model, self._batch_size = model, dataset_cfg.batch_size
        self._output_dir = epath.Path(output_dir)
        common = model, partitioner, random_seed, dataset_cfg.batch_size
        self._predict = Predictor(*common, return_cost=True, return_all_decodes=return_all_decodes)
        self._score = Scorer(*common)
        self._settings = {
            "split": dataset_cfg.split,
            "decoder": repr(getattr(model, "decoder", None)),
            "batch_size": dataset_cfg.batch_size,
            "random_seed": random_seed,
            "num_examples": num_examples,
            "task_feature_lengths": dict(dataset_cfg.task_feature_lengths or {}) or None,
            "return_all_decodes": return_all_decodes,
            "num_decodes": num_decodes,
            "decodes_per_chunk": decodes_per_chunk if num_decodes > 1 else None,
            "strip_markup": programs.strips_markup(),
            "version": diffusion_t5x.__version__,
        }
        self._evaluators: dict[str, seqio.Evaluator | task_metrics.Unmeasured] = {}
        self._judges: dict[str, candidate_chunks.TaskJudges] = {}
        self._prepared: set[str] = set()  # tasks whose targets were judged themselves
        self._likelihood = likelihood
        for task in task_metrics.measured_tasks(model, dataset_cfg, likelihood):
            if not dataset_cfg.use_cached:
                task_checks.check_not_empty(task, dataset_cfg.split)
            converter = model.FEATURE_CONVERTER_CLS(pack=False)
            evaluator = task_metrics.read_examples(task, converter, dataset_cfg, num_examples)
            self._evaluators[task.name] = evaluator
            if isinstance(evaluator, seqio.Evaluator):
                task_metrics.check_keys(evaluator, task, LIKELIHOOD_KEYS if likelihood else ())
            if likelihood or task.score_metric_fns:
                self._settings["objective"] = repr(getattr(model, "objective", None))
            judges = candidate_chunks.TaskJudges(self._evaluators[task.name], task.name)
            judges.check()
            self._judges[task.name] = judges
        self.tasks = tuple(self._evaluators)
        self._cut = {
            name: lengths.cut_of_evaluated(name, evaluator, dataset_cfg, num_examples)
            for name, evaluator in self._evaluators.items()
        }
        if jax.process_index() == 0:
            for name, cut in self._cut.items():
                lengths.say(f"{name}:{dataset_cfg.split}", cut, dataset_cfg)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """All that decides the results besides the parameters."""
        digests = {
            name: task_metrics.digest_of_examples(evaluator, name)
            for name, evaluator in self._evaluators.items()
        }
        return {**self._settings, "examples": digests}

    def evaluate(
        self,
        params: Any,
        step: int,
        tasks: Sequence[str] | None = None,
        resume_key: str | None = None,
    ) -> dict[str, Metrics]:
        """Decodes and measures.

        Args:
          params: The network's parameters.
          step: The step of the parameters, which names files.
          tasks: Some of `self.tasks`; None for all.
          resume_key: The key of these parameters and settings; with it, chunks of candidates are
            kept until `forget` is called, and are not drawn again.

        Returns:
          task -> metric -> value, a float or, of what only TensorBoard shows, another JSON value;
          besides the task's metrics 'examples' and what decoding cost (`cost_metrics`), for a
          feature that the lengths cut 'inputs_cut', of how many examples, and 'inputs_tokens_cut',
          and with `likelihood` what `likelihoods.summarize` returns.

        Raises:
          MetricError: if a metric fails.
        """
        return {
            name: self._evaluate(name, params, step, resume_key) for name in tasks or self.tasks
        }

    def _chunk_dir(self, name: str, step: int) -> epath.Path:
        return self._output_dir / name / f".candidates-{step}"

    def forget(self, name: str, step: int) -> None:
        """Removes the chunks of a task, whose results are known."""
        if jax.process_index() == 0:
            self._chunk_dir(name, step).rmtree(missing_ok=True)

    def _evaluate(self, name: str, params: Any, step: int, resume_key: str | None) -> Metrics:
        """Decodes and measures one task; SeqIO calls back for what its metrics need."""
        decoded: Outputs = {}
        costs: Costs = {}
        if name not in self._prepared:
            self._judges[name].prepare(self._output_dir / name)
            self._prepared.add(name)

        def predict(dataset: tf.data.Dataset) -> Predictions:
            nonlocal decoded, costs
            if sum(self._chunk_sizes) == 1:
                pairs, seconds = self._run(self._predict, f"predict {name}", params, dataset)
                decoded = {index: (found.tokens, found.aux["scores"]) for index, found in pairs}
                costs = sum_costs((found.costs for _, found in pairs), seconds)
            else:
                decoded, costs = candidate_chunks.draw(
                    functools.partial(self._predict_chunk, name, params, dataset),
                    self._chunk_sizes,
                    self._judges[name],
                    ChunkFiles(self._chunk_dir(name, step), resume_key) if resume_key else None,
                )
            return [(index, tokens) for index, (tokens, _) in decoded.items()]

        def predict_with_aux(dataset: tf.data.Dataset) -> tuple[Predictions, dict[str, Any]]:
            return predict(dataset), {"scores": [scores for _, scores in decoded.values()]}

        scored: list[tuple[int, Likelihood]] = []

        def score(dataset: tf.data.Dataset) -> list[tuple[int, float]]:
            if not scored:
                scored.extend(self._run(self._score, f"score {name}", params, dataset)[0])
            return [(index, found.score) for index, found in scored]

        evaluator = self._evaluators[name]
        values: Metrics = {}
        if isinstance(evaluator, seqio.Evaluator):
            try:
                future, _ = evaluator.evaluate(
                    compute_metrics=True,
                    step=step,
                    predict_fn=predict,
                    predict_with_aux_fn=predict_with_aux,
                    score_fn=score,
                )
                found = future.result()[name]
                values = task_metrics.record(str(self._output_dir), name, step, found)
            except (TypeError, ValueError) as error:
                evaluator._metrics_future = None  # it would raise the error again next time
                is_metrics = str(error).startswith("Failed to evaluate task")
                if not is_metrics and not isinstance(error, TypeError):
                    raise
                raise MetricError.of(name, error) from error
        if self._likelihood:
            score(evaluator.cached_model_datasets[name])
            values |= summarize(found for _, found in scored)
        for feature, cut in self._cut[name].items():
            values |= {f"{feature}_cut": cut.examples, f"{feature}_tokens_cut": cut.tokens}
        if decoded or scored:
            values["examples"] = len(decoded or scored)
        if decoded:
            values |= cost_metrics(costs, len(decoded))
            self._write_predictions(name, step, decoded)
        return values

    def _predict_chunk(
        self, name: str, params: Any, dataset: tf.data.Dataset, number: int, size: int
    ) -> tuple[Outputs, Costs]:
        """Decodes each example `size` times, with the random keys of chunk `number`."""
        title = f"predict {name} {number}"
        pairs, seconds = self._run(self._predict, title, params, dataset, number, repeats=size)
        groups: dict[int, list[Prediction]] = {}
        for index, found in pairs:
            groups.setdefault(index, []).append(found)
        stacked = {
            index: (
                np.stack([found.tokens for found in group]),
                np.stack([found.aux["scores"] for found in group]),
            )
            for index, group in groups.items()
        }
        return stacked, sum_costs((found.costs for _, found in pairs), seconds)

    def _run(
        self,
        function: CompiledFunction[Output],
        title: str,
        params: Any,
        dataset: tf.data.Dataset,
        *position: int,
        repeats: int = 1,
    ) -> tuple[list[tuple[int, Output]], float]:
        """Runs a compiled function over an enumerated dataset, `repeats` times each example."""
        total = int(dataset.cardinality()) * repeats
        if repeats > 1:
            dataset = dataset.flat_map(
                lambda *example: tf.data.Dataset.from_tensors(example).repeat(repeats)
            )
        batches = dataset.batch(self._batch_size).as_numpy_iterator()
        with Progress(total if total >= 0 else None, title, "examples") as progress:
            pairs, seconds = function.run_batches(params, batches, progress, *position)
        return [(int(index), output) for index, output in pairs], seconds

    def _write_predictions(self, name: str, step: int, predictions: Outputs) -> None:
        if jax.process_index() != 0:
            return
        vocabulary = self._model.output_vocabulary
        examples = self._evaluators[name].cached_task_datasets[name].as_numpy_iterator()
        lines = []
        for index, example in enumerate(examples):
            record = {
                "inputs": _text(example, "inputs", self._model.input_vocabulary),
                "target": _text(example, "targets", vocabulary),
                **prediction_fields(*predictions[index], vocabulary),
            }
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        write_atomically(self._output_dir / name / f"predictions-{step}.jsonl", "".join(lines))


def _text(example: Mapping[str, Any], feature: str, vocabulary: Any) -> str | None:
    """Returns a feature's own text where the task kept it, else its tokens decoded."""
    if f"{feature}_pretokenized" in example:
        return example[f"{feature}_pretokenized"].decode("utf-8", "replace")
    return detokenize(example[feature], vocabulary) if feature in example else None


def evaluate(
    *,
    model: Model,
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
    """Evaluates one, several or all checkpoints of a run; finished evaluations are not repeated.

    The run may still go on: checkpoints that it saves meanwhile are evaluated as well, and those
    that it deletes are named.

    Writes `{output_dir}/checkpoint_{step}/{task}.json` for each checkpoint and task as soon as it
    is known, `results.json` and `results.md` at the end.

    Args:
      inference_evaluator_cls: Makes the evaluator.
      best_metric: Metric that picks the best checkpoint, 'metric' or 'task/metric'; None for no
        choice.
      best_mode: 'max' or 'min', the better end of the metric.
      random_seed: Seed of decoding.
      dry_run: Read data and list checkpoints, and stop.

    Returns:
      The content of `results.json`: 'rows', each with 'step', 'task' and 'metrics', and 'best'.

    Raises:
      FileNotFoundError: if there is no checkpoint, or none is left that can be evaluated.
      InUseError: if another evaluation writes to `output_dir`.
      CheckpointMismatchError: if one does not fit the model.
      DamagedCheckpointError, MetricError: if a checkpoint is not as it was written, or a metric of
        a task fails; all other results are written before.
      OSError: if `output_dir` cannot be written to.
      ValueError: if a task or the metric is unknown, or no task has metrics and the split.
    """
    if best_mode not in ("max", "min"):
        raise ValueError(f"best_mode = {best_mode!r}; expected 'max' or 'min'.")
    directory = paths.writable(output_dir, "EVAL_OUTPUT_DIR")
    checkpoints = select_checkpoints(restore_checkpoint_cfg)
    evaluator = inference_evaluator_cls(
        model=model,
        dataset_cfg=dataset_cfg,
        partitioner=partitioner,
        output_dir=str(directory),
        random_seed=random_seed,
    )
    if not evaluator.tasks:
        raise ValueError(
            f"no task of {dataset_cfg.mixture_or_task_name!r} has metrics and a split "
            f"{dataset_cfg.split!r} (datasets.DatasetConfig.split)."
        )
    if dry_run:
        print(f"tasks: {', '.join(evaluator.tasks)}")
        print(f"checkpoints: {', '.join(path for _, path in checkpoints)}")
        return {"rows": [], "best": None}
    restore = restorer(model, partitioner, restore_checkpoint_cfg)
    rows: list[dict[str, Any]] = []
    complete: list[dict[str, Any]] = []
    failed: list[ValueError] = []
    with (
        directory_lock.hold(str(directory), "EVAL_OUTPUT_DIR"),
        Progress(len(checkpoints), "evaluating", "checkpoints") as progress,
    ):
        queue = checkpoint_queue.until_empty(
            restore_checkpoint_cfg, checkpoints, lambda: bool(rows or failed)
        )
        for step, path in queue:
            into = directory / f"checkpoint_{step}"
            try:
                settings = {"checkpoint": path, "parameters": restore_checkpoint_cfg.parameters}
                found = _evaluate_checkpoint(evaluator, restore, into, step, settings, failed)
            except DamagedCheckpointError as error:
                print(f"{error}\nIt is left out.", flush=True)
                failed.append(error)
                found = []
            rows += found
            if len(found) == len(evaluator.tasks):
                complete += found
            progress.update()
    if not rows and not failed:
        raise FileNotFoundError(
            "nothing was evaluated: the run deleted each checkpoint that CHECKPOINT_PATH = "
            f"{restore_checkpoint_cfg.path!r} selects before it could be read. Let it keep more "
            "(checkpoints.SaveCheckpointConfig.keep)."
        )
    best = None
    if best_metric and complete:
        best = results.choose_best(complete, best_metric, best_mode)
    content = {"rows": rows, "best": best, "settings": evaluator.settings}
    if jax.process_index() == 0:
        results.write_results(directory, content)
        print_table(*results.tabulate(content))
    if failed:
        raise type(failed[0])("\n".join(dict.fromkeys(map(str, failed)))) from failed[0]
    return content


def _evaluate_checkpoint(
    evaluator: InferenceEvaluator,
    restore: Callable[[str], Any],
    directory: epath.Path,
    step: int,
    settings: Mapping[str, Any],
    failed: list[ValueError],
) -> list[dict[str, Any]]:
    """Returns the rows of one checkpoint, which `settings` say, from files where they are known.

    There are fewer rows than tasks if the checkpoint vanishes before all are evaluated, or if
    metrics fail, whose errors are added to `failed`.
    """
    settings, path = {**evaluator.settings, **settings}, settings["checkpoint"]
    if save := integrity.save_number(path):
        settings["save"] = save
    key = resumable.digest(settings)
    rows: list[dict[str, Any]] = []
    params = None
    for task in evaluator.tasks:
        file = directory / f"{task}.json"
        if (row := resumable.load(file, key)) is None:
            if params is None:
                params = checkpoint_queue.restore_or_none(restore, path)
            if params is None:
                print(
                    f"{path} is gone: the run no longer keeps it. {len(rows)} of "
                    f"{len(evaluator.tasks)} tasks are evaluated; it cannot be the best."
                )
                return rows
            try:
                metrics = evaluator.evaluate(params, step, [task], key)[task]
            except MetricError as error:
                print(f"{path}: {error}", flush=True)
                failed.append(error)
                continue
            row = {"step": step, "task": task, "metrics": metrics, "settings": settings}
            resumable.save(file, key, row, indent=1)
            evaluator.forget(task, step)
            row["digest"] = key
        rows.append(row)
    return rows
