"""Decoding as StableHLO (`jax.export`) that runs without this package: beginning, and one step."""

from __future__ import annotations

import functools
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from diffusion_t5x import paths
from diffusion_t5x.checkpointing.checkpoints import RestoreCheckpointConfig, select_checkpoints
from diffusion_t5x.data import vocabularies
from diffusion_t5x.evaluation.compiled_model import restorer
from diffusion_t5x.interfaces import SteppedDecoder
from diffusion_t5x.interop import tensor_files
from diffusion_t5x.interop.stored_arrays import StoredArray
from diffusion_t5x.models import Model
from diffusion_t5x.names import check_known
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.terminal import print_table
from diffusion_t5x.runtime.train_state import named_leaves

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
MANIFEST, PROGRAM = "manifest.json", "run.py"
FUNCTIONS = ("prefill", "step")
Flat = Mapping[str, Any]


class Traced(NamedTuple):
    """The two functions of an export, by name, and what they are called with.

    Attributes:
      functions: `prefill(params, prefixes, key)` and `step(params, state, key)`, each of which
        returns what of the state is new, tokens and scores; `params` and `state` by name.
      arguments: Shapes and dtypes of their arguments.
      num_steps: Calls of `step` that a text takes.
    """

    functions: Mapping[str, Callable[..., Any]]
    arguments: Mapping[str, Sequence[Any]]
    num_steps: int


def trace(model: Model, params: Any, batch_size: int, lengths: Mapping[str, int]) -> Traced:
    """Takes a model's decoding apart for fixed shapes.

    Args:
      params: Anything with shapes and dtypes.
      lengths: Tokens of 'inputs' and 'targets'.

    Raises:
      ValueError: If the decoder cannot be taken apart, or the network has a kernel of its own.
    """
    if not hasattr(model.decoder, "count_steps"):
        raise ValueError(
            f"DECODER = {type(model.decoder).__name__} has no `count_steps`, `start`, `step` and "
            "`finish` (interfaces.SteppedDecoder), so a step of it cannot be exported."
        )
    if (kernel := model.module.config.attention_kernel) != "xla":
        raise ValueError(
            f"TransformerConfig.attention_kernel = {kernel!r} runs on one platform; expected 'xla'."
        )
    decoder = cast(SteppedDecoder, model.decoder)
    num_steps = decoder.count_steps(lengths["targets"])
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in named_leaves(params).items()
    }
    targets = np.zeros((batch_size, lengths["targets"]), np.int32)

    def start(params: Flat, prefixes: jax.Array, key: jax.Array) -> Any:
        batch: dict[str, Any] = {
            "encoder_input_tokens": prefixes,
            "decoder_input_tokens": targets,
        }
        return model.start_decoding(_tree(params), batch, key)

    tokens = jax.ShapeDtypeStruct((batch_size, lengths["inputs"]), jnp.int32)
    key = jax.eval_shape(jax.random.PRNGKey, 0)
    beginning = abstract, tokens, key
    first = jax.eval_shape(start, *beginning)
    shapes, layout = named_leaves(first), jax.tree.structure(first)

    def results(old: Any, new: Any) -> Any:
        """Returns what is new in a state, by name; and texts and scores, best last."""
        before = named_leaves(old)
        changed = {name: x for name, x in named_leaves(new).items() if x is not before.get(name)}
        decoded = decoder.finish(new[1])
        return changed, decoded.tokens, decoded.scores

    def prefill(params: Flat, prefixes: jax.Array, key: jax.Array) -> Any:
        return results((), start(params, prefixes, key))

    def step(params: Flat, state: Flat, key: jax.Array) -> Any:
        old = jax.tree.unflatten(layout, [state[name] for name in shapes])
        cached, canvases = old
        new = model.decode_step(_tree(params), cached, canvases, batch_size, key)
        return results(old, (cached, new))

    functions: dict[str, Callable[..., Any]] = {"prefill": prefill, "step": step}
    arguments = {"prefill": beginning, "step": (abstract, shapes, key)}
    return Traced(functions, arguments, num_steps)


