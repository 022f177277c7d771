"""Converts checkpoints offline, between T5X's networks and layouts, Hugging Face's, and ours."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from diffusion_t5x import names, paths
from diffusion_t5x.checkpointing import hf_export
from diffusion_t5x.checkpointing.checkpoints import (
    PREFIX,
    Checkpointer,
    SaveCheckpointConfig,
    list_checkpoints,
)
from diffusion_t5x.checkpointing.reading import (
    PARAMETERS,
    CheckpointMismatchError,
    compare,
    has_average,
    has_optimizer_state,
    open_params,
)
from diffusion_t5x.interop import hf_models, t5x_checkpoints, t5x_networks, tensor_files
from diffusion_t5x.interop.low_rank import is_low_rank, merge_low_rank
from diffusion_t5x.interop.stored_arrays import StoredArray, read_each, read_together
from diffusion_t5x.networks.config import SCANNED_FROM
from diffusion_t5x.runtime import orbax_buckets
from diffusion_t5x.runtime.files import write_atomically
from diffusion_t5x.runtime.terminal import print_table
from diffusion_t5x.runtime.train_state import INIT_SHAPES, TrainState, named_leaves

if TYPE_CHECKING:
    from diffusion_t5x.models import Model

OURS = t5x_networks.OURS
HUGGING_FACE = "hugging_face"
# Our layout with our names; T5X's layout with our names; T5X's layout with names of its networks;
# Hugging Face's directories with the names of the family.
FORMATS = (OURS, "t5x", "t5x:t5", "t5x:scalable_t5", "t5x:decoder_only", HUGGING_FACE)
T5X_NETWORKS = FORMATS[2:5]
FRESH = "fresh"


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The checkpoint that a conversion wrote.

    Attributes:
      arrays: Its arrays by name; the `source` of each is its name in the checkpoint read, or
        'fresh'.
      dropped: Names of the arrays read that were not used.
      notes: Further remarks for the user.
    """

    path: str
    step: int
    arrays: Mapping[str, StoredArray]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]


def convert(
    source: str,
    destination: str,
    layout: str = OURS,
    *,
    model: Model | None = None,
    partial: bool = False,
    dtype: str | None = None,
    dry_run: bool = False,
    hf_model: str | None = None,
    lengths: Mapping[str, int] | None = None,
    parameters: str = "averaged",
) -> Conversion:
    """Writes `{destination}/checkpoint_{step}`, atomically, with the parameters of a checkpoint.

    Without a model the network is inferred from the checkpoint, and a gin file that configures a
    model of ours for it is written to `{destination}/network.gin`; of a Hugging Face model settings
    and tokenizer go to `{destination}/hugging_face`. With `layout` 'hugging_face' the destination
    itself becomes such a model, whole or not at all.

    Args:
      source: A checkpoint, ours or T5X's, the directory of a run for its latest, or a Hugging Face
        model.
      destination: The directory to write into.
      layout: One of `FORMATS`.
      model: The model that the parameters must fit; None to infer the network. Unless it has
        low-rank adaptation, that of the checkpoint is merged into its kernels.
      partial: Whether to initialise the parameters that the checkpoint lacks or has in another
        shape, instead of raising an error.
      dtype: Type of the parameters written, such as 'bfloat16'; None to keep that of each.
      dry_run: Whether to check that everything fits, and write nothing.
      hf_model: HF_MODEL, if `layout` is 'hugging_face': see `hf_export.prepare`.
      lengths: TASK_FEATURE_LENGTHS, for the settings that are written beside.
      parameters: 'averaged' for the moving average of the parameters where the checkpoint has one,
        'raw' for the parameters as they are; what is written has no average beside.

    Raises:
      FileNotFoundError: If there is no checkpoint.
      FileExistsError: If the checkpoint to write exists.
      CheckpointMismatchError: If the parameters do not fit the model.
      ValueError: If settings contradict each other, or the network cannot hold the parameters.
    """
    _check_settings(layout, model, partial)
    names.check_known(parameters, PARAMETERS, "--parameters")
    origin = paths.readable(source, "--from")
    directory = paths.writable(destination, "--to")
    step, path = list_checkpoints(str(origin))[-1]
    if layout == HUGGING_FACE and model is not None:
        stored, notes = _merge(open_params(path, model.module.config.vocab_size, parameters), None)
        notes += _note_average(path, parameters)
        export = hf_export.prepare(path, _cast(stored, dtype), model, hf_model, lengths)
        tensor_files.check_destination(directory)
        if not dry_run:
            export.write(directory)
        written = f"{directory}{' (not written)' * dry_run}"
        return Conversion(written, step, export.arrays, (), notes)
    final = directory / f"{PREFIX}_{step}"
    if final.exists() and orbax_buckets.is_complete(final):
        raise FileExistsError(f"{final} already exists; remove it, or choose another --to.")
    rows = 0 if model is None else model.module.config.vocab_size
    stored, needs_start, notes = _open(path, rows, parameters)
    stored, merged = _merge(stored, model)
    notes += merged + _note_average(path, parameters)
    arrays, dropped = stored, tuple[str, ...]()
    if model is not None:
        arrays, dropped = _fit(path, stored, model, partial)
    elif not hf_models.is_model(path) or layout in T5X_NETWORKS:
        t5x_networks.check_is_t5(stored)
        if layout in T5X_NETWORKS:
            arrays = t5x_networks.from_ours(stored, layout.partition(":")[2])
    arrays = _cast(arrays, dtype)
    if dry_run:
        return Conversion(f"{final} (not written)", step, arrays, dropped, notes)
    _write(str(directory), step, arrays, layout)
    if hf_models.is_model(path):
        beside = directory / HUGGING_FACE
        hf_export.copy_settings(path, beside)
        notes += (f"--gin_file=models/hugging_face.gin --gin.HF_MODEL={beside} is its model.",)
    elif model is None and layout not in T5X_NETWORKS:
        text = describe_network(stored, layout, start_token=needs_start)
        write_atomically(directory / "network.gin", text)
        notes += (f"give {directory}/network.gin after a model file to build this network.",)
    return Conversion(str(final), step, arrays, dropped, notes)


