"""Compares the traffic between devices in a training step with theory, by sharding rules.

python -m benchmarks.collectives                         # eight simulated devices, float32
python -m benchmarks.collectives --topology=v5p:2x2x2    # by the TPU compiler, bfloat16

Steps are compiled and not run: Base, layers scanned, 88 texts of 512 + 512 tokens, a vocabulary of
256,000, Adafactor. Bytes are those that collectives leave on one device, loops counted in full.
Each JSON line has one kind of arrays, known by their sizes, and the bytes that would suffice:

gradients: each device is left its own part. Those of layers come in the type of activations, once
  per pass of the objective; the embedding's comes in float32, once, whatever the passes.
weights: those that are split over the data axis are gathered where they are used: those of layers
  twice per pass, forwards and backwards, and the embedding once, for the logits of all passes.
activations: where `m` devices share a copy of the model, hidden states `h = rows x length x width`
  are summed four times per layer and pass, after attention and feed-forward and before them in the
  gradient (Megatron-LM, Shoeybi et al. 2019, section 3), a fifth time where the gradient computes
  attention's output again, and once each for the embedding's lookup and, of the target alone, for
  the gradient of logits. 2-D activations hold `h / m` between layers, so that a sum is a
  reduce-scatter, `h / m`, and a gather, `h`. Scalars, norms and biases are counted here too.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import workloads
from benchmarks.compiler import compiled_program
from benchmarks.shapes import Shape, of_size
from diffusion_t5x.runtime.partitioning import PjitPartitioner, standard_logical_axis_rules
from diffusion_t5x.runtime.train_state import abstract_train_state
from diffusion_t5x.training import dry_run, optimizers, topologies
from diffusion_t5x.training.train_step import Trainer

BASE = of_size("base", 256_000)
# Such that no rows x positions x width of it is as large as a weight or a part of one.
BATCH_SIZE = 88
PASSES = {"autoregressive": 1, "diffusion": 2}
ITEM_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}


@dataclasses.dataclass(frozen=True)
class Rules:
    """A way to shard a model.

    Attributes:
      partitions: Number of devices per copy of the model.
      activations: Number of dimensions of activations that are split.
      parameters: Number of dimensions of parameters that are split.
    """

    partitions: int
    activations: int = 1
    parameters: int = 1


RULES: Mapping[str, Rules] = {
    "data": Rules(1),
    "data, 2-D parameters": Rules(1, parameters=2),
    "tensor": Rules(4),
    "tensor, 2-D parameters": Rules(4, parameters=2),
    "tensor, 2-D activations": Rules(4, activations=2),
    "tensor, 2-D activations and parameters": Rules(4, 2, 2),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step to compile.

    Attributes:
      objective: 'autoregressive' or 'diffusion'.
      rules: The sharding of the model.
      shape: Sizes of the network.
      batch_size: Texts per batch.
      prefix: Length of each prefix in tokens.
      target: Length of each target in tokens.
      dtype: Dtype of activations.
      settings: Further settings of `workloads.our_model`.
    """

    objective: str
    rules: Rules
    shape: Shape = BASE
    batch_size: int = BATCH_SIZE
    prefix: int = 512
    target: int = 512
    dtype: str = "float32"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def compile(self, devices: Sequence[jax.Device]) -> Any:
        """Compiles the step for `devices`, which need not exist."""
        model = workloads.our_model(
            self.shape,
            self.objective,
            scan_layers=True,
            remat="full",
            dtype=self.dtype,
            **self.settings,
        )
        model.optimizer_def = optimizers.adafactor()
        rules = standard_logical_axis_rules(self.rules.activations, self.rules.parameters)
        lengths = {
            "encoder_input_tokens": self.prefix,
            "decoder_input_tokens": self.target,
            "decoder_target_tokens": self.target,
            "decoder_loss_weights": self.target,
        }
        shapes = {name: (1, length) for name, length in lengths.items()}
        types = {name: np.float32 if name.endswith("weights") else np.int32 for name in lengths}
        partitioner = PjitPartitioner(self.rules.partitions, rules, devices)
        state = abstract_train_state(model, partitioner, shapes, types)
        trainer = Trainer(model, partitioner, state, 0, learning_rate_fn=lambda step: 0.1)
        batch = dry_run.abstract_batch(trainer, self.batch_size, shapes, types)
        return dry_run.compile_step(trainer, state, batch).compiled

    def expected(self, num_devices: int) -> dict[str, float]:
        """Returns the bytes that suffice, as this module's docstring derives them.

        Args:
          num_devices: over which the step is split.
        """
        model = self.rules.partitions
        data = num_devices // model
        passes, item = PASSES[self.objective], np.dtype(self.dtype).itemsize
        layers = sum(_layer_sizes(self.shape)) * self.shape.num_layers / model
        embedding = self.shape.vocab_size * self.shape.embed_dim / model
        split = self.rules.parameters == 2
        hidden = self.batch_size // data * self.shape.embed_dim * item
        sums = (5 * self.shape.num_layers + 1) * (self.prefix + self.target) + self.target
        if model == 1:
            sums = 0
        elif self.rules.activations == 2:
            sums *= 1 + 1 / model
        return {
            "gradients": (passes * layers * item + embedding * 4) / (data if split else 1),
            "weights": (passes * 2 * layers + embedding) * item if split else 0,
            "activations": passes * sums * hidden,
        }


