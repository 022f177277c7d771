"""Abstract devices of TPU slices and NVIDIA cards, for ahead-of-time compilation without them.

A topology is a TPU generation and the chips of a slice, 'v5p:4x4x8', or an NVIDIA card and hosts x
cards, 'h100:2x8'.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import pathlib
import re
from importlib import metadata
from typing import Any

import jax
import jaxlib
import numpy as np
from jax.experimental import topologies

from diffusion_t5x.names import did_you_mean

# Generation -> TensorCores per chip and prefix, in accelerator names.
GENERATIONS = {"v4": (2, "v4"), "v5e": (1, "v5litepod"), "v5p": (2, "v5p"), "v6e": (1, "v6e")}


@dataclasses.dataclass(frozen=True)
class Card:
    """What the compiler asks of an NVIDIA card; figures of its data sheet and architecture paper.

    Attributes:
      kind: The `device_kind` of a real one.
      capability: Compute capability, major and minor.
      multiprocessors: Number of streaming multiprocessors.
      lanes: Number of float32 units of a multiprocessor.
      shared_kib: KiB of shared memory of a multiprocessor; a block may use all but one.
      l2_mib: MiB of the second-level cache.
      clock: Boost clock in GHz.
      bandwidth: GB/s of main memory.
      memory_gib: GiB of main memory that CUDA reports.
    """

    kind: str
    capability: tuple[int, int]
    multiprocessors: int
    lanes: int
    shared_kib: int
    l2_mib: int
    clock: float
    bandwidth: int
    memory_gib: float


CARDS = {
    "a100": Card("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164, 40, 1.41, 2039, 79.1),
    "h100": Card("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228, 50, 1.98, 3352, 79.1),
    "h200": Card("NVIDIA H200", (9, 0), 132, 128, 228, 50, 1.98, 4800, 139.7),
    "b200": Card("NVIDIA B200", (10, 0), 148, 128, 228, 126, 1.965, 8000, 178.3),
}
# Where no card is present, nothing can be timed, and Triton's products are chosen by timing.
_CUDA_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}


def _sizes(topology: str, dimensions: int, of: str, example: str) -> list[int]:
    """Returns the positive numbers after a topology's colon."""
    name, _, shape = topology.partition(":")
    whole = re.fullmatch(r"\d+(x\d+)*", shape)
    sizes = [int(size) for size in shape.split("x")] if whole else []
    if len(sizes) != dimensions or not math.prod(sizes):
        raise ValueError(
            f"topology {topology!r} does not name {of} {name}: expected {dimensions} sizes, "
            f"such as '{name}:{example}'."
        )
    return sizes


def accelerator_type(topology: str) -> str:
    """Returns the accelerator name of a TPU topology, such as 'v5p-32' for 'v5p:2x2x4'.

    Raises:
      ValueError: If the topology, of one of `GENERATIONS`, does not have the form 'v5p:4x4x8'.
    """
    generation = topology.partition(":")[0]
    dimensions = 3 if generation in ("v4", "v5p") else 2
    sizes = _sizes(topology, dimensions, "a slice of", "4x4x8" if dimensions == 3 else "4x4")
    cores, name = GENERATIONS[generation]
    return f"{name}-{math.prod(sizes) * cores}"


def devices(topology: str) -> np.ndarray:
    """Returns the devices of a topology, `[devices]`, which can be compiled for but not run on.

    The process must not be using a TPU of its own. libtpu reads its environment once, so a process
    compiles for the TPU generation of the first topology that it asks for.

    Args:
      topology: Generation and chips of a TPU slice, such as 'v5p:4x4x8' or 'v5e:4x4', or an NVIDIA
        card, hosts and cards of each, such as 'h100:2x8'.

    Raises:
      ValueError: If the topology is unknown or the compiler refuses it.
      RuntimeError: If its compiler is not installed, or is not that of the installed JAX.
    """
    name = topology.partition(":")[0]
    if name in CARDS:
        _sizes(topology, 2, "hosts x cards of", "1x8")
        _require_cuda_compiler(topology)
    elif name in GENERATIONS:
        _prepare_libtpu(topology, accelerator_type(topology))
    else:
        raise ValueError(
            f"topology {topology!r} has an unknown TPU generation or NVIDIA card, {name!r}; "
            f"{did_you_mean(name, [*GENERATIONS, *CARDS])} Expected one of these and the slice, "
            "such as 'v5p:4x4x8', or hosts x cards, such as 'h100:2x8'."
        )
    # With a compiler installed, JAX would look for devices of its kind to run on.
    if not jax.config.jax_platforms:  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")
    return np.asarray(_describe(topology).devices)


