"""Abstract devices of TPU slices, for ahead-of-time compilation without a TPU."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from diffusion_t5x.names import did_you_mean

# Generation -> TensorCores per chip and prefix, in accelerator names.
GENERATIONS = {"v4": (2, "v4"), "v5e": (1, "v5litepod"), "v5p": (2, "v5p"), "v6e": (1, "v6e")}


def accelerator_type(topology: str) -> str:
    """Returns the accelerator name of a topology, such as 'v5p-32' for 'v5p:2x2x4'.

    Raises:
      ValueError: If the topology does not have the form 'v5p:4x4x8' or its generation is unknown.
    """
    generation, _, slice_sizes = topology.partition(":")
    if generation not in GENERATIONS:
        raise ValueError(
            f"topology {topology!r} has an unknown TPU generation, {generation!r}; "
            f"{did_you_mean(generation, GENERATIONS)} Expected one of these and the slice, such as "
            "'v5p:4x4x8'."
        )
    dimensions = 3 if generation in ("v4", "v5p") else 2
    whole = re.fullmatch(r"\d+(x\d+)*", slice_sizes)
    sizes = [int(size) for size in slice_sizes.split("x")] if whole else []
    if len(sizes) != dimensions or not math.prod(sizes):
        example = f"{generation}:" + ("4x4x8" if dimensions == 3 else "4x4")
        raise ValueError(
            f"topology {topology!r} does not name a slice of {generation}: expected {dimensions} "
            f"sizes, such as {example!r}."
        )
    cores, name = GENERATIONS[generation]
    return f"{name}-{math.prod(sizes) * cores}"


def devices(topology: str) -> np.ndarray:
    """Returns the devices of a TPU slice, `[chips]`, which can be compiled for but not run on.

    The process must not be using a TPU of its own. libtpu reads its environment once, so a process
    compiles for the generation of the first topology that it asks for.

    Args:
      topology: Generation and chips of the slice, such as 'v5p:4x4x8' or 'v5e:4x4'.

    Raises:
      ValueError: If the topology is unknown or libtpu refuses it.
      RuntimeError: If libtpu is not installed.
    """
    accelerator = accelerator_type(topology)
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
    # With libtpu installed, JAX would look for a TPU to run on.
    if not jax.config.jax_platforms:  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")
    return np.asarray(_describe(topology).devices)


def _describe(topology: str) -> Any:
    # A device is a chip, as on real machines; on v4, libtpu's default is a core.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        return topologies.get_topology_desc(topology, "tpu", **options)
    except Exception as error:
        raise ValueError(f"libtpu knows no topology {topology!r}: {error}") from error
