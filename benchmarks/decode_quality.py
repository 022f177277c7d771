"""What each setting of the diffusion decoder costs and gains on a trained embedded model.

python -m benchmarks.decode_quality                                  # trains all that it needs
python -m benchmarks.decode_quality --task code --checkpoint DIR     # a run of `make demo`, say
python -m benchmarks.decode_quality --task code --checkpoint DIR --markdown --settings rules
python -m benchmarks.decode_quality --task code --checkpoint DIR --baseline PLAIN_DIR \\
    --objective objectives/diffusion_cached_prefix.gin               # trained under that pattern

For each setting one JSON line, or with `--markdown` a row of a table: the task's metric on held-out
text, passes and position-forwards per example (counts without noise), the step after which a
canvas no longer changed, and seconds per example (the median of interleaved rounds), the last three
beside the paper's sampler of the same run. `--settings rules` are all update rules that the model's
noise allows. The baseline decodes with the model itself, or with the one at `--baseline`, which
was trained by `objectives/diffusion.gin`. Without a checkpoint, models of both kinds are trained
first (see `trained_models.py`), for each task; where its texts are long enough, one that writes in
blocks too, measured as its objective's file has it and with the fast preset. Tasks, lengths and the
network are those of `gin/scales/laptop.gin`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import trained_models
from diffusion_t5x import gin_utils, models
from diffusion_t5x.checkpointing.checkpoints import RestoreCheckpointConfig, select_checkpoints
from diffusion_t5x.checkpointing.reading import restore_params
from diffusion_t5x.data import datasets
from diffusion_t5x.data.detokenize import detokenize, end_text
from diffusion_t5x.decoding import stopping, updates
from diffusion_t5x.experiments import experiment_graph
from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.train_state import INIT_SHAPES, abstract_params

PAPERS, CACHED = "objectives/diffusion.gin", "objectives/diffusion_cached_prefix.gin"

TASKS = "diffusion_t5x.tasks"
FAST = "decoders/fast.gin"
# name -> fields of the decoder, beside what the objective's file binds.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "objective": {},
    "stop_unchanged": {"stop": stopping.Unchanged()},
    "stop_score": {"stop": stopping.ScoreSettled(0.1)},
    "trim": {"trim_multiple": 8},
    "halve": {"halve_every": 1},
    "halve_and_stop": {"halve_every": 1, "stop": stopping.Unchanged()},
    "argmax": {"temperature": 0.0},
    "argmax_unrolled": {"update": updates.ArgmaxUnrolled()},
    "resample_half": {"update": updates.ResampleShare(0.5)},
    "entropy_bound": {
        "update": updates.EntropyBound(0.1),
        "stop": stopping.StableAndConfident(0.005),
        "temperature": 0.8,
        "final_temperature": 0.4,
        "num_steps": 48,
        "num_samples": 1,
    },
    **{
        name: {"num_samples": 1, "num_steps": 32, "temperature": 0.0, "update": rule}
        for name, rule in (
            ("confidence", updates.ConfidenceUnmask()),
            ("confidence_margin", updates.ConfidenceUnmask("margin")),
            ("confidence_entropy", updates.ConfidenceUnmask("entropy")),
            ("confidence_threshold", updates.ConfidenceUnmask(threshold=0.9)),
        )
    },
    **{
        name: {"num_samples": 1, "num_steps": 64, "temperature": 1.0, "update": rule}
        for name, rule in (
            ("ancestral", updates.Ancestral()),
            ("remask_capped", updates.Remask("capped", 0.02)),
            ("remask_rescaled", updates.Remask("rescaled", 0.1)),
            ("remask_confidence", updates.Remask("rescaled", 1.0, by_confidence=True)),
        )
    },
    "one_sample": {"num_samples": 1},
    "one_sample_stop": {"num_samples": 1, "stop": stopping.Unchanged()},
}
# What a row of the table has of a record.
COLUMNS = ("decoder", "percent", "passes", "last_change", "position_forwards", "speedup")
# Those that compare update rules.
RULES = ("objective", "argmax", *(name for name, fields in SETTINGS.items() if "update" in fields))


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model and the held-out examples to decode.

    Attributes:
      model: with the decoder of its objective's file.
      fast: the decoder of `decoders/fast.gin`.
      params: its parameters.
      batches: of model features.
      examples: the task's own examples, in the same order.
      task: its settings.
      batch_size: examples per batch.
    """

    model: models.Model
    fast: Any
    params: Any
    batches: list[datasets.Batch]
    examples: list[Mapping[str, Any]]
    task: experiment_graph.TaskSettings
    batch_size: int