def _tree(params: Flat) -> Any:
    return flax.traverse_util.unflatten_dict(dict(params), sep="/")


def export(
    *,
    model: Model,
    restore_checkpoint_cfg: RestoreCheckpointConfig,
    partitioner: PjitPartitioner,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    export_dir: str,
    platforms: Sequence[str],
    dry_run: bool = False,
) -> None:
    """Writes a model's decoding as two StableHLO functions, and its parameters, into a directory.

    `docs/export.md` describes the files. The directory appears when all of them are written.

    Args:
      restore_checkpoint_cfg: One checkpoint.
      partitioner: Devices to restore on; what is written is for one device.
      task_feature_lengths: Tokens of 'inputs' and 'targets'.
      batch_size: Prefixes per call.
      platforms: Some of `PLATFORMS`, none of which need be present.
      dry_run: Only check the checkpoint, and lower the functions.

    Raises:
      FileNotFoundError: If there is no checkpoint.
      ValueError: If the directory is not empty, a platform is unknown, the checkpoint does not fit,
        or the decoder cannot be taken apart.
    """
    if isinstance(platforms, str) or not platforms:
        raise ValueError(f"PLATFORMS = {platforms!r}; expected some of {', '.join(PLATFORMS)}.")
    for platform in platforms:
        check_known(platform, PLATFORMS, "PLATFORMS")
    if batch_size < 1:
        raise ValueError(f"BATCH_SIZE = {batch_size}; expected at least 1.")
    directory = paths.writable(export_dir, "EXPORT_DIR")
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"EXPORT_DIR = {export_dir!r} is not empty; expected a new directory.")
    step, path = select_checkpoints(restore_checkpoint_cfg)[-1]
    params = named_leaves(restorer(model, partitioner, restore_checkpoint_cfg)(path))
    traced = trace(model, params, batch_size, task_feature_lengths)
    contents: dict[str, bytes] = {}
    described: dict[str, Any] = {}
    for name in FUNCTIONS:
        jitted = jax.jit(traced.functions[name])
        exported = jax_export.export(jitted, platforms=tuple(platforms))(*traced.arguments[name])
        contents[f"{name}.jax_export"] = bytes(exported.serialize())
        described[name] = {
            "file": f"{name}.jax_export",
            "inputs": _describe(traced.arguments[name]),
            "outputs": _describe(jax.tree.unflatten(exported.out_tree, exported.out_avals)),
        }
    manifest = {
        "decoder": repr(model.decoder),
        "steps": traced.num_steps,
        "batch_size": batch_size,
        "lengths": dict(task_feature_lengths),
        "vocabulary": vocabularies.fingerprint(model.output_vocabulary),
        "eos_id": model.output_vocabulary.eos_id,
        "checkpoint": {"path": path, "step": step},
        "platforms": list(platforms),
        "jax": jax.__version__,
        "functions": described,
    }
    contents[PROGRAM] = pathlib.Path(__file__).with_name("exported_program.py").read_bytes()
    rows = [[name, f"{len(content):,}"] for name, content in contents.items()]
    size = sum(x.size * x.dtype.itemsize for x in params.values())
    print_table(["file", "bytes"], [*rows, [tensor_files.WEIGHTS, f"{size:,}"]], str(directory))
    if dry_run:
        return
    arrays = {
        name: StoredArray(name, x.shape, x.dtype, functools.partial(partitioner.gather, x))
        for name, x in params.items()
    }
    tensor_files.write_model(
        directory, arrays, manifest, contents, max_shard_bytes=sys.maxsize, config_name=MANIFEST
    )


def _describe(tree: Any) -> list[dict[str, Any]]:
    """Returns name, shape and dtype of each array, in the order in which a function has them."""
    return [
        {"name": name, "shape": list(x.shape), "dtype": x.dtype.name}
        for name, x in named_leaves(tree).items()
    ]
