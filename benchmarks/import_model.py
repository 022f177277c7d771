"""What it takes to import a Hugging Face model: seconds, and memory at its high-water mark.

python -m benchmarks.import_model MODEL   # a directory of safetensors, or a .gguf file

Prints one JSON line for restoring the parameters in float32 on one device, with layers apart and
scanned, and one for converting them to a checkpoint of ours, each in a fresh process. Memory is
that of the process above what it held before, in MB; `allowed` is 1.3 times the parameters plus the
largest array. Linux only: the high-water mark is the kernel's.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import pathlib
import re
import tempfile
import time
from typing import Any

KINDS = ("restore", "restore_scanned", "convert")


def _kilobytes(field: str) -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    assert found, f"/proc/self/status has no {field}"
    return int(found[1])


def measure(kind: str, path: str) -> None:
    """Prints the line of one kind of import."""
    import jax
    import jax.numpy as jnp

    from diffusion_t5x.checkpointing import conversion, reading
    from diffusion_t5x.interop import hf_models
    from diffusion_t5x.networks.config import TransformerConfig
    from diffusion_t5x.networks.decoder_only import DecoderOnly

    fields = hf_models.network_fields(path, hf_models.read_config(path))
    config = TransformerConfig(**fields, scan_layers=kind == "restore_scanned")
    init = functools.partial(DecoderOnly(config).init, attention_pattern="causal")
    token = jnp.ones((1, 1), jnp.int32)
    shapes = jax.eval_shape(init, jax.random.PRNGKey(0), token, token)["params"]
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def of_one_device(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    if kind == "convert":
        sizes = [array.dtype.itemsize * array.shape[0] * (array.shape[1:] or (1,))[0]
                 for array in reading.open_params(path).values()]  # fmt: skip
    else:
        sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)]
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the mark begins here
    before, start = _kilobytes("VmRSS"), time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        if kind == "convert":
            conversion.convert(path, directory)
        else:
            params = reading.restore_params(path, jax.tree.map(of_one_device, shapes))
            jax.block_until_ready(params)
        seconds = time.perf_counter() - start
    record = {
        "kind": kind,
        "seconds": round(seconds, 1),
        "peak_mb": round((_kilobytes("VmHWM") - before) * 1024 / 1e6),
        "parameters_mb": round(sum(sizes) / 1e6),
        "largest_mb": round(max(sizes) / 1e6),
        "allowed_mb": round((1.3 * sum(sizes) + max(sizes)) / 1e6),
    }
    print(json.dumps(record), flush=True)


def main() -> None:
    """Measures each kind in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    path = parser.parse_args().model
    processes = multiprocessing.get_context("spawn")
    for kind in KINDS:
        process = processes.Process(target=measure, args=(kind, path))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
