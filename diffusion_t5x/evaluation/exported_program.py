"""Decodes prefixes with the export beside this file, by jax, numpy and safetensors alone.

python run.py < prefixes.json > texts.json, both of them lists with a list of tokens per prefix
"""

import json
import pathlib
import sys

import jax
import numpy as np
from jax import export
from safetensors.numpy import load_file


def main() -> None:
    """Reads prefixes from the standard input and writes the best text of each."""
    folder = pathlib.Path(__file__).parent
    manifest = json.loads((folder / "manifest.json").read_text())
    stored = [(folder / f"{name}.jax_export").read_bytes() for name in ("prefill", "step")]
    prefill, step = (jax.jit(export.deserialize(bytearray(content)).call) for content in stored)
    params = jax.device_put(load_file(folder / "model.safetensors"))
    given = json.load(sys.stdin)
    prefixes = np.zeros((manifest["batch_size"], manifest["lengths"]["inputs"]), np.int32)
    for row, tokens in enumerate(given):
        prefixes[row, : len(tokens)] = tokens  # what is left is padding
    key = jax.random.PRNGKey(0)
    state, texts, _scores = prefill(params, prefixes, key)
    for _ in range(manifest["steps"]):
        changed, texts, _scores = step(params, state, key)
        state = {**state, **changed}
    # Texts are [batch, samples, length], _scores [batch, samples], the best last.
    json.dump(np.asarray(texts)[: len(given), -1].tolist(), sys.stdout)


if __name__ == "__main__":
    main()