def make_model(files: Iterable[str], bindings: Iterable[str]) -> models.Model:
    """The model that gin files and bindings configure."""
    import gin

    gin.clear_config()
    gin_utils.parse_config(files, ["DROPOUT_RATE=0.0", *bindings])
    return gin.get_configurable(models.Model)()


def restore(model: models.Model, checkpoint: str) -> Any:
    """The parameters of the checkpoint at, or last under, `checkpoint`."""
    _, path = select_checkpoints(RestoreCheckpointConfig(checkpoint))[-1]
    abstract = abstract_params(model, PjitPartitioner(), INIT_SHAPES, {})
    return restore_params(path, abstract, verify=False)


def load(
    role: str,
    checkpoint: str,
    objective: str,
    num_examples: int,
    batch_size: int,
    model_file: str | None = None,
    bindings: Iterable[str] = (),
) -> Trained:
    """The checkpoint at, or last under, `checkpoint`, and examples of the task `role`."""
    scale, task = trained_models.settings(role)
    files = (model_file or scale.models["decoder_only/base"], objective)
    fast = make_model([*files, FAST], bindings).decoder
    model = make_model(files, bindings)
    params = restore(model, checkpoint)
    lengths = {"inputs": task.inputs, "targets": task.targets}
    cfg = datasets.DatasetConfig(task.name, lengths, task.test_split, batch_size, module=TASKS)
    num_batches = -(-num_examples // batch_size)
    batches = list(
        datasets.get_eval_batches(cfg, model.FEATURE_CONVERTER_CLS, num_batches=num_batches)
    )
    examples = datasets.get_mixture_or_task(task.name).get_dataset(
        lengths, split=task.test_split, shuffle=False
    )
    examples = list(itertools.islice(examples.as_numpy_iterator(), num_examples))
    return Trained(model, fast, params, batches, examples, task, batch_size)


def position_forwards(aux: Mapping[str, Any], prefix_length: int, rereads: bool) -> float:
    """Returns positions that went through the network, per example, prefixes included.

    Args:
      aux: 'passes' and 'positions' of a decoded batch.
      prefix_length: positions of each prefix.
      rereads: each pass reads the prefix of each canvas again; else it is read once.
    """
    prefixes = aux["passes"] if rereads else np.ones_like(aux["passes"])
    return float(np.mean(aux["positions"] + prefix_length * prefixes))


def last_changes(trajectory: np.ndarray) -> np.ndarray:
    """Returns the step that made the last change to each canvas: `[batch]`, 0 if none did.

    Args:
      trajectory: `[batch, num_steps + 1, length]`.
    """
    differs = np.any(trajectory != trajectory[:, -1:], axis=-1)  # [batch, num_steps + 1]
    return np.max(np.where(differs, np.arange(1, differs.shape[1] + 1), 0), axis=1)


def measure(trained: Trained, decoder: Any) -> Iterator[dict[str, float]]:
    """Decodes everything again and again: the metric, the count, and the seconds of each round."""
    model = trained.model
    eos_id = model.output_vocabulary.eos_id
    fields = {f.name: getattr(decoder, f.name) for f in dataclasses.fields(decoder)}

    @jax.jit
    def predict(params: Any, batch: Any, rng: jax.Array) -> Any:
        return model.predict_batch_with_aux(params, batch, rng, return_cost=True, **fields)

    task = datasets.get_mixture_or_task(trained.task.name)
    targets = [
        task.postprocess_fn(
            detokenize(example["targets"], model.output_vocabulary), example=example, is_target=True
        )
        for example in trained.examples
    ]
    shown = jax.jit(
        functools.partial(model.predict_batch_with_aux, return_trajectory=True, **fields)
    )
    trajectory = shown(trained.params, trained.batches[0], jax.random.PRNGKey(0))[1]["trajectory"]
    last_change = last_changes(np.asarray(trajectory)).mean()
    predict(trained.params, trained.batches[0], jax.random.PRNGKey(0))  # compiles
    prefix_length = trained.batches[0]["encoder_input_tokens"].shape[1]
    rereads = isinstance(model.module, DecoderOnly) and not decoder.prefix_cache
    while True:
        started = time.monotonic()
        results = [
            jax.device_get(
                predict(trained.params, batch, jax.random.fold_in(jax.random.PRNGKey(0), number))
            )
            for number, batch in enumerate(trained.batches)
        ]
        seconds = (time.monotonic() - started) / (len(trained.batches) * trained.batch_size)
        rows = itertools.chain.from_iterable(tokens for tokens, _ in results)
        texts = [
            task.postprocess_fn(
                detokenize(end_text(row, eos_id), model.output_vocabulary),
                example=example,
                is_target=False,
            )
            for row, example in zip(rows, trained.examples, strict=False)
        ]
        values: dict[str, float] = {}
        for metric in task.metric_fns:
            values.update(metric(targets, texts))
        metric = trained.task.metric
        percent = 1.0 if metric == "f1" else 100.0
        yield {
            "metric": metric,
            "percent": float(values[metric]) * percent,
            "passes": statistics.fmean(float(np.mean(aux["passes"])) for _, aux in results),
            "last_change": float(last_change),
            "position_forwards": statistics.fmean(
                position_forwards(aux, prefix_length, rereads) for _, aux in results
            ),
            "seconds": seconds,
        }


def compare(runs: Mapping[str, tuple[Trained, Any]], rounds: int) -> list[dict[str, Any]]:
    """One record per model and decoder, each beside the first, rounds of all interleaved."""
    task = next(iter(runs.values()))[0].task.name
    runs = {name: measure(*run) for name, run in runs.items()}
    rounds_of = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            rounds_of[name].append(next(run))
    records: list[dict[str, Any]] = []
    for name, measured in rounds_of.items():
        record = {**measured[0], "seconds": statistics.median(m["seconds"] for m in measured)}
        baseline = records[0] if records else record
        records.append(
            {
                "benchmark": "decode_quality",
                "task": task,
                "decoder": name,
                **record,
                "fewer_position_forwards": baseline["position_forwards"]
                / record["position_forwards"],
                "speedup": baseline["seconds"] / record["seconds"],
            }
        )
    return records


def _runs(
    plain: Trained, trained: Trained, settings: Sequence[str] | None
) -> dict[str, tuple[Trained, Any]]:
    """The paper's sampler of `plain`, and settings of `trained`, all that it allows if None."""
    decoder = plain.model.decoder
    if not decoder.block_length:
        decoder = dataclasses.replace(decoder, prefix_cache=False)
    runs = {"plain": (plain, decoder)}
    chosen = settings or [*SETTINGS, "fast"]
    for name in RULES if chosen == ["rules"] else chosen:
        decoder = trained.fast
        if name in SETTINGS:
            update = SETTINGS[name].get("update")
            uniform = trained.model.decoder.corruption.masses(np.float32(0.5)).uniform
            if isinstance(update, updates.Remask) and uniform > 0:
                continue  # needs mask noise
            decoder = dataclasses.replace(trained.model.decoder, **SETTINGS[name])
        runs[name] = trained, decoder
    return runs


def main() -> None:
    """Measures the settings asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=trained_models.STEPS, help="all, if left out")
    parser.add_argument("--checkpoint", help="a checkpoint of the task, or a run's MODEL_DIR")
    parser.add_argument("--baseline", help="the same, of the model to compare with")
    parser.add_argument("--model", help="gin file of the network")
    parser.add_argument("--objective", default=PAPERS, help="gin file of the checkpoint's")
    parser.add_argument("--binding", action="append", default=[], help="of gin, as BLOCK_LENGTH=16")
    parser.add_argument("--settings", nargs="+", choices=[*SETTINGS, "fast", "rules"])
    parser.add_argument("--markdown", action="store_true", help="rows of a table, not JSON")
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.checkpoint and not args.task:
        parser.error("--checkpoint needs the --task that it was trained on.")
    if args.markdown:
        print(f"| task | {' | '.join(COLUMNS)} |\n|{'---|' * (1 + len(COLUMNS))}")
    datasets.import_task_module(TASKS)  # Before gin reads a file, after which none is known anew.
    for role in [args.task] if args.task else trained_models.STEPS:
        size = args.examples, args.batch_size
        if not args.checkpoint:
            paths = {file: trained_models.train(role, file) for file in (CACHED, PAPERS)}
            trained = load(role, paths[CACHED], CACHED, *size)
            plain = load(role, paths[PAPERS], PAPERS, *size)
        else:
            trained = plain = load(
                role, args.checkpoint, args.objective, *size, args.model, args.binding
            )
            if args.baseline:
                plain = load(role, args.baseline, PAPERS, *size, args.model)
        runs = _runs(plain, trained, args.settings)
        if not args.checkpoint and role in trained_models.BLOCK_LENGTHS:
            path = trained_models.adapt_to_blocks(role, paths[CACHED])
            length = f"BLOCK_LENGTH={trained_models.BLOCK_LENGTHS[role]}"
            blocks = load(role, path, trained_models.BLOCKS, *size, bindings=[length])
            runs |= {"blocks": (blocks, blocks.model.decoder), "blocks_fast": (blocks, blocks.fast)}
        for record in compare(runs, args.rounds):
            cells = [f"{record[c]:.1f}" if c != "decoder" else record[c] for c in COLUMNS]
            row = f"| {role} | {' | '.join(cells)} |"
            print(row if args.markdown else json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
