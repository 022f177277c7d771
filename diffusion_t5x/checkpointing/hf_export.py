"""Writes models as Hugging Face's directories: weights, `config.json`, tokenizer, settings."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import seqio
from etils import epath

from diffusion_t5x.checkpointing.reading import CheckpointMismatchError, compare
from diffusion_t5x.data import tokenizer_files
from diffusion_t5x.data.hf_tokenizer import TokenizerVocabulary
from diffusion_t5x.data.id_map import IdMap
from diffusion_t5x.interop import hf_configs, hf_models, hf_names, tensor_files
from diffusion_t5x.interop.stored_arrays import StoredArray
from diffusion_t5x.runtime.files import write_atomically

if TYPE_CHECKING:
    from diffusion_t5x.models import Model

SETTINGS = "decoder_config.json"
# `max_position_embeddings` of a network of ours that began as nobody's: rotary positions have none.
LONGEST = 4096


@dataclasses.dataclass(frozen=True)
class Export:
    """A directory that is ready to be written.

    Attributes:
      arrays: Its tensors by Hugging Face's names.
      config: Its `config.json`.
      other_files: Name and content of its other files.
    """

    arrays: Mapping[str, StoredArray]
    config: Mapping[str, Any]
    other_files: Mapping[str, bytes]

    def write(self, directory: epath.Path) -> None:
        """Writes the directory, whole or not at all."""
        tensor_files.write_model(directory, self.arrays, self.config, self.other_files)


def prepare(
    path: str,
    params: Mapping[str, StoredArray],
    model: Model,
    hf_model: str | None,
    lengths: Mapping[str, int] | None = None,
) -> Export:
    """Returns parameters of ours as a model of the family that has such networks.

    Args:
      path: Where the parameters are from, for errors.
      params: The parameters of single layers.
      model: The model, whose tokenizer is written too, and the decoder's settings if its texts have
        padding, so that no program of the family's decodes them.
      hf_model: The model that this one comes from, whose `config.json` is kept as far as the
        network is the same; None if there is none.
      lengths: TASK_FEATURE_LENGTHS, for the settings.

    Raises:
      CheckpointMismatchError: If the parameters are not those of the model.
      ValueError: If no family has such networks, or its tokenizer cannot be written.
    """
    network = dataclasses.replace(model.module.config, low_rank=None)  # whose factors are merged
    fields = {field.name: getattr(network, field.name) for field in dataclasses.fields(network)}
    if fields["positions"] == "relative_bias" or fields["num_encoder_layers"] is not None:
        raise ValueError(
            "--format=hugging_face: no family of Hugging Face's has networks with T5's relative "
            f"positions ({type(model.module).__name__}); expected one such as "
            "models/hugging_face.gin makes."
        )
    if network.extra_tokens:
        raise ValueError(
            f"--format=hugging_face: no family of Hugging Face's has tokens without logits "
            f"(TransformerConfig.extra_tokens = {network.extra_tokens}); only our own formats "
            "hold such a model."
        )
    expected = {
        name: jax.ShapeDtypeStruct(shape, np.float32)
        for name, shape in hf_models.parameter_shapes(fields).items()
    }
    if lines := compare(params, expected):
        raise CheckpointMismatchError(f"{path} does not fit this model:\n" + "\n".join(lines))
    vocabulary = model.output_vocabulary
    id_map = vocabulary.id_map if isinstance(vocabulary, TokenizerVocabulary) else IdMap(0)
    original = None if hf_model is None else hf_models.read_config(hf_model)
    rows = network.vocab_size if original is None else original["vocab_size"]
    learns_padding = not model.objective.packs
    if learns_padding:
        rows = max(rows, id_map.padding + 1)
    elif id_map.padding == rows - 1 and original is None and _is_added(vocabulary):
        rows -= 1
    config = _config(network, original, rows)
    dtype = params[hf_models.EMBEDDING].dtype.name
    if {"dtype", "torch_dtype"} & config.keys() or dtype != "float32":
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    files = _tokenizer(vocabulary)
    if learns_padding:
        files[SETTINGS] = _settings(model, id_map, lengths)
    return Export(_tensors(params, fields, id_map, rows), config, files)


def copy_settings(path: str, directory: epath.Path) -> None:
    """Writes a model's `config.json` and tokenizer into a directory, without its weights."""
    place = epath.Path(path)
    place = place.parent if place.name.endswith(".safetensors") else place
    found: dict[str, bytes] = {}
    if tokenizer_files.is_tokenizer(place):
        found = tokenizer_files.copy_files(tokenizer_files.read_tokenizer(place))
    else:
        found = {"tokenizer.model": (place / "tokenizer.model").read_bytes()}
    config = json.dumps(hf_models.read_config(place), indent=2) + "\n"
    for name, content in {**found, tensor_files.CONFIG: config.encode()}.items():
        write_atomically(directory / name, content)


