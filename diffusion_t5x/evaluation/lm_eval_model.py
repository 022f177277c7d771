"""Our models for the tasks of lm-eval, EleutherAI's harness (github.com/EleutherAI)."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_t5x import paths
from diffusion_t5x.checkpointing.checkpoints import RestoreCheckpointConfig, select_checkpoints
from diffusion_t5x.data import datasets
from diffusion_t5x.data.detokenize import detokenize
from diffusion_t5x.evaluation.compiled_model import CompiledFunction, Predictor, Scorer, restorer
from diffusion_t5x.models import Model
from diffusion_t5x.names import check_known
from diffusion_t5x.runtime.files import write_atomically
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.terminal import Progress, print_table

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable
except ImportError as error:
    raise ImportError(f"lm-eval needs: pip install 'diffusion_t5x[lm-eval]' ({error})") from error

SHORTEST = 16  # tokens of the shortest array
_KEPT_RESULTS = ("results", "groups", "n-shot", "n-samples", "higher_is_better", "versions")


class _Continuation(CompiledFunction[tuple[float, bool]]):
    """The score of targets, and whether greedy decoding writes them, compiled."""

    NAME = "log-likelihood"

    def _run(self, params: Any, batch: Mapping[str, jax.Array], rng: jax.Array) -> Any:
        scores = self._model.score_batch(params, batch)
        return scores, self._model.is_greedy_batch(params, batch, rng)

    def _split(self, result: Any, rows: int) -> list[tuple[float, bool]]:
        scores, greedy = result
        return [(float(scores[row]), bool(greedy[row])) for row in range(rows)]


class _Piece(NamedTuple):
    """Tokens that are scored in one row."""

    request: int  # of which request they are
    prefix: list[int]
    target: list[int]


class LanguageModel(TemplateLM):
    """A model with its parameters, as lm-eval asks for one.

    A request's context is the prefix and its continuation the target, whose tokens alone count. The
    score is the objective's: exact under AR, a bound under diffusion, given the continuation's
    length (what is after it in the canvas is the end of text and padding, and not counted). What is
    longer than a target is scored piece by piece, each after all before it, and summed. Prefixes
    that are too long lose their first tokens, and how many do is printed.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        partitioner: PjitPartitioner,
        task_feature_lengths: Mapping[str, int],
        batch_size: int,
        random_seed: int = 0,
    ):
        """Prepares the model.

        Args:
          task_feature_lengths: Most tokens of a prefix, 'inputs', and of a target, 'targets'.
          batch_size: Rows of a batch.
          random_seed: Seed of decoding.
        """
        super().__init__()
        self._model, self._params, self._batch_size = model, params, batch_size
        self._vocabulary = model.output_vocabulary
        self._lengths = task_feature_lengths
        self._common = model, partitioner, random_seed, batch_size
        self._continuation, self._score = _Continuation(*self._common), Scorer(*self._common)
        self._predictors: dict[Any, Predictor] = {}
        self._said: set[str] = set()

    @property
    def eot_token_id(self) -> int:
        """The token that ends texts."""
        return self._vocabulary.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that begins texts where the tokenizer begins them so, else padding: none."""
        vocabulary: Any = self._vocabulary
        return vocabulary.bos_id if getattr(vocabulary, "adds_bos", False) else 0

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns the tokens of a text."""
        begin = [self.prefix_token_id] if add_special_tokens is not False else []
        return [token for token in begin if token] + [*self._vocabulary.encode(string)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each whole text, its tokens counted once."""
        texts = [self.tok_encode(one.args[0], add_special_tokens=False) for one in requests]
        scored = self._run_pieces(
            self._score, [([self.prefix_token_id], tokens) for tokens in texts], "windows"
        )
        return [sum(one.score for one in pieces) for pieces in scored]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        scored = self._run_pieces(self._continuation, pairs, "contexts")
        return [(sum(s for s, _ in pieces), all(g for _, g in pieces)) for pieces in scored]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Decodes a text after each context, up to the first of the request's `until` texts.

        The decoder's settings are gin's, but for those that the task names; its temperature counts
        if it asks for samples (`do_sample`). `max_gen_toks` tokens, at most those of a target, are
        the length of the canvas.
        """
        groups: dict[Any, list[_Piece]] = collections.defaultdict(list)
        stops = []
        for index, request in enumerate(requests):
            context, settings = request.args
            until, length, overrides = self._generation_settings(settings)
            stops.append(until)
            prefix = self.tok_encode(context)
            groups[length, overrides].append(_Piece(index, prefix, [0] * length))
        texts = [""] * len(requests)
        with Progress(len(requests), "generate", "requests") as progress:
            for (_, overrides), pieces in groups.items():
                if overrides not in self._predictors:
                    fields: Any = dict(overrides)
                    self._predictors[overrides] = Predictor(*self._common, **fields)
                function = self._predictors[overrides]
                for piece, found in self._run(function, pieces, progress, "contexts"):
                    text = detokenize(found.tokens, self._vocabulary)
                    stop = stops[piece.request]
                    texts[piece.request] = postprocess_generated_text(text, stop, None)
        return texts

    def _generation_settings(
        self, settings: Mapping[str, Any]
    ) -> tuple[list[str], int, tuple[tuple[str, Any], ...]]:
        """Returns stop texts, tokens of a text, and fields of the decoder that the task sets."""
        most = self._lengths["targets"]
        values = dict(normalize_gen_kwargs(dict(settings), default_max_gen_toks=most))
        until = [text for text in values.pop("until") if text]
        length = values.pop("max_gen_toks")
        if length > most:
            self._say(
                f"max_gen_toks = {length}, but TASK_FEATURE_LENGTHS['targets'] = {most}: "
                f"texts have at most {most} tokens."
            )
        if not values.pop("do_sample"):
            values.pop("temperature", None)
        known = {field.name for field in dataclasses.fields(self._model.decoder)}  # type: ignore[arg-type]
        for name in sorted(values.keys() - known):
            self._say(
                f"generation setting {name} = {values.pop(name)!r} is left out: "
                f"{type(self._model.decoder).__name__} has none of this name."
            )
        return until, min(length, most), tuple(sorted(values.items()))

    def _say(self, line: str) -> None:
        if line not in self._said and jax.process_index() == 0:
            print(f"lm-eval: {line}", flush=True)
        self._said.add(line)

    def _run_pieces(
        self, function: CompiledFunction[Any], pairs: Iterable[tuple[list[int], list[int]]], of: str
    ) -> list[list[Any]]:
        """Returns what a function says of each pair's pieces, in the order of pairs."""
        pieces: list[_Piece] = []
        found: list[list[Any]] = []
        most = self._lengths["targets"]
        for index, (context, target) in enumerate(pairs):
            found.append([])
            context = [token for token in context if token]  # noqa: PLW2901
            for start in range(0, len(target), most):
                before = context + target[:start]
                pieces.append(_Piece(index, before, target[start : start + most]))
        with Progress(len(pieces), function.NAME, "pieces") as progress:
            for piece, output in self._run(function, pieces, progress, of):
                found[piece.request].append(output)
        return found

    def _run(
        self,
        function: CompiledFunction[Any],
        pieces: Sequence[_Piece],
        progress: Progress,
        of: str,
    ) -> list[tuple[_Piece, Any]]:
        """Runs a function over pieces, those of like lengths together."""
        most = self._lengths["inputs"]
        if cut := sum(len(piece.prefix) > most for piece in pieces):
            self._say(
                f"{cut:,} of {len(pieces):,} {of} have more than TASK_FEATURE_LENGTHS['inputs'] = "
                f"{most} tokens and lose their first ones."
            )

        def shape(piece: _Piece) -> tuple[int, int]:
            target = len(piece.target)
            if any(piece.target):  # given tokens; else it is a canvas to decode
                target = _bucket(target, self._lengths["targets"])
            return _bucket(len(piece.prefix), most), target

        def batches() -> Iterable[tuple[list[_Piece], datasets.Batch]]:
            for lengths, group in itertools.groupby(sorted(pieces, key=shape), key=shape):
                while rows := list(itertools.islice(group, self._batch_size)):
                    yield rows, self._batch(rows, *lengths)

        return function.run_batches(self._params, batches(), progress)[0]

    def _batch(
        self, pieces: Sequence[_Piece], prefix_length: int, target_length: int
    ) -> datasets.Batch:
        """Returns the features of pieces, `[pieces, length]` each."""
        begin, end = self.prefix_token_id, self._vocabulary.eos_id or 0
        prefixes = np.zeros((len(pieces), prefix_length), np.int32)
        targets = np.zeros((len(pieces), target_length), np.int32)
        weights = np.zeros(targets.shape, np.int32)
        for row, (_, prefix, target) in enumerate(pieces):
            kept = prefix[-prefix_length:] if prefix else []
            if len(kept) < len(prefix) and begin:
                kept[0] = begin
            prefixes[row, : len(kept)] = kept
            targets[row, : len(target)] = target
            if any(target) and len(target) < target_length:
                targets[row, len(target)] = end
            weights[row, : len(target)] = 1
        return {
            "encoder_input_tokens": prefixes,
            "decoder_target_tokens": targets,
            "decoder_input_tokens": np.pad(targets, [(0, 0), (1, 0)])[:, :-1],
            "decoder_loss_weights": weights,
        }


def _bucket(length: int, most: int) -> int:
    """Returns the next power of two, so that few lengths are compiled, and at most `most`."""
    return min(max(SHORTEST, 1 << max(length - 1, 0).bit_length()), most)


def evaluate_tasks(
    *,
    model: Model,
    restore_checkpoint_cfg: RestoreCheckpointConfig,
    partitioner: PjitPartitioner,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    tasks: str | Sequence[str],
    output_dir: str,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    random_seed: int = 0,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Evaluates a checkpoint on tasks of lm-eval, and prints a table of results.

    Writes `{output_dir}/results.json` and `samples-{task}.jsonl`, one line for each document.

    Args:
      restore_checkpoint_cfg: One checkpoint.
      task_feature_lengths: Most tokens of a context, 'inputs', and of what is generated or scored
        at once, 'targets'.
      batch_size: Requests of a batch.
      tasks: Names or patterns of lm-eval's tasks, groups or tags, or of those in `include_path`.
      include_path: A directory of YAML files of tasks; where it has all tasks, no others are read.
      num_fewshot: Examples before each question; None for the task's own number.
      limit: Documents of each task, or a fraction of them if less than 1; None for all.
      random_seed: Seed of decoding.
      dry_run: Find tasks and checkpoint, and stop.

    Returns:
      What lm-eval returns.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      CheckpointMismatchError: if it does not fit the model.
      OSError: if `output_dir` cannot be written to.
      ValueError: if a task is unknown.
    """
    names = [tasks] if isinstance(tasks, str) else [*tasks]
    directory = paths.writable(output_dir, "LM_EVAL_OUTPUT_DIR")
    manager = _find_tasks(names, include_path)
    _, path = select_checkpoints(restore_checkpoint_cfg)[-1]
    if dry_run:
        print(f"{path}: {', '.join(names)}")
        return {}
    params = restorer(model, partitioner, restore_checkpoint_cfg)(path)
    # lm-eval would fork for its bootstrap, which a process with JAX's threads does not survive.
    os.environ["DISABLE_MULTIPROC"] = "1"
    results = lm_eval.simple_evaluate(
        LanguageModel(model, params, partitioner, task_feature_lengths, batch_size, random_seed),
        tasks=names,
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=1000,
    )
    if jax.process_index() == 0:
        encode: Callable[[Any], str] = lambda value: json.dumps(  # noqa: E731
            value, ensure_ascii=False, default=handle_non_serializable
        )
        for task, samples in results["samples"].items():
            lines = "".join(encode(sample) + "\n" for sample in samples)
            write_atomically(directory / f"samples-{task}.jsonl", lines)
        kept = {name: results[name] for name in _KEPT_RESULTS if name in results}
        write_atomically(directory / "results.json", encode({**kept, "checkpoint": path}))
        # lm-eval's own table would fork processes.
        rows = [
            [task, name, value]
            for task, values in results["results"].items()
            for name, value in values.items()
            if isinstance(value, int | float)
        ]
        print_table(["task", "metric", "value"], rows)
    return results


def _find_tasks(names: Sequence[str], include_path: str | None) -> TaskManager:
    """Returns lm-eval's manager of tasks that knows all names.

    Raises:
      ValueError: if there is no name, or one is unknown.
    """
    if not names:
        raise ValueError("LM_EVAL_TASKS = (); expected the name of at least one task.")
    if include_path is not None:
        include_path = paths.expand(include_path, "LM_EVAL_INCLUDE_PATH")
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if all(manager.match_tasks([name]) for name in names):
            return manager
    manager = TaskManager(include_path=include_path)
    for name in names:
        if not manager.match_tasks([name]):
            check_known(name, manager.all_tasks, "LM_EVAL_TASKS")
    return manager
