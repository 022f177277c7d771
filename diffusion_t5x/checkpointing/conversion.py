"""Converting checkpoints offline: T5X's networks and layouts, and ours."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping
from typing import Any

import flax.core
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from diffusion_t5x.checkpointing.checkpoints import (
    PREFIX,
    Checkpointer,
    SaveCheckpointConfig,
    list_checkpoints,
)
from diffusion_t5x.checkpointing.fit import CheckpointMismatchError, compare
from diffusion_t5x.checkpointing.reading import open_params
from diffusion_t5x.evaluation.compiled_model import INIT_SHAPES
from diffusion_t5x.interop import t5x_checkpoints, t5x_networks
from diffusion_t5x.interop.stored_arrays import StoredArray, read_all
from diffusion_t5x.runtime.terminal import print_table
from diffusion_t5x.runtime.train_state import TrainState, named_leaves

OURS = t5x_networks.OURS
# Our layout with our names; T5X's layout with our names; T5X's layout with names of its networks.
FORMATS = (OURS, "t5x", "t5x:t5", "t5x:scalable_t5", "t5x:decoder_only")
FRESH = "fresh"


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
      path: of the checkpoint written.
      step: steps trained.
      sources: name written -> name read, or 'fresh'.
      arrays: name written -> array.
      dropped: names read that went nowhere.
      notes: what else there is to know.
    """

    path: str
    step: int
    sources: Mapping[str, str]
    arrays: Mapping[str, StoredArray]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]


def convert(
    source: str,
    destination: str,
    layout: str = OURS,
    *,
    model: Any = None,
    partial: bool = False,
    dtype: str | None = None,
    random_seed: int = 0,
    dry_run: bool = False,
) -> Conversion:
    """Writes `{destination}/checkpoint_{step}` with the parameters of a checkpoint.

    It appears whole or not at all. Without a model the network is taken from the checkpoint, and
    what a model of ours needs to be told is written to `{destination}/network.gin`.

    Args:
      source: a checkpoint, ours or T5X's, or the directory of a run for its latest.
      destination: a directory.
      layout: one of `FORMATS`.
      model: of `models.Model`'s kind, which the parameters are to fit; None for none.
      partial: give the model fresh parameters where the checkpoint lacks them or differs.
      dtype: of the parameters written, such as 'bfloat16'; None for that of each as it is.
      random_seed: of fresh parameters.
      dry_run: check that everything fits, and write nothing.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      FileExistsError: if what is to be written is there already.
      CheckpointMismatchError: if the parameters do not fit the model.
      ValueError: if settings do not go together, or the network cannot hold the parameters.
    """
    _check_settings(layout, model, partial)
    step, path = list_checkpoints(source)[-1]
    final = epath.Path(destination) / f"{PREFIX}_{step}"
    if final.exists():
        raise FileExistsError(f"{final} is there already; remove it, or choose another --to.")
    theirs = None
    if t5x_checkpoints.is_t5x_checkpoint(path):
        theirs = t5x_checkpoints.open_checkpoint(path)
    stored = t5x_networks.to_ours(theirs.params) if theirs else open_params(path)
    notes = _notes(path, theirs)
    known, dropped = dict(stored), tuple[str, ...]()
    if model is not None:
        known, dropped = _fit(path, known, model, partial, random_seed)
    elif layout in FORMATS[2:]:
        known = t5x_networks.from_ours(known, layout.partition(":")[2])
    if dtype is not None:
        known = {name: array.cast(dtype) for name, array in known.items()}
    sources = {name: array.source for name, array in known.items()}
    if dry_run:
        return Conversion(f"{final} (not written)", step, sources, known, dropped, notes)
    _write(destination, step, known, layout)
    if model is None and layout in FORMATS[:2]:
        needs_start = theirs is not None and t5x_networks.begins_with_zero(theirs.params)
        text = describe_network(stored, start_token=needs_start)
        epath.Path(destination, "network.gin").write_text(text)
        notes += (f"{destination}/network.gin tells a model file of this network's size.",)
    return Conversion(str(final), step, sources, known, dropped, notes)


def _check_settings(layout: str, model: Any, partial: bool) -> None:
    if layout not in FORMATS:
        near = difflib.get_close_matches(layout, FORMATS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"--format={layout} is unknown; did you mean {near!r}? Known: {', '.join(FORMATS)}."
        )
    if partial and model is None:
        raise ValueError("--partial: fresh parameters need a model; give its gin files.")
    if model is not None and layout in FORMATS[2:]:
        raise ValueError(f"--format={layout} writes T5X's network; it takes no gin files.")


def _notes(path: str, theirs: t5x_checkpoints.T5XCheckpoint | None) -> tuple[str, ...]:
    """What of a checkpoint is not taken over."""
    if theirs is not None:
        if theirs.has_optimizer_state:
            return ("T5X's optimiser state is dropped: training starts with a fresh optimiser.",)
    elif (epath.Path(path) / "optimizer").exists():
        return ("the optimiser's state and the data's position are not converted.",)
    return ()


