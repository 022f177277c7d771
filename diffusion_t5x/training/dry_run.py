"""What a training step needs of each device, found by compiling it: nothing is allocated or run.

Where the step does not fit, settings that need less memory are tried, one added to the other.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks.compiler import compiled_program
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.train_state import Shapes, TrainState, abstract_train_state
from diffusion_t5x.training.train_step import Trainer

GIB = 2**30
# GiB of a chip, by the kind of its devices.
CHIP_GIB = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32}
# Kinds for which the compiler's estimate of time is of the size of what is measured.
TIMED = ("TPU v5",)
REMAT = "config.TransformerConfig.remat"
MICROBATCHES = "train_step.Trainer.num_microbatches"
PARTITIONS = "partitioning.PjitPartitioner.num_partitions"
DIMENSIONS = "partitioning.standard_logical_axis_rules.parameter_partitioning_dims"


class DoesNotFit(SystemExit):
    """The step does not fit into the memory of its devices; the exit code says so.

    Attributes:
      report: of the step as it was configured.
      remedy: of the first settings that were tried and fit; None if none of them did.
    """

    def __init__(self, report: Report, remedy: Report | None):
        super().__init__(1)
        self.report = report
        self.remedy = remedy


@dataclasses.dataclass(frozen=True)
class Job:
    """A training step that is to be compiled.

    Attributes:
      model: of `models.Model`'s kind, its network with a `config`.
      partitioner: devices and sharding.
      trainer_cls: makes the `Trainer`.
      batch_size: examples per global batch.
      shapes: of the features of one row, `[1, length]`.
      types: their dtypes.
      num_microbatches: parts that a batch is divided into.
      changed: settings that differ from the run's own, by their names in gin.
    """

    model: Any
    partitioner: PjitPartitioner
    trainer_cls: Callable[..., Trainer]
    batch_size: int
    shapes: Shapes
    types: Mapping[str, Any]
    num_microbatches: int = 1
    changed: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def trainer(self, state: TrainState) -> Trainer:
        """The trainer of a state of such shapes."""
        trainer = self.trainer_cls(
            model=self.model,
            partitioner=self.partitioner,
            abstract_state=state,
            random_seed=0,
            num_microbatches=self.num_microbatches,
        )
        trainer.check_batch_size(self.batch_size)
        return trainer

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of a global batch."""
        sharding = self.partitioner.batch_sharding
        return {
            name: jax.ShapeDtypeStruct(
                (self.batch_size, *shape[1:]), self.types[name], sharding=sharding
            )
            for name, shape in self.shapes.items()
        }

    def state(self) -> TrainState:
        """Shapes and shardings of the state."""
        return abstract_train_state(self.model, self.partitioner, self.shapes, self.types)

    def compile(self) -> Any:
        """The step, a `jax.stages.Compiled`.

        Raises:
          ValueError: if the devices do not divide the batch or an array.
          jax.errors.JaxRuntimeError: if the compiler refuses, as for want of memory.
        """
        state, batch = self.state(), self.batch()
        trainer = self.trainer(state)
        metrics = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.partitioner.replicated),
            trainer.metric_shapes(state, batch),
        )
        return trainer.step.lower(state, metrics, batch).compile()


@dataclasses.dataclass(frozen=True)
class Report:
    """What one device holds and does in a training step; all sizes in bytes.

    Attributes:
      device: kind of the devices.
      mesh: devices by mesh axis.
      parameter_count: numbers in the whole model.
      parameters: of the parameters.
      optimizer: of the optimiser's state.
      batch: of the batch.
      temporaries: of activations and all else that is made in between; None if it was refused.
      total: of all that is held at once; None if it was refused.
      limit: what a device has; None if that is not known.
      collectives: kind -> how often it runs and how much it leaves on a device, per step.
      seconds: of a step by the compiler's estimate, collectives left out; None where it means
        nothing.
      refusal: what the compiler said when it refused; None if it did not.
      changed: settings that differ from the run's own.
    """

    device: str
    mesh: Mapping[str, int]
    parameter_count: int
    parameters: int
    optimizer: int
    batch: int
    temporaries: int | None
    total: int | None
    limit: int | None
    collectives: Mapping[str, tuple[int, int]]
    seconds: float | None
    refusal: str | None
    changed: Mapping[str, Any]

    @property
    def fits(self) -> bool:
        """Whether it fits, or is not known not to."""
        if self.refusal is not None:
            return False
        return self.limit is None or self.total is None or self.total <= self.limit

    def lines(self) -> Iterator[str]:
        """The report for people."""
        yield f"parameters: {self.parameter_count:,}"
        yield f"mesh: {dict(self.mesh)} of {self.device}"
        yield "per device, GiB:"
        for name, size in (
            ("parameters", self.parameters),
            ("optimiser", self.optimizer),
            ("batch", self.batch),
            ("activations and temporaries", self.temporaries),
            ("total", self.total),
            ("memory", self.limit),
        ):
            yield f"  {name:<28} {'unknown' if size is None else f'{size / GIB:.3f}':>9}"
        for kind, (times, size) in self.collectives.items():
            yield f"{kind}: {times:,} per step, {size / GIB:.3f} GiB"
        if self.seconds is not None:
            yield f"seconds per step, by the compiler, less collectives: {self.seconds:.3g}"
        if self.refusal is not None:
            yield f"the compiler refuses: {self.refusal}"
        if self.limit is not None:
            yield "fits" if self.fits else "does not fit"


