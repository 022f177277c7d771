"""Devices of TPU slices that are not there: libtpu compiles for them on any machine."""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

# For each generation: TensorCores of a chip in accelerator names, and what such names begin with.
GENERATIONS = {"v4": (2, "v4"), "v5e": (1, "v5litepod"), "v5p": (2, "v5p"), "v6e": (1, "v6e")}


def accelerator_type(topology: str) -> str:
    """The accelerator of a topology: 'v5p-32' for 'v5p:2x2x4'.

    Raises:
      ValueError: the topology is not of the form 'v5p:4x4x8', or its generation is unknown.
    """
    generation, _, slice_sizes = topology.partition(":")
    if generation not in GENERATIONS:
        near = difflib.get_close_matches(generation, GENERATIONS, 1, 0)
        raise ValueError(
            f"topology {topology!r} is of no known TPU generation; did you mean {near[0]!r}? "
            f"Known: {', '.join(GENERATIONS)}, followed by the slice, such as 'v5p:4x4x8'."
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
    """The devices of a TPU slice, to compile for and not to run on.

    The process must have no TPU of its own in use. libtpu reads its surroundings once: one process
    compiles for the generation of the first topology that it asks for.

    Args:
      topology: generation and chips of the slice, such as 'v5p:4x4x8' or 'v5e:4x4'.

    Returns:
      `jax.Device` objects: [chips].

    Raises:
      ValueError: the topology is unknown, or libtpu refuses it.
      RuntimeError: libtpu is not installed.
    """
    accelerator = accelerator_type(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(
            f"topology {topology!r} needs the TPU compiler, libtpu, which is not installed: "
            "pip install 'diffusion_t5x[tpu]'. No TPU is needed."
        )
    # Without these libtpu asks the metadata server of a cloud machine, and waits for it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", accelerator)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # A process that only compiles needs no TPU for itself, and several may do so at once.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if not jax.config.jax_platforms:  # With libtpu installed, JAX would look for a TPU to run on.
        jax.config.update("jax_platforms", "cpu")
    return np.asarray(_describe(topology).devices)


def _describe(topology: str) -> Any:
    # A device is a chip, as on the machines themselves: on v4, unless told, it would be a core.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        return topologies.get_topology_desc(topology, "tpu", **options)
    except Exception as error:
        raise ValueError(f"libtpu knows no topology {topology!r}: {error}") from error