def compiler_options(device: jax.Device) -> dict[str, Any]:
    """Returns the options to compile with for a device of `devices`, except those in XLA_FLAGS.

    Set in `XLA_FLAGS` they would come too late in a process that has used JAX before.
    """
    if device.platform != "gpu" or device in jax.devices():
        return {}
    given = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in _CUDA_OPTIONS.items() if f"--{name}" not in given}


def _prepare_libtpu(topology: str, accelerator: str) -> None:
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(
            f"topology {topology!r} needs the TPU compiler, libtpu, which is not installed: "
            "pip install 'diffusion_t5x[tpu]'. No TPU is needed."
        )
    # Without these, libtpu waits for the metadata server of a cloud machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", accelerator)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Processes that only compile need no TPU each, so several may load libtpu.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def _require_cuda_compiler(topology: str) -> None:
    """Refuses to go on without JAX's plugin for CUDA, of its version, and NVIDIA's compiler.

    XLA would end the process where it misses the assembler.
    """
    wanted, problems = jaxlib.__version__, []
    for package in ("jax-cuda13-plugin", "jax-cuda13-pjrt"):
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            found = "not installed"
        if found != wanted:
            problems.append(f"{package} is {found}; expected {wanted}, as jaxlib")
    spec = importlib.util.find_spec("nvidia")
    parents = spec.submodule_search_locations if spec else None
    places = [pathlib.Path(parent, "cu13") for parent in parents or ()]
    places.append(pathlib.Path("/usr/local/cuda"))
    for file in ("bin/ptxas", "nvvm/libdevice/libdevice.10.bc"):
        if not any((place / file).exists() for place in places):
            problems.append(f"{file} is nowhere in {', '.join(map(str, places))}")
    if problems:
        raise RuntimeError(
            f"topology {topology!r} needs the CUDA compiler: {'; '.join(problems)}. pip install "
            f"'diffusion_t5x[cuda-compiler]' jax-cuda13-plugin=={wanted}. No card is needed."
        )


def _describe(topology: str) -> Any:
    name, _, shape = topology.partition(":")
    try:
        if name in CARDS:
            # One partition, hosts, cards of each.
            return topologies.get_topology_desc(
                platform="cuda", topology=f"1x{shape}", target_config=target_config(CARDS[name])
            )
        # A device is a chip, as on real machines; on v4, libtpu's default is a core.
        options = {"chip_config_name": "megacore"} if name == "v4" else {}
        return topologies.get_topology_desc(topology, "tpu", **options)
    except Exception as error:
        compiler = "the CUDA compiler" if name in CARDS else "libtpu"
        raise ValueError(f"{compiler} knows no topology {topology!r}: {error}") from error


def target_config(card: Card) -> str:
    """Returns XLA's description of a card, a `GpuTargetConfigProto` as text.

    The numbers that are no card's own are CUDA's limits from compute capability 8.0 on.
    """
    major, minor = card.capability
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {card.multiprocessors}
  fpus_per_core: {card.lanes}
  clock_rate_ghz: {card.clock}
  memory_bandwidth: {card.bandwidth * 10**9}
  device_memory_size: {int(card.memory_gib * 2**30)}
  l2_cache_size: {card.l2_mib * 2**20}
  shared_memory_per_core: {card.shared_kib * 2**10}
  shared_memory_per_block_optin: {(card.shared_kib - 1) * 2**10}
  shared_memory_per_block: {48 * 2**10}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{card.kind}"
"""