def check(job: Job) -> Report:
    """Compiles a step, reports it, and says what would make it fit if it does not.

    Raises:
      DoesNotFit: if it does not, whether or not other settings were found.
    """
    report = compile_step(job)
    _print(report.lines())
    if report.fits:
        return report
    for smaller in _smaller(job, report):
        settings = " ".join(f"--gin.{name}={value}" for name, value in smaller.changed.items())
        try:
            tried = compile_step(smaller)
        except ValueError as error:  # such as heads that the devices do not divide
            _print([f"cannot be: {settings}: {error}"])
            continue
        size = "" if tried.total is None else f", {tried.total / GIB:.3f} GiB"
        _print([f"{'fits' if tried.fits else 'does not fit'}{size}: {settings}"])
        if tried.fits:
            raise DoesNotFit(report, tried)
    _print(["none of these settings fits; more devices or a smaller model are needed."])
    raise DoesNotFit(report, None)


def _print(lines: Any) -> None:
    if jax.process_index() == 0:
        print(*lines, sep="\n", flush=True)


def compile_step(job: Job) -> Report:
    """Compiles a training step for the devices of its partitioner, which may not be there.

    Raises:
      ValueError: if the devices do not divide the batch or an array.
    """
    state = job.state()
    device = job.partitioner.mesh.devices.flat[0]
    known = {
        "device": device.device_kind,
        "mesh": dict(job.partitioner.mesh.shape),
        "parameter_count": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "parameters": _bytes(state.params),
        "optimizer": _bytes((state.step, state.opt_state)),
        "batch": _bytes(job.batch()),
        "limit": device_memory(device),
        "changed": dict(job.changed),
    }
    try:
        compiled = job.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # The first line says how much is missing; a list of what takes it follows.
        refusal = str(error).partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")
        return Report(
            **known, temporaries=None, total=None, collectives={}, seconds=None, refusal=refusal
        )
    memory = compiled_program.memory(compiled)
    return Report(
        **known,
        temporaries=memory.temporaries,
        total=memory.total,
        collectives=_collectives(compiled),
        seconds=(
            compiled_program.estimated_seconds(compiled, unknown_trips=1)
            if device.device_kind in TIMED
            else None
        ),
        refusal=None,
    )


def device_memory(device: jax.Device) -> int | None:
    """Bytes of a device, by its kind or, if it is there, by what it says; None if unknown."""
    if device.device_kind in CHIP_GIB:
        return CHIP_GIB[device.device_kind] * GIB
    return (device.memory_stats() or {}).get("bytes_limit")


def _bytes(tree: Any) -> int:
    """Bytes that one device holds of arrays with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _collectives(compiled: Any) -> dict[str, tuple[int, int]]:
    totals: dict[str, tuple[int, int]] = {}
    for found in compiled_program.collectives(compiled, unknown_trips=1):
        times, size = totals.get(found.kind, (0, 0))
        totals[found.kind] = times + found.times, size + found.times * found.bytes
    return totals


def _smaller(job: Job, report: Report) -> Iterator[Job]:
    """Settings that need less memory, each added to those before.

    Recomputed activations cost time, split parameters cost communication; whichever of activations
    and state is the larger is made smaller first. More devices to a copy of the model come last.
    """
    state = report.parameters + report.optimizer
    steps = [_recompute, _split_parameters]
    if report.limit is not None and 2 * state > report.limit:
        steps.reverse()
    for step in (*steps, _microbatches, _microbatches, _partition, _partition):
        smaller = step(job)
        if smaller is not None:
            job = smaller
            yield job


def _change(job: Job, name: str, value: Any, **fields: Any) -> Job:
    return dataclasses.replace(job, changed={**job.changed, name: value}, **fields)


def _recompute(job: Job) -> Job | None:
    config = job.model.module.config
    if config.remat == "full":
        return None
    model = copy.copy(job.model)
    model.module = job.model.module.clone(config=dataclasses.replace(config, remat="full"))
    return _change(job, REMAT, "full", model=model)


def _split_parameters(job: Job) -> Job | None:
    rules = list(job.partitioner.logical_axis_rules)
    if ("embed", "data") in rules or job.partitioner.mesh.shape["data"] == 1:
        return None
    place = rules.index(("embed", None)) if ("embed", None) in rules else len(rules)
    rules[place : place + 1] = [("embed", "data")]
    partitioner = _repartition(job, job.partitioner.mesh.shape["model"], rules)
    return _change(job, DIMENSIONS, 2, partitioner=partitioner) if partitioner else None


def _microbatches(job: Job) -> Job | None:
    [rows] = job.partitioner.batch_sharding.shard_shape((job.batch_size,))
    parts = job.num_microbatches * 2
    return None if rows % parts else _change(job, MICROBATCHES, parts, num_microbatches=parts)


def _partition(job: Job) -> Job | None:
    parts = job.partitioner.mesh.shape["model"] * 2
    if job.partitioner.mesh.size % parts:
        return None
    partitioner = _repartition(job, parts, job.partitioner.logical_axis_rules)
    return _change(job, PARTITIONS, parts, partitioner=partitioner) if partitioner else None


def _repartition(job: Job, num_partitions: int, rules: Any) -> PjitPartitioner | None:
    """The same devices otherwise; None for meshes of more than the two axes."""
    mesh = job.partitioner.mesh
    if tuple(mesh.axis_names) != ("data", "model"):
        return None
    return PjitPartitioner(num_partitions, rules, devices=list(mesh.devices.flat))
