"""Hugging Face's models as checkpoints: their tensors as our parameters, their settings for gin."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

import gin
from diffusion_t5x import paths
from diffusion_t5x.data import tokenizer_files
from diffusion_t5x.data.gguf_header import read_header
from diffusion_t5x.data.id_map import IdMap
from diffusion_t5x.interop import gguf_files, hf_configs, hf_names, tensor_files
from diffusion_t5x.interop.stored_arrays import StoredArray
from diffusion_t5x.interop.tensor_files import CONFIG, ModelFiles
from diffusion_t5x.names import nearest
from diffusion_t5x.networks.config import SCANNED_FROM, TransformerConfig
from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.runtime.train_state import named_leaves

_WEIGHTS = (".safetensors", ".gguf")
EMBEDDING, LOGITS = "token_embedder/embedding", "token_embedder/logits_kernel"
VOCABULARY_AXIS = {EMBEDDING: 0, LOGITS: 1}


def is_model(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is, or should be, a model of Hugging Face's: a file or a directory."""
    found = epath.Path(path)
    if found.name.endswith(_WEIGHTS):
        return found.is_file()
    if (found / CONFIG).is_file() or paths.is_remote(found) or not found.is_dir():
        return (found / CONFIG).is_file()
    return any(child.name.endswith(_WEIGHTS) for child in found.iterdir())


def read_config(path: str | os.PathLike[str], setting: str = "HF_MODEL") -> dict[str, Any]:
    """Returns the `config.json` of a model's directory, or what that of a GGUF file would say.

    Args:
      path: The directory, which need not hold weights and may be in a bucket, or the file.
      setting: The name of the setting, for errors.

    Raises:
      ValueError: if it is neither, or damaged.
    """
    place = paths.as_path(path, setting)
    if place.name.endswith(".gguf") and not paths.is_remote(place) and place.is_file():
        return gguf_files.read_config(read_header(place))
    if (place / CONFIG).exists():
        return tensor_files.read_json(place / CONFIG)
    raise ValueError(
        f"{setting} = {str(place)!r}; expected a directory with {CONFIG} and the tokenizer's "
        "files, or a .gguf file on this machine."
    )