def _note_average(path: str, parameters: str) -> tuple[str, ...]:
    if not has_average(path):
        return ()
    taken = "taken" if parameters == "averaged" else "left out"
    return (f"the moving average of the parameters is {taken} (--parameters={parameters}).",)


def _open(
    path: str, rows: int, parameters: str
) -> tuple[dict[str, StoredArray], bool, tuple[str, ...]]:
    """Returns parameters under our names, whether they need `start_token`, and what is left out."""
    if t5x_checkpoints.is_t5x_checkpoint(path):
        theirs = t5x_checkpoints.open_checkpoint(path)
        note = "T5X's optimiser state is dropped: training starts with a fresh one."
        needs_start = t5x_networks.begins_with_zero(theirs.params)
        stored = t5x_networks.to_ours(theirs.params)
        return stored, needs_start, (note,) if theirs.has_optimizer_state else ()
    note = "optimiser state and data position are not converted."
    return open_params(path, rows, parameters), False, (note,) if has_optimizer_state(path) else ()


def _cast(arrays: dict[str, StoredArray], dtype: str | None) -> dict[str, StoredArray]:
    if dtype is None:
        return arrays
    return {name: array.cast(dtype) for name, array in arrays.items()}


def _check_settings(layout: str, model: Model | None, partial: bool) -> None:
    names.check_known(layout, FORMATS, "--format")
    if partial and model is None:
        raise ValueError("--partial: fresh parameters need a model; give its gin files.")
    if layout == HUGGING_FACE and (model is None or partial):
        raise ValueError(
            f"--format={layout} takes the gin files of the model, and all of its parameters: "
            "--gin_file=models/hugging_face.gin --gin.HF_MODEL=... or --gin_file=RUN/config.gin."
        )
    if model is not None and layout in T5X_NETWORKS:
        raise ValueError(f"--format={layout} writes T5X's network; it takes no gin files.")


def _merge(
    stored: dict[str, StoredArray], model: Model | None
) -> tuple[dict[str, StoredArray], tuple[str, ...]]:
    """Merges low-rank factors, unless the model has them; returns parameters and notes."""
    kept = model is not None and model.module.config.low_rank is not None
    if kept or not any(map(is_low_rank, stored)):
        return stored, ()
    return merge_low_rank(stored), ("low-rank factors are merged into their kernels.",)


def _fit(
    path: str, stored: dict[str, StoredArray], model: Model, partial: bool
) -> tuple[dict[str, StoredArray], tuple[str, ...]]:
    """Returns the model's parameters, from `stored` or fresh if `partial`, and names not used."""
    fresh = _fresh_parameters(model)
    if t5x_networks.is_scanned(fresh):
        stored = t5x_networks.scan(stored)
    lines = compare(stored, fresh)
    differences = "\n".join(lines)
    if lines and not partial:
        raise CheckpointMismatchError(
            f"{path} does not fit this model:\n{differences}{t5x_networks.hint(lines)}\n"
            "With --partial the parameters that fit are converted and the others initialised."
        )
    fits = {n: a for n, a in stored.items() if n in fresh and a.shape == fresh[n].shape}
    if not fits:
        raise CheckpointMismatchError(f"{path} has no parameter of this model:\n{differences}")
    dropped = tuple(sorted(stored.keys() - fits.keys()))
    return {name: fits.get(name, array) for name, array in fresh.items()}, dropped


