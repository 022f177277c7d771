"""Reports the memory and the collectives of a training step by compiling it without running it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from diffusion_t5x.runtime.train_state import Shapes, TrainState, select
from diffusion_t5x.training import topologies
from diffusion_t5x.training.collectives import Sent, sent
from diffusion_t5x.training.train_step import Trainer

GIB = 2**30
# GiB of one chip, by the `device_kind` of its devices.
CHIP_GIB = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32}
# GiB of an NVIDIA card that a program cannot use: CUDA's context, and what cuBLAS, cuDNN and NCCL
# take beside XLA's own memory.
CUDA_GIB = 1


class DoesNotFit(SystemExit):
    """The step needs more memory than its devices have, as `report` says; the exit code is 1."""

    def __init__(self, report: Report):
        super().__init__(1)
        self.report = report


@dataclasses.dataclass(frozen=True)
class Report:
    """The memory that a training step needs on one device; all sizes are in bytes.

    Attributes:
      mesh: Number of devices along each mesh axis.
      parameter_count: Number of parameters of the whole model.
      temporaries: Activations and other intermediate arrays; None if the compiler refused.
      total: All arrays that exist at once; None if the compiler refused.
      limit: Memory of a device; None if unknown.
      refusal: The compiler's message if it refused for lack of memory.
      collectives: What the collectives of a step leave on a device; None if the compiler refused.
      compiled: The compiled step, for reading more from it.
      trained_count: Number of parameters that are not frozen; None for all.
      average: The moving average of the parameters; 0 for none.
    """

    device: str
    mesh: Mapping[str, int]
    parameter_count: int
    parameters: int
    optimizer: int
    batch: int
    temporaries: int | None = None
    total: int | None = None
    limit: int | None = None
    refusal: str | None = None
    collectives: Sent | None = None
    compiled: jax.stages.Compiled | None = dataclasses.field(default=None, repr=False)
    trained_count: int | None = None
    average: int = 0

    @property
    def fits(self) -> bool:
        """False if the compiler refused or the total exceeds a known limit."""
        if self.refusal is not None:
            return False
        return self.limit is None or self.total is None or self.total <= self.limit

    def lines(self) -> Iterator[str]:
        """Yields the report as lines of text."""
        yield f"parameters: {self.parameter_count:,}"
        if self.trained_count is not None:
            yield f"trained: {self.trained_count:,}"
        yield f"mesh: {dict(self.mesh)} of {self.device}"
        left = None if self.limit is None or self.total is None else self.limit - self.total
        yield "per device, GiB:"
        for name, size in (
            ("parameters", self.parameters),
            ("optimiser", self.optimizer),
            *([("moving average", self.average)] * bool(self.average)),
            ("batch", self.batch),
            ("activations and temporaries", self.temporaries),
            ("total", self.total),
            ("memory", self.limit),
            ("left", left),
        ):
            yield f"  {name:<28} {'unknown' if size is None else f'{size / GIB:.3f}':>9}"
        if self.collectives is not None:
            yield str(self.collectives)
        if self.refusal is not None:
            yield f"the compiler refuses: {self.refusal}"
        if self.limit is not None or not self.fits:
            yield "fits" if self.fits else "does not fit"


def check(trainer: Trainer, state: TrainState, batch: Mapping[str, Any]) -> Report:
    """Compiles a training step, prints its report, and names settings that help if it is too large.

    Args and errors are those of `compile_step`.

    Raises:
      DoesNotFit: If the step does not fit.
    """
    report = compile_step(trainer, state, batch)
    lines = list(report.lines())
    if not report.fits:
        lines += ["settings that need less memory:", *_remedies(trainer, batch)]
    if jax.process_index() == 0:
        print(*lines, sep="\n", flush=True)
    if not report.fits:
        raise DoesNotFit(report)
    return report


def abstract_batch(
    trainer: Trainer, batch_size: int, shapes: Shapes, types: Mapping[str, Any]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, dtypes and shardings of a global batch of `batch_size` examples.

    Args:
      shapes: Shape of each feature, `[rows, length]` for any number of rows.
      types: Dtype of each feature.
    """
    sharding = trainer.partitioner.batch_sharding
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape[1:]), types[name], sharding=sharding)
        for name, shape in shapes.items()
    }


