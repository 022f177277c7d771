"""Trains and decodes on several topologies of processes and devices, and compares the results.

python -m tests.tools.topologies --objectives=autoregressive,diffusion

Each topology is eight simulated devices in one to four processes of this machine, which communicate
as the hosts of a pod do. It trains a tiny model with dropout, evaluates its checkpoint and decodes
a split whose last batch is not full, through `train`, `eval` and `infer`. A line of JSON compares
it with the topology that has the same mesh in one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

HERE = os.path.dirname(__file__)
sys.path.insert(0, HERE)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from diffusion_t5x.commands import launch_local  # noqa: E402

STEPS = 6
TOLERANCE = 1e-4  # relative, of losses and gradient norms, whose sums differ in order
MODEL = [
    "--gin_file=models/tiny.gin", "--gin.vocabularies.get_vocabulary.name=bytes",
    "--gin.vocabularies.get_vocabulary.extra_ids=0",
    "--gin.VOCAB_SIZE=296", "--gin.config.TransformerConfig.embed_dim=16",
    "--gin.config.TransformerConfig.mlp_dim=16", "--gin.config.TransformerConfig.num_heads=4",
    "--gin.config.TransformerConfig.head_dim=4", "--gin.config.TransformerConfig.num_layers=1",
    "--gin.MIXTURE_OR_TASK_NAME=toy_copy", "--gin.MIXTURE_OR_TASK_MODULE=toy",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 6, 'targets': 6}", "--gin.BATCH_SIZE=8",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """Simulated devices in processes, and the mesh over them.

    Attributes:
      processes: Number of processes.
      devices: Number of devices of each process.
      mesh: Gin flags of the partitioner.
      before: Topology that trains the first half of the steps, or None.
    """

    processes: int
    devices: int
    mesh: tuple[str, ...] = ()
    before: Topology | None = None

    def __str__(self) -> str:
        first = f"{self.before}, then " if self.before else ""
        return f"{first}{self.processes} x {self.devices}"


def _partitions(number: int) -> tuple[str, ...]:
    return (f"--gin.partitioning.PjitPartitioner.num_partitions={number}",)


def _slices(ici: tuple[int, ...], dcn: tuple[int, ...]) -> tuple[str, ...]:
    prefix = "--gin.partitioning.PjitPartitioner"
    return f"{prefix}.ici_mesh_shape={ici}", f"{prefix}.dcn_mesh_shape={dcn}"


# Topologies by mesh; the first has one process, and the others must give the same.
GROUPS = {
    "8 data": (
        Topology(1, 8),
        Topology(2, 4),
        Topology(4, 2),
        Topology(4, 2, _slices((1, 2, 1), (4, 1, 1))),
        Topology(1, 8, before=Topology(4, 2)),
        Topology(4, 2, before=Topology(1, 8)),
    ),
    # Two processes hold each data shard where there are four.
    "2 data x 4 model": (
        Topology(1, 8, _partitions(4)),
        Topology(2, 4, _partitions(4)),
        Topology(4, 2, _partitions(4)),
    ),
    "4 data x 2 model": (
        Topology(1, 8, _partitions(2)),
        Topology(4, 2, _slices((1, 1, 2), (2, 2, 1))),
    ),
}


def _work(objective: str, root: pathlib.Path, steps: int, flags: list[str]) -> None:
    """Trains up to `steps`, and decodes if these are all steps."""
    from diffusion_t5x import eval as eval_command
    from diffusion_t5x import infer, train

    mesh = [flag for flag in flags if flag.startswith("--gin.")]
    processes = [flag for flag in flags if flag not in mesh]
    common = [*MODEL, *mesh, f"--gin_file=objectives/{objective}.gin"]
    if objective == "diffusion":
        common += ["--gin.NUM_STEPS=2", "--gin.NUM_SAMPLES=2"]
    train.main([
        *common, *processes, "--gin_file=runs/pretrain.gin", f"--gin.MODEL_DIR={root / 'run'}",
        f"--gin.TRAIN_STEPS={steps}", "--gin.EVAL_PERIOD=3", "--gin.CHECKPOINT_PERIOD=3",
        "--gin.DROPOUT_RATE=0.1", "--gin.trainer.train.log_period=1",
    ])  # fmt: skip
    if steps < STEPS:
        return
    checkpoint = f"--gin.CHECKPOINT_PATH={root / 'run' / f'checkpoint_{STEPS}'}"
    eval_command.main([
        *common, checkpoint, "--gin_file=runs/eval.gin", f"--gin.EVAL_OUTPUT_DIR={root / 'eval'}",
    ])  # fmt: skip
    infer.main([
        *common, checkpoint, "--gin_file=runs/infer.gin",
        "--gin.datasets.DatasetConfig.split=train",
        f"--gin.INFER_OUTPUT_DIR={root / 'infer'}", "--gin.inference.infer.checkpoint_period=2",
    ])  # fmt: skip


def _start(topology: Topology, objective: str, root: pathlib.Path, steps: int) -> None:
    """Runs the processes of a topology to their end.

    Raises:
      RuntimeError: If one fails; the message has the end of each log.
    """
    root.mkdir(parents=True, exist_ok=True)
    worker = [sys.executable, "-m", "tests.tools.topologies", "--worker", objective, str(root)]
    command = [*worker, str(steps), *topology.mesh]
    port = launch_local.free_port()
    environment = launch_local.process_environment(topology.devices)
    environment["PYTHONPATH"] = f"{HERE}:{environment.get('PYTHONPATH', '')}"
    running = []
    for index in range(topology.processes):
        argv = launch_local.process_argv(command, topology.processes, index, port)
        with open(root / f"log-{index}", "ab") as log:
            running.append(subprocess.Popen(argv, env=environment, stdout=log, stderr=log))
    if any([process.wait() for process in running]):
        logs = [(root / f"log-{index}").read_text()[-3000:] for index in range(topology.processes)]
        raise RuntimeError(f"{topology}: a process failed:\n" + "\n\n".join(logs))


def outcome(topology: Topology, objective: str, root: pathlib.Path) -> dict:
    """Runs a topology and returns its results.

    Returns:
      'losses' and 'norms' of the training steps, 'eval_losses', and lines of predictions with their
      scores: 'eval' and 'infer'.
    """
    if topology.before is not None:
        _start(topology.before, objective, root, STEPS // 2)
    _start(topology, objective, root, STEPS)
    lines = [json.loads(x) for x in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    of_split = {
        split: [line for line in lines if line["split"] == split]
        for split in ("train", "training_eval")
    }
    [evaluated] = (root / "eval").rglob(f"predictions-{STEPS}.jsonl")
    [inferred] = (root / "infer").glob("toy_copy-predict.jsonl-*")
    return {
        "losses": [line["loss"] for line in of_split["train"]],
        "norms": [line["grad_norm"] for line in of_split["train"]],
        "eval_losses": [line["loss"] for line in of_split["training_eval"]],
        "eval": list(map(json.loads, evaluated.read_text().splitlines())),
        "infer": list(map(json.loads, inferred.read_text().splitlines())),
    }


def _farthest(one: list[float], other: list[float]) -> float:
    """Returns the largest relative difference."""
    a, b = np.asarray(one), np.asarray(other)
    return float(np.max(np.abs(a - b) / np.abs(b))) if a.shape == b.shape else float("inf")


def compare(got: dict, expected: dict) -> dict:
    """Compares two outcomes.

    Returns:
      The largest relative difference of losses, gradient norms and scores; 'predictions_same', True
      if all examples have the same predictions in the same order; and 'same', True if the
      differences are within the tolerance too.
    """
    differences = {
        name: _farthest(got[name], expected[name]) for name in ("losses", "norms", "eval_losses")
    }
    for kind in ("eval", "infer"):
        scores = [[line["score"] for line in outcome[kind]] for outcome in (got, expected)]
        differences[f"{kind}_scores"] = _farthest(*scores)
    texts = [
        [
            {**line, "score": None, "scores": None}
            for kind in ("eval", "infer")
            for line in out[kind]
        ]
        for out in (got, expected)
    ]
    same = texts[0] == texts[1]
    within = max(differences.values()) <= TOLERANCE
    return {**differences, "predictions_same": same, "same": same and within}


def main() -> None:
    """Runs all topologies; fails if one does not give what one process gives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objectives", default="autoregressive,diffusion")
    args = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as directory:
        for objective in args.objectives.split(","):
            for mesh, (alone, *others) in GROUPS.items():
                expected = outcome(alone, objective, pathlib.Path(directory, objective, mesh))
                for number, topology in enumerate(others):
                    started = time.monotonic()
                    root = pathlib.Path(directory, objective, f"{mesh} {number}")
                    line = {
                        "objective": objective,
                        "mesh": mesh,
                        "topology": str(topology),
                        "slices": any("dcn" in flag for flag in topology.mesh),
                        "losses": [round(expected["losses"][n], 6) for n in (0, -1)],
                        "examples": len(expected["eval"]) + len(expected["infer"]),
                        "differences": compare(outcome(topology, objective, root), expected),
                        "seconds": round(time.monotonic() - started, 1),
                    }
                    print(json.dumps(line), flush=True)
                    failed += [] if line["differences"]["same"] else [f"{mesh}: {topology}"]
    if failed:
        raise SystemExit(f"not what one process gives: {'; '.join(failed)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        import toy

        toy.register()
        _work(sys.argv[2], pathlib.Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
    else:
        main()
