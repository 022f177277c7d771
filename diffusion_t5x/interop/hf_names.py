"""The tensors of Hugging Face's families, and the parameters of our network that they are.

Ours are those of single layers, not scanned ones, under the names of `t5x_networks`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

Arrays = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Tensors of theirs that hold the same numbers as some parameters of ours.

    Attributes:
      ours: Names of our parameters.
      theirs: Names of their tensors.
      to_ours: Maps arrays of NumPy or JAX in the order of `theirs` to those of `ours`, by views
        where the library has them; also of `shape_only` arrays.
      to_theirs: The inverse.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_ours: Callable[..., Arrays]
    to_theirs: Callable[..., Arrays]


def shape_only(shape: tuple[int, ...]) -> np.ndarray:
    """Returns an array of this shape that takes no memory, to ask `Tensors` for shapes."""
    return np.broadcast_to(np.float32(0), shape)


def _same(*arrays: Any) -> Arrays:
    return arrays


def _transposed(*arrays: Any) -> Arrays:
    return tuple(array.T for array in arrays)


def _split(array: Any) -> Arrays:
    """Splits GPT-2's joined queries, keys and values along the last axis."""
    width = array.shape[-1] // 3
    return tuple(array[..., start : start + width] for start in range(0, 3 * width, width))


def _joined(*arrays: Any) -> Arrays:
    library = np if isinstance(arrays[0], np.ndarray) else arrays[0].__array_namespace__()
    return (library.concatenate(arrays, axis=-1),)


# Our module -> theirs, in a layer.
_PROJECTIONS = {
    "self_attention/query": "self_attn.q_proj",
    "self_attention/key": "self_attn.k_proj",
    "self_attention/value": "self_attn.v_proj",
    "self_attention/out": "self_attn.o_proj",
    "mlp/wi_0": "mlp.gate_proj",
    "mlp/wi_1": "mlp.up_proj",
    "mlp/wo": "mlp.down_proj",
}
_NORMS = {
    "pre_self_attention_layer_norm": "input_layernorm",
    "pre_mlp_layer_norm": "post_attention_layernorm",
}
_GEMMA_NORMS = {
    "pre_self_attention_layer_norm": "input_layernorm",
    "post_self_attention_layer_norm": "post_attention_layernorm",
    "pre_mlp_layer_norm": "pre_feedforward_layernorm",
    "post_mlp_layer_norm": "post_feedforward_layernorm",
}
_HEAD_NORMS = {
    "self_attention/query_norm": "self_attn.q_norm",
    "self_attention/key_norm": "self_attn.k_norm",
}


def tensors_of(fields: Mapping[str, Any], names: Iterable[str] = ()) -> list[Tensors]:
    """Returns what a model of these fields of `TransformerConfig` consists of.

    Args:
      fields: The result of `config_of`.
      names: The names in the files, which tell whether they begin with that of the base model, as
        those of most files do, but not GPT-2's own; without them they do.
    """
    gpt2 = fields["positions"] == "learned"
    base = "transformer." if gpt2 else "model."
    names = set(names)
    prefix = base if not names or any(name.startswith(base) for name in names) else ""
    layers = range(fields["num_layers"])
    make = _gpt2 if gpt2 else _rotary
    tensors = [x for n in layers for x in make(fields, f"decoder/layers_{n}/", f"{prefix}", n)]
    embedding = "wte.weight" if gpt2 else "embed_tokens.weight"
    tensors.append(_one("token_embedder/embedding", prefix + embedding))
    if gpt2:
        tensors.append(_one("token_embedder/position_embedding", prefix + "wpe.weight"))
        tensors += _norm("decoder/final_layer_norm", prefix + "ln_f")
    else:
        tensors.append(_one("decoder/final_layer_norm/scale", prefix + "norm.weight"))
    if not fields["tied_logits"]:
        tensors.append(_kernel("token_embedder/logits_kernel", "lm_head.weight"))
    return tensors


def is_redundant(name: str, fields: Mapping[str, Any]) -> bool:
    """Returns whether a tensor holds nothing that is not known: buffers, or the tied output."""
    if name == "lm_head.weight":
        return fields["tied_logits"]
    return bool(re.search(r"\.rotary_emb\.inv_freq$|(^|\.)attn\.(masked_)?bias$", name))


def _one(ours: str, theirs: str) -> Tensors:
    return Tensors((ours,), (theirs,), _same, _same)


def _kernel(ours: str, theirs: str) -> Tensors:
    return Tensors((ours,), (theirs,), _transposed, _transposed)


def _norm(ours: str, theirs: str) -> list[Tensors]:
    return [_one(f"{ours}/scale", f"{theirs}.weight"), _one(f"{ours}/bias", f"{theirs}.bias")]


def _rotary(fields: Mapping[str, Any], ours: str, prefix: str, number: int) -> list[Tensors]:
    theirs = f"{prefix}layers.{number}."
    norms = _GEMMA_NORMS if fields["post_norms"] else _NORMS
    norms = {**norms, **(_HEAD_NORMS if fields["qk_norm"] else {})}
    tensors = [_one(f"{ours}{a}/scale", f"{theirs}{b}.weight") for a, b in norms.items()]
    for a, b in _PROJECTIONS.items():
        tensors.append(_kernel(f"{ours}{a}/kernel", f"{theirs}{b}.weight"))
        setting = "mlp_bias" if "mlp" in a else "out_bias" if "out" in a else "qkv_bias"
        if fields[setting]:
            tensors.append(_one(f"{ours}{a}/bias", f"{theirs}{b}.bias"))
    return tensors


def _gpt2(fields: Mapping[str, Any], ours: str, prefix: str, number: int) -> list[Tensors]:
    del fields
    theirs = f"{prefix}h.{number}."
    tensors = [
        *_norm(f"{ours}pre_self_attention_layer_norm", f"{theirs}ln_1"),
        *_norm(f"{ours}pre_mlp_layer_norm", f"{theirs}ln_2"),
    ]
    for kind, part in (("kernel", "weight"), ("bias", "bias")):
        joined = tuple(f"{ours}self_attention/{name}/{kind}" for name in ("query", "key", "value"))
        tensors.append(Tensors(joined, (f"{theirs}attn.c_attn.{part}",), _split, _joined))
        for a, b in (
            ("self_attention/out", "attn.c_proj"),
            ("mlp/wi_0", "mlp.c_fc"),
            ("mlp/wo", "mlp.c_proj"),
        ):
            tensors.append(_one(f"{ours}{a}/{kind}", f"{theirs}{b}.{part}"))
    return tensors
