"""Models of GGUF files under the names, and in the layout, of Hugging Face's.

What llama.cpp's converters change is changed back: the order of the rows of Llama's queries and
keys, the 1 that is added to Gemma's norms, the transposed matrices of GPT-2, and the frequencies
that stand for Llama 3's `rope_scaling`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from diffusion_t5x.data.gguf_header import Header, Placed, import_gguf, read_header
from diffusion_t5x.interop.stored_arrays import StoredArray
from diffusion_t5x.names import did_you_mean

_TOP = ("model.embed_tokens", "model.norm", "lm_head")
_BLOCK = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
    "post_feedforward_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip
_GPT2_TOP = ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head")
_GPT2_BLOCK = ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


class _Family(NamedTuple):
    """A family's name in `config.json`, its class, and its activation."""

    model_type: str
    class_name: str
    activation: str


FAMILIES = {
    "llama": _Family("llama", "LlamaForCausalLM", "silu"),
    "qwen2": _Family("qwen2", "Qwen2ForCausalLM", "silu"),
    "qwen3": _Family("qwen3", "Qwen3ForCausalLM", "silu"),
    "gemma": _Family("gemma", "GemmaForCausalLM", "gelu_pytorch_tanh"),
    "gemma2": _Family("gemma2", "Gemma2ForCausalLM", "gelu_pytorch_tanh"),
    "gemma3": _Family("gemma3_text", "Gemma3ForCausalLM", "gelu_pytorch_tanh"),
    "gpt2": _Family("gpt2", "GPT2LMHeadModel", "gelu_new"),
}
# Gemma's largest models scale attention by their width; llama.cpp too knows them by their depth.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}


def read_model(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, StoredArray]]:
    """Returns what `config.json` would say, and the tensors under Hugging Face's names.

    Quantised tensors become float32 when they are read, others stay what they are.

    Raises:
      ValueError: if the file is damaged, of an unknown family, or has a tensor of no known use.
    """
    header = read_header(path)
    if header.architecture not in FAMILIES:
        raise ValueError(
            f"{path}: the family {header.architecture!r} is not read; "
            f"{did_you_mean(header.architecture, FAMILIES)}"
        )
    config = read_config(header)
    theirs = _hugging_face_names(header)
    arrays = {}
    for name, placed in header.tensors.items():
        if name == "rope_freqs.weight":  # in the configuration
            continue
        if name not in theirs:
            raise ValueError(
                f"{path}: the tensor {name!r} {placed.shape} has no place in {header.architecture}."
            )
        array = _stored(header, theirs[name], placed)
        arrays[theirs[name]] = _as_hugging_face(array, header, config)
    return config, arrays


def _hugging_face_names(header: Header) -> dict[str, str]:
    """Returns Hugging Face's name of every tensor that the family may have, by GGUF's."""
    gguf = import_gguf()
    blocks = header.require("block_count")
    held = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    if held != {str(n) for n in range(min(blocks, len(held) + 1))}:
        raise ValueError(
            f"{header.path} has tensors of {len(held)} layers; expected those of its block_count, "
            f"{blocks}."
        )
    [arch] = [a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == header.architecture]
    to_gguf = gguf.get_tensor_name_map(arch, blocks)
    old = header.architecture == "gpt2"
    top, block = (_GPT2_TOP, _GPT2_BLOCK) if old else (_TOP, _BLOCK)
    stack = "transformer.h" if old else "model.layers"
    modules = [*top, *(f"{stack}.{n}.{part}" for n in range(blocks) for part in block)]
    return {
        found: f"{module}.{part}"
        for module in modules
        for part in ("weight", "bias")
        if (found := to_gguf.get_name(f"{module}.{part}", (".weight", ".bias")))
    }


def _stored(header: Header, name: str, placed: Placed) -> StoredArray:
    """Returns a tensor as the file has it, dequantised."""
    gguf = import_gguf()
    whole = {
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "F64": np.dtype(np.float64),
        "BF16": np.dtype(ml_dtypes.bfloat16),
    }
    kind = placed.kind

    def read() -> np.ndarray:
        data = np.fromfile(header.path, np.uint8, placed.size, offset=placed.offset)
        if data.size < placed.size:
            raise ValueError(f"{header.path}: {name!r} is cut off; the file has changed.")
        if kind.name in whole:
            return data.view(whole[kind.name]).reshape(placed.shape)
        rows = data.reshape(*placed.shape[:-1], -1)
        return gguf.dequantize(rows, kind).reshape(placed.shape)

    if kind.name not in whole and kind not in gguf.quants._type_traits:
        raise ValueError(f"{header.path}: {name!r} is of {kind.name}, which is not dequantised.")
    return StoredArray(name, placed.shape, whole.get(kind.name, np.dtype(np.float32)), read)


