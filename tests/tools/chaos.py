"""Kills training, evaluation and inference at random moments, and compares the results.

python -m tests.tools.chaos --kills=50 --seed=0 [--directory=gs://BUCKET/DIR] [--serve]

Each command runs once undisturbed; then it is repeatedly killed (SIGKILL), at moments drawn from
the seed, and restarted. Both must end with the same bits: parameters, optimiser, metrics,
predictions. A line of JSON per command says how often it was killed.

Every attempt is a fork of a process that has imported everything and computed nothing, so that an
attempt spends most of its time at work rather than on its start. The directory may be in a bucket;
with --serve, one of the servers of `buckets`, which are started.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable

sys.path.insert(0, os.path.dirname(__file__))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import buckets
import toy
from etils import epath

from diffusion_t5x import eval as eval_command
from diffusion_t5x import infer, train
from diffusion_t5x.training.metric_logs import read_metrics

STEPS = 24
MODEL = [
    "--gin_file=models/tiny.gin", "--gin_file=objectives/diffusion.gin",
    "--gin.vocabularies.get_vocabulary.name=bytes",
    "--gin.vocabularies.get_vocabulary.extra_ids=0", "--gin.VOCAB_SIZE=296",
    "--gin.config.TransformerConfig.embed_dim=16", "--gin.config.TransformerConfig.mlp_dim=16",
    "--gin.config.TransformerConfig.num_heads=2", "--gin.config.TransformerConfig.head_dim=4",
    "--gin.config.TransformerConfig.num_layers=1", "--gin.NUM_STEPS=2", "--gin.NUM_SAMPLES=2",
    f"--gin.MIXTURE_OR_TASK_NAME={toy.TASK}", "--gin.MIXTURE_OR_TASK_MODULE=toy",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 6, 'targets': 6}",
]  # fmt: skip


def _train(root: epath.Path) -> None:
    train.main([
        *MODEL, "--gin_file=runs/pretrain.gin", f"--gin.MODEL_DIR={root / 'run'}",
        f"--gin.TRAIN_STEPS={STEPS}", "--gin.CHECKPOINT_PERIOD=2", "--gin.EVAL_PERIOD=4",
        "--gin.EVAL_STEPS=1", "--gin.DROPOUT_RATE=0.1", "--gin.BATCH_SIZE=8",
        "--gin.trainer.train.log_period=1", "--gin.checkpoints.SaveCheckpointConfig.keep=3",
    ])  # fmt: skip


def _run_of(root: epath.Path) -> epath.Path:
    """Returns the undisturbed training run, whose checkpoints are evaluated."""
    return root.parent / "quiet" / "run"


def _evaluate(root: epath.Path) -> None:
    eval_command.main([
        *MODEL, "--gin_file=runs/eval.gin", f"--gin.CHECKPOINT_PATH={_run_of(root)}",
        f"--gin.EVAL_OUTPUT_DIR={root / 'eval'}", "--gin.BEST_METRIC=exact_match",
        "--gin.BATCH_SIZE=4",
    ])  # fmt: skip


def _infer(root: epath.Path) -> None:
    infer.main([
        *MODEL, "--gin_file=runs/infer.gin", f"--gin.CHECKPOINT_PATH={_run_of(root)}",
        f"--gin.INFER_OUTPUT_DIR={root / 'infer'}", "--gin.datasets.DatasetConfig.split=train",
        "--gin.inference.infer.checkpoint_period=1", "--gin.BATCH_SIZE=4",
    ])  # fmt: skip


COMMANDS = {"train": _train, "eval": _evaluate, "infer": _infer}


def _fork(work: Callable[[], None], log: pathlib.Path) -> int:
    """Starts a process that does `work` and prints to `log`; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _finish(work: Callable[[], None], log: pathlib.Path) -> float:
    """Runs `work` to its end; returns the seconds it took.

    Raises:
      RuntimeError: If it fails.
    """
    started = time.monotonic()
    _, status = os.waitpid(_fork(work, log), 0)
    if status:
        raise RuntimeError(f"a run failed:\n{log.read_text()[-4000:]}")
    return time.monotonic() - started