def _fresh_parameters(model: Model) -> dict[str, StoredArray]:
    """Returns a model's parameters, initialised when the first is read."""

    def init(rng: jax.Array) -> Any:
        return model.get_initial_variables(rng, INIT_SHAPES, {})["params"]

    def read() -> dict[str, np.ndarray]:
        return named_leaves(jax.device_get(jax.jit(init)(jax.random.PRNGKey(0))))

    shapes = named_leaves(jax.eval_shape(init, jax.random.PRNGKey(0)))
    fresh = read_together(shapes, FRESH, read)
    return {name: dataclasses.replace(array, source=FRESH) for name, array in fresh.items()}


def _write(destination: str, step: int, arrays: Mapping[str, StoredArray], layout: str) -> None:
    if layout != OURS:
        t5x_checkpoints.write_checkpoint(destination, step, arrays)
        return
    params = flax.traverse_util.unflatten_dict(dict(read_each(arrays, "reading")), sep="/")
    config = SaveCheckpointConfig(save_dataset=False)
    with _without_copies(), contextlib.closing(Checkpointer(destination, config)) as checkpointer:
        checkpointer.save(TrainState(jnp.int32(step), params, None))


@contextlib.contextmanager
def _without_copies() -> Iterator[None]:
    """Has Orbax write arrays of NumPy as they are; it would copy all of them before it begins."""
    handlers, kind = ocp.type_handlers, np.ndarray
    usual = handlers.get_type_handler(kind)
    handlers.register_type_handler(
        kind, handlers.NumpyHandler(deepcopy_host_arrays=False), override=True
    )
    try:
        yield
    finally:
        handlers.register_type_handler(kind, usual, override=True)


def describe_network(params: Mapping[str, StoredArray], layout: str, *, start_token: bool) -> str:
    """Returns gin bindings of the `TransformerConfig` that parameters belong to.

    Args:
      params: Parameters of each layer under our names. They do not determine the activations: one
        input projection is taken for T5's ReLU, two for the gated GELU of T5 1.1.
      layout: That of the checkpoint written, of `FORMATS`. Ours is read with layers scanned or not;
        T5X reads arrays by the names that they were written under, of single layers.
      start_token: The setting of this name, which parameters do not determine either.
    """
    shape = {name: array.shape for name, array in params.items()}

    def count_layers(side: str) -> int:
        matches = (re.match(rf"{side}/layers_(\d+)/", name) for name in shape)
        return len({match.group(1) for match in matches if match})

    tables = ((re.match(r"(\w+)/.*relpos_bias/", name), s) for name, s in shape.items())
    bias = {match.group(1): s for match, s in tables if match}  # stack -> (heads, buckets)
    heads, decoder_buckets = bias["decoder"]
    gated = "decoder/layers_0/mlp/wi_1/kernel" in shape
    fields = {
        "embed_dim": shape["token_embedder/embedding"][1],
        "num_heads": heads,
        "num_layers": count_layers("decoder"),
        "num_encoder_layers": count_layers("encoder") or None,
        "head_dim": shape["decoder/layers_0/self_attention/query/kernel"][1] // heads,
        "mlp_dim": shape["decoder/layers_0/mlp/wi_0/kernel"][1],
        "mlp_activations": ("gelu", "linear") if gated else ("relu",),
        "tied_logits": "token_embedder/logits_kernel" not in shape,
        "relative_buckets": bias.get("encoder", bias["decoder"])[1],
        "decoder_relative_buckets": decoder_buckets,
        "relative_bias_per_layer": "decoder/relpos_bias/rel_embedding" not in shape,
        "start_token": start_token,
        "scan_layers": layout == OURS and count_layers("decoder") >= SCANNED_FROM,
    }
    head = f"""# The network of a converted checkpoint; give it after a model file.
from __gin__ import dynamic_registration

from diffusion_t5x.networks import config

VOCAB_SIZE = {shape["token_embedder/embedding"][0]}
config.TransformerConfig:
"""
    return head + "".join(f"  {name} = {value!r}\n" for name, value in fields.items())


def print_conversion(conversion: Conversion) -> None:
    """Prints a table of the arrays read and written, one line for all layers, and the notes."""
    groups = collections.Counter(
        (_merge_layers(name), str(list(array.shape)), array.dtype.name, _merge_layers(array.source))
        for name, array in conversion.arrays.items()
    )
    rows: list[list[Any]] = [[*key[:3], count, key[3]] for key, count in groups.items()]
    rows += [[None, None, None, None, name] for name in conversion.dropped]
    print_table(["written", "shape", "dtype", "arrays", "read"], rows, conversion.path)
    fresh = [name for name, array in conversion.arrays.items() if array.source == FRESH]
    if fresh:
        print(f"{len(fresh)} freshly initialised: {', '.join(fresh)}")
    for note in conversion.notes:
        print(note)
    print(f"written: {conversion.path}")


def _merge_layers(name: str) -> str:
    return re.sub(
        r"layers_\d+|\[layer \d+\]|\b(layers|h)\.\d+",
        lambda m: re.sub(r"\d+", "*", m.group(0)),
        name,
    )
