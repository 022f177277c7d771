"""Seconds to compile the programs of a training run, for devices that need not be there.

python -m benchmarks.compile_times                       # the CPU of this machine
python -m benchmarks.compile_times --devices=v5p:2x2x1   # a TPU; needs libtpu alone
python -m benchmarks.compile_times --devices=h100:1x1    # needs NVIDIA's compiler alone

Base, decoder-only, vocabulary 32,128, 64 texts of 512 tokens, bfloat16, Adafactor, on one device,
layers apart and scanned, AR and diffusion. Each line has `seconds` from the function to the
program, tracing included, and `cpu_seconds` of all threads and child processes, which grow less
when others use the cores. Nothing is cached, and nothing is run.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import types
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import workloads
from benchmarks.shapes import KEY, of_size
from diffusion_t5x.runtime.partitioning import JittedFunction, PjitPartitioner
from diffusion_t5x.runtime.train_state import abstract_train_state, initialisation
from diffusion_t5x.training import optimizers, topologies
from diffusion_t5x.training.dry_run import abstract_batch
from diffusion_t5x.training.train_step import Trainer

BASE = of_size("base", 32_128)
BATCH, LENGTH = 64, 512


def programs(objective: str, device: Any, **config: Any) -> dict[str, tuple[JittedFunction, Any]]:
    """The programs of a run, and the shapes of their arguments."""
    model = workloads.our_model(BASE, objective, dtype="bfloat16", **config)
    model.optimizer_def = optimizers.adafactor()
    partitioner = PjitPartitioner(devices=[device])
    batch = jax.eval_shape(lambda: workloads.our_batch(BASE, 1, 1, LENGTH - 1))
    shapes = {name: value.shape for name, value in batch.items()}
    dtypes = {name: value.dtype for name, value in batch.items()}
    state = abstract_train_state(model, partitioner, shapes, dtypes)
    schedule = optimizers.create_learning_rate_scheduler()
    trainer = Trainer(model, partitioner, state, 0, schedule)
    batch = abstract_batch(trainer, BATCH, shapes, dtypes)

    def on_device(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=partitioner.replicated), tree
        )

    trained = on_device(trainer.metric_shapes(state, batch))
    evaluated = on_device(trainer.eval_metric_shapes(state, batch))
    return {
        "initialisation": (
            initialisation(model, partitioner, shapes, dtypes),
            (on_device(jax.eval_shape(lambda: jnp.asarray(KEY))),),
        ),
        "training step": (trainer.step, (state, trained, batch)),
        "eval step": (trainer.eval_step, (state.params, evaluated, batch)),
    }


def main() -> None:
    """Prints a line for each program, and one for all of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", default="cpu", help="'cpu', or a topology of one host")
    parser.add_argument("--objectives", default="autoregressive,diffusion")
    parser.add_argument("--layers", default="apart,scanned")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    if arguments.devices == "cpu":
        jax.config.update("jax_platforms", "cpu")
        device = jax.devices()[0]
    else:
        device = topologies.devices(arguments.devices).flat[0]
    for objective in arguments.objectives.split(","):
        for layers in arguments.layers.split(","):
            line = {"benchmark": "compile_times", "devices": arguments.devices}
            line |= {"objective": objective, "layers": layers}
            total = types.SimpleNamespace(seconds=0.0, cpu_seconds=0.0)
            made = programs(objective, device, scan_layers=layers == "scanned")
            for name, (function, args) in made.items():
                started, cpu = time.perf_counter(), sum(os.times()[:4])
                function.lower(*args).compile(topologies.compiler_options(device))
                seconds, cpu = time.perf_counter() - started, sum(os.times()[:4]) - cpu
                total.seconds += seconds
                total.cpu_seconds += cpu
                line |= {"program": name, "seconds": seconds, "cpu_seconds": cpu}
                print(json.dumps(line), flush=True)
            print(json.dumps(line | {"program": "all", **vars(total)}), flush=True)


if __name__ == "__main__":
    main()