def _kill_at(work: Callable[[], None], log: pathlib.Path, seconds: float) -> bool:
    """Kills `work` after `seconds`; returns False if it ended before.

    Raises:
      RuntimeError: If it fails by itself.
    """
    pid = _fork(work, log)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError(f"a run failed:\n{log.read_text()[-4000:]}")
            return False
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def _params(root: epath.Path) -> str:
    """Returns a digest of the last checkpoint's arrays."""
    import jax
    import orbax.checkpoint as ocp

    digest = hashlib.blake2b()
    for item in ("params", "optimizer"):
        tree = ocp.StandardCheckpointer().restore(root / "run" / f"checkpoint_{STEPS}" / item)
        for leaf_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            digest.update(jax.tree_util.keystr(leaf_path).encode())
            digest.update(jax.device_get(leaf).tobytes())
    return digest.hexdigest()


def _metrics(root: epath.Path) -> list[dict]:
    """Returns the lines of a run's metrics without times and rates."""
    clocks = {"seconds", "steps_per_second", "examples_per_second"}
    lines = read_metrics(str(root / "run"))
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


def _evaluations(root: epath.Path) -> list[dict]:
    results = json.loads((root / "eval" / "results.json").read_text())
    for row in results["rows"]:
        row["metrics"].pop("decode_seconds_per_example")
    files = sorted((root / "eval").glob("*/predictions-*.jsonl"))
    return [
        *({k: row[k] for k in ("step", "task", "metrics")} for row in results["rows"]),
        results["best"],
        {file.name: file.read_text() for file in files},
    ]


def _inferences(root: epath.Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted((root / "infer").iterdir())}


def outcome(command: str, root: epath.Path, log: pathlib.Path) -> object:
    """Returns everything that a command wrote, without times and rates, read by another process."""
    out = log.with_suffix(".json")

    def work() -> None:
        if command == "train":
            found: object = _params(root), _metrics(root)
        else:
            found = _evaluations(root) if command == "eval" else _inferences(root)
        out.write_text(json.dumps(found))

    _finish(work, log)
    return json.loads(out.read_text())


def disturb(
    command: str, kills: int, rng: random.Random, directory: epath.Path, logs: pathlib.Path
) -> dict:
    """Runs a command undisturbed and disturbed, and compares the results.

    A disturbed run that finishes is compared, and another one started, until all kills are spent.

    Args:
      command: A key of `COMMANDS`; all but 'train' need the undisturbed training run in
        `directory`.
      kills: Number of kills.
      rng: Generator of the moments.
      directory: Directory of all runs.
      logs: Directory of what they print, on this machine.

    Returns:
      `{'command', 'kills', 'ends', 'seconds', 'same'}`; `ends` counts the disturbed runs that
      finished, `same` is True if all of them wrote what the undisturbed run wrote.

    Raises:
      RuntimeError: If a run fails other than by being killed.
    """
    log, run = logs / f"{command}.log", COMMANDS[command]
    quiet = directory / "quiet"
    started = time.monotonic()
    usual = _finish(functools.partial(run, quiet), log)
    expected = outcome(command, quiet, log)
    killed, same, ends = 0, True, 0
    while killed < kills and same:
        noisy = directory / f"noisy_{ends}"
        attempt = functools.partial(run, noisy)
        # Mostly at work, sometimes while starting or ending; the last attempt is undisturbed.
        while killed < kills and _kill_at(attempt, log, usual * rng.uniform(0.05, 0.95)):
            killed += 1
        _finish(attempt, log)
        ends += 1
        same = outcome(command, noisy, log) == expected
    seconds = round(time.monotonic() - started, 1)
    return {"command": command, "kills": killed, "ends": ends, "seconds": seconds, "same": same}


def main() -> None:
    """Disturbs every command; fails if anything is lost, repeated or changed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="of each command, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--directory", help="of all runs, perhaps in a bucket; else a temporary one"
    )
    parser.add_argument("--serve", action="store_true", help="start servers of buckets")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    toy.register()
    with contextlib.ExitStack() as opened:
        logs = pathlib.Path(opened.enter_context(tempfile.TemporaryDirectory()))
        if args.serve:
            opened.enter_context(buckets.serving_here())
        directory = epath.Path(args.directory or logs)
        for command in COMMANDS:
            result = disturb(command, args.kills, rng, directory, logs)
            print(json.dumps(result), flush=True)
            if not result["same"]:
                raise SystemExit(f"{command}: a killed run did not end as the undisturbed one")


if __name__ == "__main__":
    main()