def _fit(
    path: str, stored: dict[str, StoredArray], model: Any, partial: bool, seed: int
) -> tuple[dict[str, StoredArray], tuple[str, ...]]:
    """The model's parameters from `stored`, fresh ones where asked for; and names left over."""
    fresh = _fresh_parameters(model, seed)
    if t5x_networks.is_scanned(fresh):
        stored = t5x_networks.scan(stored)
    lines = compare(stored, fresh)
    if lines and not partial:
        raise CheckpointMismatchError(
            f"{path} does not fit this model:\n"
            + "\n".join(lines)
            + t5x_networks.hint(lines)
            + "\nWith --partial what fits is taken and the rest starts afresh."
        )
    fits = {n: a for n, a in stored.items() if n in fresh and a.shape == fresh[n].shape}
    if not fits:
        raise CheckpointMismatchError(
            f"{path} has nothing that fits this model:\n" + "\n".join(lines)
        )
    dropped = tuple(sorted(stored.keys() - fits.keys()))
    return {name: fits.get(name, array) for name, array in fresh.items()}, dropped


def _fresh_parameters(model: Any, seed: int) -> dict[str, StoredArray]:
    """Fresh parameters of a model, made when the first is read."""

    def init(rng: jax.Array) -> Any:
        return flax.core.unfreeze(model.get_initial_variables(rng, INIT_SHAPES, {})["params"])

    made: dict[str, Any] = {}

    def read(name: str) -> np.ndarray:
        if not made:
            made.update(named_leaves(jax.device_get(jax.jit(init)(jax.random.PRNGKey(seed)))))
        return made[name]

    shapes = named_leaves(jax.eval_shape(init, jax.random.PRNGKey(seed)))
    return {
        name: StoredArray(FRESH, leaf.shape, np.dtype(leaf.dtype), functools.partial(read, name))
        for name, leaf in shapes.items()
    }


def _write(destination: str, step: int, arrays: Mapping[str, StoredArray], layout: str) -> None:
    if layout != OURS:
        t5x_checkpoints.write_checkpoint(destination, step, arrays)
        return
    params = flax.traverse_util.unflatten_dict(read_all(arrays, "reading"), sep="/")
    checkpointer = Checkpointer(destination, SaveCheckpointConfig(save_dataset=False))
    try:
        checkpointer.save(TrainState(jnp.int32(step), params, None))
    finally:
        checkpointer.close()


def describe_network(params: Mapping[str, StoredArray], *, start_token: bool) -> str:
    """Gin bindings of the `TransformerConfig` that parameters under our names belong to.

    Activations are not in a checkpoint: one input projection is taken for T5's ReLU, two for T5
    1.1's gated GELU. Nor is `start_token`.
    """
    shape = {name: array.shape for name, array in params.items()}
    layers = {side: _count_layers(shape, side) for side in ("encoder", "decoder")}
    tables_: dict[str, Any] = {
        side: next(
            (s for n, s in shape.items() if re.match(rf"{side}/.*relpos_bias/", n)), (None, None)
        )
        for side in layers
    }
    heads = tables_["decoder"][0]
    gated = "decoder/layers_0/mlp/wi_1/kernel" in shape
    fields = {
        "vocab_size": shape["token_embedder/embedding"][0],
        "embed_dim": shape["token_embedder/embedding"][1],
        "num_heads": heads,
        "num_layers": layers["decoder"],
        "num_encoder_layers": layers["encoder"] or None,
        "head_dim": shape["decoder/layers_0/self_attention/query/kernel"][1] // heads,
        "mlp_dim": shape["decoder/layers_0/mlp/wi_0/kernel"][1],
        "mlp_activations": ("gelu", "linear") if gated else ("relu",),
        "tied_logits": "token_embedder/logits_kernel" not in shape,
        "relative_buckets": tables_["encoder"][1] or tables_["decoder"][1],
        "decoder_relative_buckets": tables_["decoder"][1],
        "relative_bias_per_layer": "decoder/relpos_bias/rel_embedding" not in shape,
        "start_token": start_token,
    }
    lines = [f"  {name} = {value!r}" for name, value in fields.items() if name != "vocab_size"]
    return "\n".join(
        [
            "# The network of a converted checkpoint; give it after a model file.",
            "from __gin__ import dynamic_registration",
            "",
            "from diffusion_t5x.networks import config",
            "",
            f"VOCAB_SIZE = {fields['vocab_size']}",
            "config.TransformerConfig:",
            *lines,
            "",
        ]
    )


def _count_layers(names: Mapping[str, Any], side: str) -> int:
    return len({m.group(1) for name in names if (m := re.match(rf"{side}/layers_(\d+)/", name))})


def print_conversion(conversion: Conversion) -> None:
    """Shows a table of what went where, layers taken together."""
    groups: dict[tuple[str, ...], int] = {}
    for name, source in conversion.sources.items():
        array = conversion.arrays[name]
        key = (_merge_layers(name), str(list(array.shape)), array.dtype.name, _merge_layers(source))
        groups[key] = groups.get(key, 0) + 1
    rows = [[name, shape, dtype, count, source]
            for (name, shape, dtype, source), count in groups.items()]  # fmt: skip
    rows += [[None, None, None, None, name] for name in conversion.dropped]
    print_table(["written", "shape", "dtype", "arrays", "read"], rows, conversion.path)
    fresh = [name for name, source in conversion.sources.items() if source == FRESH]
    if fresh:
        print(f"{len(fresh)} start afresh: {', '.join(fresh)}")
    for note in conversion.notes:
        print(note)
    print(f"written: {conversion.path}")


def _merge_layers(name: str) -> str:
    return re.sub(r"layers_\d+|\[layer \d+\]", lambda m: re.sub(r"\d+", "*", m.group(0)), name)