def compile_step(trainer: Trainer, state: TrainState, batch: Mapping[str, Any]) -> Report:
    """Compiles a training step for the devices of its mesh, which need not exist.

    Args:
      state: `jax.ShapeDtypeStruct`s with shardings.
      batch: The same of a global batch, as `abstract_batch` gives it.

    Raises:
      ValueError: If the devices do not divide an array.
      jax.errors.JaxRuntimeError: If the compiler fails for another reason than memory.
    """
    mesh, everywhere = trainer.partitioner.mesh, trainer.partitioner.replicated
    device = mesh.devices.flat[0]
    parts = state.params, select(state.params, trainer.model.is_trained)
    count, trained = (sum(leaf.size for leaf in jax.tree.leaves(part)) for part in parts)
    report = Report(
        device=device.device_kind,
        mesh=dict(mesh.shape),
        parameter_count=count,
        trained_count=None if trained == count else trained,
        parameters=_bytes(state.params),
        optimizer=_bytes((state.step, state.opt_state)),
        average=_bytes(state.average),
        batch=_bytes(batch),
        limit=device_memory(device),
    )
    metrics = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        trainer.metric_shapes(state, batch),
    )
    try:
        compiled = trainer.partitioner.compile(
            "training step",
            trainer.step,
            *(state, metrics, batch),
            options=topologies.compiler_options(device),
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # The first line says how much is missing; a list of the largest arrays follows.
        refusal = str(error).partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")
        return dataclasses.replace(report, refusal=refusal)
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and hlo is not None, device.device_kind
    # Outputs that take the place of donated arguments count once.
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries = memory.temp_size_in_bytes
    return dataclasses.replace(
        report,
        temporaries=temporaries,
        total=held + temporaries,
        collectives=sent(hlo),
        compiled=compiled,
    )


def device_memory(device: jax.Device) -> int | None:
    """Returns the bytes of a device by its kind, or by its own report; None if unknown.

    A present NVIDIA card reports the share of it that JAX takes; an absent one has all that a
    program may use.
    """
    if device.device_kind in CHIP_GIB:
        return CHIP_GIB[device.device_kind] * GIB
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # the device is absent, or another process's
        cards = {card.kind: card.memory_gib for card in topologies.CARDS.values()}
        found = cards.get(device.device_kind)
        return None if found is None else int((found - CUDA_GIB) * GIB)


def _bytes(tree: Any) -> int:
    """Returns the bytes that one device holds of arrays with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _remedies(trainer: Trainer, batch: Mapping[str, Any]) -> Iterator[str]:
    """Yields the flags to try, in order, that lower the memory of a step and are not set yet."""
    mesh, rules = trainer.partitioner.mesh, trainer.partitioner.logical_axis_rules
    [rows] = {value.sharding.shard_shape(value.shape)[0] for value in batch.values()}
    config = getattr(trainer.model.module, "config", None)
    if getattr(config, "remat", "full") != "full":
        yield "  --gin.config.TransformerConfig.remat=full (recomputes activations)"
    if ("embed", "data") not in rules and trainer.partitioner.num_data_shards > 1:
        yield (
            "  --gin.partitioning.standard_logical_axis_rules.parameter_partitioning_dims=2 "
            "(splits parameters and optimiser over the data axis)"
        )
    microbatches = 2 * trainer.num_microbatches
    if rows % microbatches == 0:
        yield (
            f"  --gin.trainer.Trainer.num_microbatches={microbatches} "
            "(computes fewer examples at once)"
        )
    partitions = 2 * mesh.shape["model"]
    if mesh.size % partitions == 0:
        yield (
            f"  --gin.partitioning.PjitPartitioner.num_partitions={partitions} "
            "(shares each copy of the model among more devices)"
        )
    yield "  more devices, or a smaller model"