def network_fields(path: str | os.PathLike[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `TransformerConfig`, with as many rows as token 0 needs to move.

    Raises:
      ValueError: if the family or a setting is not known, or the tokenizer is of another model.
    """
    try:
        fields = hf_configs.config_of(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    padding = _id_map(epath.Path(path), fields["vocab_size"]).padding
    return fields | {"vocab_size": max(fields["vocab_size"], padding + 1)}


def network_config(path: str, make: Callable[..., TransformerConfig]) -> TransformerConfig:
    """Returns the configuration of a model's network; what gin binds in `make` takes precedence.

    Layers are scanned from `SCANNED_FROM` on.

    Args:
      path: The model, as for `read_config`.
      make: `TransformerConfig`, as gin knows it.
    """
    fields = network_fields(path, read_config(path))
    fields["scan_layers"] = fields["num_layers"] >= SCANNED_FROM
    bound = gin.get_bindings("networks.config.TransformerConfig", resolve_references=False)
    return make(**{name: value for name, value in fields.items() if name not in bound})


def vocab_size(path: str) -> int:
    """Returns the rows of a model's embedding, the one for padding included if one is added."""
    rows: int = network_fields(path, read_config(path))["vocab_size"]
    return rows


def _id_map(path: epath.Path, rows: int) -> IdMap:
    """Returns how tokens move in a model of `rows` tokens, by the tokenizer beside the weights."""
    place = path.parent if path.name.endswith(".safetensors") else path
    if tokenizer_files.is_tokenizer(place):
        files = tokenizer_files.read_tokenizer(place)
        tokens = max(tokenizer_files.token_ids(files.spec, files.path).values()) + 1
        if tokens > rows:
            raise ValueError(
                f"{place}: its tokenizer has {tokens:,} tokens, but its embedding {rows:,} rows: "
                "they are not of one model."
            )
        return tokenizer_files.id_map_of(files)
    if (place / "tokenizer.model").exists():  # whose token 0 must be padding
        return IdMap(0)
    raise ValueError(
        f"{place} has no tokenizer.json, by which token 0 becomes padding; put the tokenizer's "
        "files beside the weights. AutoTokenizer.from_pretrained(NAME).save_pretrained(DIRECTORY) "
        "writes them."
    )


def open_params(
    path: str, rows: int = 0, setting: str = "CHECKPOINT_PATH"
) -> dict[str, StoredArray]:
    """Opens a model as parameters of ours, of single layers; headers are checked, no weights read.

    Args:
      path: A directory of safetensors, one such file, or a GGUF file.
      rows: The least number of rows of the embedding; what the model lacks is 0.
      setting: The name of the setting, for errors.

    Raises:
      ValueError: if files contradict themselves or each other, or a tensor is missing, unused or of
        another shape or kind than `config.json` says.
    """
    model = tensor_files.open_model(path, setting)
    fields = network_fields(path, model.config)
    files_rows = model.config["vocab_size"]
    id_map = _id_map(epath.Path(path), files_rows)
    rows = max(rows, fields["vocab_size"])
    groups = hf_names.tensors_of(fields, model.names())
    _check_tensors(model, groups, fields | {"vocab_size": files_rows})
    params = {}
    for group in groups:
        stored = [model.arrays[name] for name in group.theirs]
        blank = group.to_ours(*(hf_names.shape_only(array.shape) for array in stored))
        for index, name in enumerate(group.ours):
            array = StoredArray(
                ", ".join(group.theirs),
                blank[index].shape,
                stored[0].dtype,
                functools.partial(_read, stored, group, index),
            )
            axis = VOCABULARY_AXIS.get(name)
            params[name] = array if axis is None else _import_rows(array, id_map, rows, axis)
    return params


def _read(stored: Sequence[StoredArray], group: hf_names.Tensors, index: int) -> np.ndarray:
    array: np.ndarray = group.to_ours(*(one.read() for one in stored))[index]
    return array


def _import_rows(array: StoredArray, id_map: IdMap, rows: int, axis: int) -> StoredArray:
    def change(values: np.ndarray) -> np.ndarray:
        ours = id_map.import_rows(values.swapaxes(0, axis), rows)
        return ours.swapaxes(0, axis)

    shape = list(array.shape)
    shape[axis] = rows
    return array.derive(shape, change)


def _check_tensors(
    model: ModelFiles, groups: Sequence[hf_names.Tensors], fields: Mapping[str, Any]
) -> None:
    """Refuses tensors that are missing, unused, or of another shape or kind than expected."""
    shapes = parameter_shapes(fields)
    expected: dict[str, tuple[int, ...]] = {}
    for group in groups:
        wanted = group.to_theirs(*(hf_names.shape_only(shapes[name]) for name in group.ours))
        expected |= {name: x.shape for name, x in zip(group.theirs, wanted, strict=True)}
    lines = []
    for name in sorted(expected.keys() - model.arrays.keys()):
        near = nearest(name, model.names())
        hint = f"; the nearest is {near!r}" if near else ""
        lines.append(f"the tensor {name!r} {list(expected[name])} is missing{hint}")
    for name, array in model.arrays.items():
        if name not in expected:
            if not hf_names.is_redundant(name, fields):
                lines.append(f"the tensor {name!r} {list(array.shape)} is used by nothing")
        elif array.shape != expected[name]:
            lines.append(
                f"the tensor {name!r} is {list(array.shape)}; expected {list(expected[name])}"
            )
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            lines.append(f"the tensor {name!r} is {array.dtype}; expected a floating-point type")
    if lines:
        more = [f"and {len(lines) - 8} more"] if len(lines) > 8 else []
        family = model.config["model_type"]
        raise ValueError(
            f"{model.path} is not the model of {family} that its {CONFIG} or metadata describe:\n"
            + "\n".join(f"  {line}" for line in [*lines[:8], *more])
        )


def parameter_shapes(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of our parameters, of single layers, for fields of `TransformerConfig`."""
    # Traced once for all layers.
    return _shapes(TransformerConfig(**{**fields, "scan_layers": True, "dropout_rate": 0.0}))


@functools.cache
def _shapes(scanned: TransformerConfig) -> dict[str, tuple[int, ...]]:
    module = DecoderOnly(scanned)
    init = functools.partial(module.init, attention_pattern="causal")
    token = jnp.ones((1, 1), jnp.int32)
    leaves = named_leaves(jax.eval_shape(init, jax.random.PRNGKey(0), token, token)["params"])
    shapes = {}
    for name, leaf in leaves.items():
        stack, found, rest = name.partition("/layers/")
        for number in range(scanned.num_layers) if found else ():
            shapes[f"{stack}/layers_{number}/{rest}"] = leaf.shape[1:]
        if not found:
            shapes[name] = leaf.shape
    return shapes