def _as_hugging_face(array: StoredArray, header: Header, config: Mapping[str, Any]) -> StoredArray:
    """Undoes what the family's converter has done to a tensor."""
    name, family = array.source, header.architecture
    change: Callable[[np.ndarray], np.ndarray] | None = None
    module = name.rpartition(".")[0]
    if family == "llama" and module.endswith(("q_proj", "k_proj")):
        kind = "num_attention_heads" if module.endswith("q_proj") else "num_key_value_heads"
        heads = config[kind]
        if array.shape[0] % (2 * heads):
            raise ValueError(
                f"{header.path}: {name!r} has {array.shape[0]} rows, not of {heads} heads, {kind}."
            )
        change = functools.partial(unpermute, heads=heads)
    elif family.startswith("gemma") and name.endswith("norm.weight"):
        change = _subtract_one
    elif family == "gpt2" and name.endswith(("attn.weight", "proj.weight", "fc.weight")):
        return array.derive(array.shape[::-1], np.transpose)
    return array if change is None else array.derive(array.shape, change)


def unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Separates the halves of each head's rotary pairs, which GGUF has as neighbours.

    Rows `[heads * head_dim, ...]`: 2i and 2i + 1 of each head become i and i + head_dim / 2.
    """
    half = values.shape[0] // heads // 2
    pairs = values.reshape(heads, half, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _subtract_one(values: np.ndarray) -> np.ndarray:
    return values - values.dtype.type(1)


def read_config(header: Header) -> dict[str, Any]:
    """Returns the configuration, as `config.json` of the family has it.

    Raises:
      ValueError: if metadata are missing, or mean something that no setting of the family says.
    """
    model_type, class_name, activation = FAMILIES[header.architecture]
    token_embedding = header.tensors.get("token_embd.weight")
    if token_embedding is None:
        raise ValueError(f"{header.path} lacks the tensor 'token_embd.weight'.")
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": token_embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    for kind in ("bos", "eos"):
        token = header.metadata.get(f"tokenizer.ggml.{kind}_token_id")
        config |= {} if token is None else {f"{kind}_token_id": token}
    if header.architecture == "gpt2":
        return config | {
            "n_embd": header.require("embedding_length"),
            "n_layer": header.require("block_count"),
            "n_head": header.require("attention.head_count"),
            "n_positions": header.require("context_length"),
            "n_inner": header.require("feed_forward_length"),
            "layer_norm_epsilon": _decimal(header.require("attention.layer_norm_epsilon")),
            "activation_function": activation,
        }
    heads = header.require("attention.head_count")
    kv_heads = header.get("attention.head_count_kv", heads)
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise ValueError(f"{header.path}: layers differ in their heads, {heads} and {kv_heads}.")
    if header.get("expert_count", 0):
        raise ValueError(f"{header.path} is a mixture of experts, which is not read.")
    width = header.require("embedding_length")
    head_dim = header.get("attention.key_length") or header.get("rope.dimension_count")
    head_dim = head_dim or width // heads
    config |= {
        "hidden_size": width,
        "num_hidden_layers": header.require("block_count"),
        "intermediate_size": header.require("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": header.require("context_length"),
        "rms_norm_eps": _decimal(header.require("attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(header.get("rope.freq_base", 1e4)),
        "rope_scaling": _rope_scaling(header, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        ("hidden_activation" if "gemma" in model_type else "hidden_act"): activation,
    }
    if model_type == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    if header.architecture in ("gemma2", "gemma3"):
        by_width = header.require("block_count") == _SCALED_BY_WIDTH[header.architecture]
        config |= {
            "sliding_window": header.require("attention.sliding_window"),
            "attn_logit_softcapping": header.get("attn_logit_softcapping"),
            "final_logit_softcapping": header.get("final_logit_softcapping"),
            "query_pre_attn_scalar": width // heads if by_width else head_dim,
        }
    if header.architecture == "gemma3":
        config |= {
            "sliding_window_pattern": 6,
            "rope_theta": _decimal(header.get("rope.freq_base", 1e6)),
            "rope_local_base_freq": _decimal(header.get("rope.freq_base_swa", 1e4)),
        }
    return config


def _decimal(value: float) -> float:
    """Returns the shortest decimal of a float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(header: Header, head_dim: int) -> dict[str, Any] | None:
    kind = header.get("rope.scaling.type", "none")
    placed = header.tensors.get("rope_freqs.weight")
    if placed is not None:
        factors = _stored(header, "rope_freqs.weight", placed).read().astype(np.float32)
        scaling = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        expected = _llama3_factors(scaling, float(header.get("rope.freq_base", 1e4)), head_dim)
        if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
            raise ValueError(
                f"{header.path}: 'rope_freqs.weight' are not the frequencies of Llama 3's scaling "
                f"by {scaling['factor']:g}, the only one that is read."
            )
        return scaling
    if kind == "none":
        return None
    factor = header.get("rope.scaling.factor")
    if kind == "linear" and factor:
        return {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn" and factor:
        original = header.get("rope.scaling.original_context_length")
        scaling = {"rope_type": "yarn", "factor": float(factor)}
        return scaling | ({"original_max_position_embeddings": original} if original else {})
    raise ValueError(f"{header.path}: the scaling {kind!r} of positions by {factor} is not read.")


def _llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """Returns by what frequencies are divided: `[head_dim / 2]`, as llama.cpp stores it."""
    factor, length = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((length / waves - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