def _is_added(vocabulary: seqio.Vocabulary) -> bool:
    """Returns whether padding is a row that the tokenizer has no token for."""
    if not isinstance(vocabulary, TokenizerVocabulary):
        return False
    files = vocabulary.files
    known = {*tokenizer_files.token_ids(files.spec, files.path).values(), *files.free}
    return vocabulary.id_map.padding not in known


def _config(network: Any, original: Mapping[str, Any] | None, rows: int) -> dict[str, Any]:
    """Returns `config.json`: the original where the network is the same, else one of its own."""
    if original is None:
        return hf_configs.hf_config_of(network, LONGEST) | {"vocab_size": rows}
    fields = hf_configs.config_of(original) | {"vocab_size": network.vocab_size}
    if not hf_configs.differences(network, type(network)(**fields)):
        return {**original, "vocab_size": rows}
    longest = original.get("max_position_embeddings", LONGEST)
    return hf_configs.hf_config_of(network, longest) | {"vocab_size": rows}


def _tensors(
    params: Mapping[str, StoredArray], fields: Mapping[str, Any], id_map: IdMap, rows: int
) -> dict[str, StoredArray]:
    tensors = {}
    for group in hf_names.tensors_of(fields):
        ours = [_export_rows(name, params[name], id_map, rows) for name in group.ours]
        blank = group.to_theirs(*(hf_names.shape_only(array.shape) for array in ours))
        for index, name in enumerate(group.theirs):
            tensors[name] = StoredArray(
                ", ".join(array.source for array in ours),
                blank[index].shape,
                ours[0].dtype,
                functools.partial(_read, ours, group, index),
            )
    return tensors


def _read(ours: Sequence[StoredArray], group: hf_names.Tensors, index: int) -> np.ndarray:
    array: np.ndarray = group.to_theirs(*(one.read() for one in ours))[index]
    return array


def _export_rows(name: str, array: StoredArray, id_map: IdMap, rows: int) -> StoredArray:
    if (axis := hf_models.VOCABULARY_AXIS.get(name)) is None:
        return array

    def change(values: np.ndarray) -> np.ndarray:
        return id_map.export_rows(values.swapaxes(0, axis), rows).swapaxes(0, axis)

    shape = list(array.shape)
    shape[axis] = rows
    return array.derive(shape, change)


def _tokenizer(vocabulary: seqio.Vocabulary) -> dict[str, bytes]:
    if isinstance(vocabulary, TokenizerVocabulary):
        return tokenizer_files.copy_files(vocabulary.files)
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return {"tokenizer.model": vocabulary.sp_model}
    raise ValueError(
        f"--format=hugging_face: {type(vocabulary).__name__} has no files; expected the VOCABULARY "
        "of a Hugging Face tokenizer, or a SentencePiece model."
    )


def _settings(model: Model, id_map: IdMap, lengths: Mapping[str, int] | None) -> bytes:
    """Returns what decoding takes; tokens are the tokenizer's."""
    decoder = _describe(model.decoder)
    if decoder.get("eos_id", -1) >= 0:
        decoder["eos_id"] = int(id_map.exchange(np.array(decoder["eos_id"])))
    settings = {
        "decoder": decoder,
        "objective": type(model.objective).__name__,
        "attention_pattern": model.objective.attention_pattern,
        "shift": getattr(model.objective, "shift", False),
        "padding_token_id": id_map.padding,
        "task_feature_lengths": None if lengths is None else dict(lengths),
    }
    return (json.dumps(settings, indent=2) + "\n").encode()


def _describe(value: Any) -> Any:
    """Returns a setting as JSON has it: a dataclass becomes its name and its fields."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: _describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"name": type(value).__name__, **fields}
    known = value is None or isinstance(value, bool | int | float | str | list | tuple)
    return value if known else getattr(value, "__name__", type(value).__name__)