def _layer_sizes(shape: Shape) -> tuple[int, ...]:
    """Returns the number of parameters of each matrix of a layer."""
    attention = shape.embed_dim * shape.num_heads * shape.head_dim
    return (attention,) * 4 + (shape.embed_dim * shape.mlp_dim,) * 3


def is_weight(elements: int, step: Step, num_devices: int) -> bool:
    """Returns True if an array of `elements` is a weight, or a shard of one or of all layers'."""
    model = step.rules.partitions
    whole = {*_layer_sizes(step.shape), step.shape.vocab_size * step.shape.embed_dim}
    whole |= {size * step.shape.num_layers for size in whole}
    parts = {1, model, num_devices // model, num_devices}
    return any(elements * part in whole for part in parts)


def measure(compiled: Any, step: Step, num_devices: int) -> dict[str, collections.Counter[str]]:
    """Returns bytes by kind of arrays and kind of collective.

    Args:
      compiled: The compiled step.
      step: The step that was compiled.
      num_devices: Number of devices that it is sharded over.
    """
    found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for collective in compiled_program.collectives(compiled, unknown_trips=1):
        for array in collective.shapes:
            dtype, sizes = re.fullmatch(r"(\w+)\[([\d,]*)\]", array).groups()  # type: ignore[union-attr]
            elements = math.prod(int(size) for size in sizes.split(",") if size)
            kind = "activations"
            if is_weight(elements, step, num_devices):
                kind = "gradients" if "reduce" in collective.kind else "weights"
            found[kind][collective.kind] += elements * ITEM_BYTES[dtype] * collective.times
    return found


def main() -> None:
    """Prints a line for each rule set, objective and kind of arrays."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", help="a TPU slice; by default eight simulated devices")
    args = parser.parse_args()
    if args.topology:
        devices, dtype = list(topologies.devices(args.topology)), "bfloat16"
    else:
        jax.config.update("jax_num_cpu_devices", 8)
        devices, dtype = jax.devices("cpu"), "float32"
    for objective in PASSES:
        for name, rules in RULES.items():
            step = Step(objective, rules, dtype=dtype)
            found = measure(step.compile(devices), step, len(devices))
            for what, expected in step.expected(len(devices)).items():
                size = sum(found[what].values())
                line: dict[str, object] = {
                    "benchmark": "collectives",
                    "devices": args.topology or "8 simulated",
                    "objective": objective,
                    "rules": name,
                    "arrays": what,
                    "bytes": size,
                    **found[what],
                    "expected_bytes": expected,
                }
                if expected:
                    line["ratio"] = size / expected
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
