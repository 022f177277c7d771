"""Errors that name the new place of modules, gin files and names that have moved."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = "diffusion_t5x"

# Old module -> new module, both inside this package.
MODULES = {
    "blocks": "objectives.text_blocks",
    "bound_network": "networks.bound_network",
    "candidates": "evaluation.candidate_chunks",
    "checkpoint_fit": "checkpointing.reading",
    "checkpoint_integrity": "checkpointing.integrity",
    "checkpoint_items": "checkpointing.items",
    "checkpoint_reading": "checkpointing.reading",
    "checkpoints": "checkpointing.checkpoints",
    "conversion": "checkpointing.conversion",
    "corruption": "objectives.corruption",
    "data.cache": "data.embedded.file_cache",
    "data.data_layout": "data.data_shards",
    "data.embedded_code": "data.embedded.code",
    "data.embedded_python": "data.embedded.python",
    "data.embedded_translation": "data.embedded.translation",
    "data.file_readers": "data.files.readers",
    "data.local_files": "data.files.local_files",
    "data.shard_seeds": "data.data_shards",
    "data.sources": "data.embedded.sources",
    "data.text_readers": "data.files.readers",
    "decoding.blocks": "decoding.block_decoding",
    "decoding.denoising": "decoding.canvases",
    "decoding.growth": "decoding.lengths",
    "decoding.rerank": "interfaces",
    "disk_space": "runtime.guards",
    "drawing": "objectives.logits",
    "dry_run": "training.dry_run",
    "early_stopping": "training.early_stopping",
    "exit_codes": "runtime.guards",
    "experiment_graph": "experiments.experiment_graph",
    "hlo": "training.hlo",
    "inference": "evaluation.inference",
    "interop.arrays": "interop.stored_arrays",
    "launch_local": "commands.launch_local",
    "losses": "objectives.losses",
    "metric_logs": "training.metric_logs",
    "networks.cache": "networks.kv_cache",
    "networks.data_parts": "networks.sharding",
    "networks.devices": "networks.sharding",
    "networks.flash_attention": "networks.kernels.flash_attention",
    "networks.layout": "networks.row_layout",
    "networks.patterns": "objectives.attention_patterns",
    "nonfinite": "training.nonfinite",
    "optimizers": "training.optimizers",
    "partitioning": "runtime.partitioning",
    "predictor": "evaluation.compiled_model",
    "preemption": "runtime.guards",
    "progress": "runtime.terminal",
    "report": "experiments.report",
    "run_record": "training.run_record",
    "sampling": "evaluation.sampling",
    "starting_point": "training.initial_state",
    "tables": "evaluation.results",
    "topologies": "training.topologies",
    "train_state": "runtime.train_state",
    "train_step": "training.trainer",
    "trainer": "training.trainer",
    "watchdog": "runtime.guards",
}
# Old module of this package -> the module that does its work now, in another way.
REPLACED = {
    "decoding.active_set": "diffusion_t5x.decoding.stopping",
    "compiled_program": "benchmarks.compiler.compiled_program",
    "hlo_costs": "benchmarks.compiler.hlo_costs",
    "decoding_speed": "benchmarks.figure3",
    "speed": "benchmarks.figure3",
    "speed_experiment": "benchmarks.figure3",
}
# Old gin file -> new gin file, or the command that replaces it.
GIN_FILES = {
    "experiments/figure3.gin": "python -m benchmarks.figure3",
    "runs/speed.gin": "python -m benchmarks.figure3",
    "settings/laptop.gin": "scales/laptop_settings.gin",
    "settings/paper.gin": "scales/paper_settings.gin",
    "settings/topology.gin": "hardware/topology.gin",
    "settings/tpu.gin": "hardware/tpu.gin",
}
# Name that gin files bound -> the name that they bind now.
GIN_NAMES = {
    "experiment_graph.configured": "experiment_graph.load",
    "train_step.Trainer": "trainer.Trainer",
}
# Setting and old value -> what replaces it.
VALUES = {("experiment", "figure3"): "python -m benchmarks.figure3"}


class MovedModules:
    """A finder for `sys.meta_path` that refuses the old names of modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns None for a name that is not an old one, as `importlib` asks of a finder.

        Args:
          fullname: the dotted name of the module to import.
          path: the directories of its package, which are not read.
          target: unused; the protocol of finders has it.

        Raises:
          ImportError: for an old name; the message gives the new one. It is no
            `ModuleNotFoundError`, which `from package import name` would swallow.
        """
        package, _, old = fullname.partition(".")
        if package != PACKAGE:
            return None
        if old in MODULES:
            new = f"{PACKAGE}.{MODULES[old]}"
            raise ImportError(f"{fullname} is now {new}; change the import.", name=fullname)
        if old in REPLACED:
            raise ImportError(f"{fullname} is gone; {REPLACED[old]} replaces it.", name=fullname)
        return None


def install() -> None:
    """Puts the finder first, so that it also refuses what an older installation left behind."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedModules())
