"""The `config.json` of Hugging Face's families as settings of our decoder-only network.

Whatever could change what a network computes is read or refused: a setting that is not known here
is an error unless it is off.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from diffusion_t5x.names import check_known
from diffusion_t5x.networks.config import RopeScaling, TransformerConfig

# model_type -> the class that `transformers` reads it with
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
}
# What does not change the numbers of a network that is not being trained, apart from `_...`.
_IGNORED = re.compile(
    r"architectures|attention_dropout|attn_pdrop|\w+_token_id|cache_implementation|dtype|"
    r"embd_pdrop|initializer_range|is_llama_config|max_position_embeddings|max_window_layers|n_ctx|"
    r"pretraining_tp|reorder_and_upcast_attn|resid_pdrop|summary_\w+|task_specific_params|"
    r"torch_dtype|transformers\.js_config|transformers_version|unsloth_\w+|use_cache|_\w+"
)
_REQUIRED = object()
# What a `config.json` does not say, since it changes no number or nothing reads it.
_FREE = re.compile(
    "dtype|remat|scan_layers|dropout_rate|attention_block_logits|attention_kernel|num_encoder_layers|"
    "(decoder_)?relative_(buckets|max_distance)"
)


class _Settings:
    """The settings of a file, which notes those that were read."""

    def __init__(self, settings: Mapping[str, Any], place: str = ""):
        self._left = dict(settings)
        self._place = place

    def take(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Returns a setting of the type `kind`, or the default if it is absent or null."""
        value = self._left.pop(name, None)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"config.json lacks {self._place}{name}; expected {_name(kind)}.")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(
                f"config.json: {self._place}{name} = {value!r}; expected {_name(kind)}."
            )
        return value

    def has(self, name: str) -> bool:
        """Returns whether a setting is there, null or not."""
        return name in self._left

    def finish(self) -> None:
        """Refuses settings that nothing has read, unless they are off or change no number."""
        for name, value in self._left.items():
            if value not in (None, False, [], {}) and not _IGNORED.fullmatch(name):
                raise ValueError(
                    f"config.json: {self._place}{name} = {value!r} is not known for this family. "
                    "If it does not change what the network computes, take it out."
                )


def _name(kind: type) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(kind, "a list" if kind is list else "an object")


def config_of(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `TransformerConfig` that a family's `config.json` stands for.

    Raises:
      ValueError: If the family or a value is not known, or settings contradict each other.
    """
    settings = _Settings(hf_config)
    family = settings.take("model_type", str)
    check_known(family, FAMILIES, "config.json: model_type")
    classes = settings.take("architectures", list, [])
    if classes and not any(re.search("ForCausalLM$|LMHeadModel$", str(name)) for name in classes):
        raise ValueError(f"config.json: architectures = {classes}; expected a causal LM's.")
    fields = _gpt2(settings) if family == "gpt2" else _rotary(family, settings)
    settings.finish()
    return fields


def _gpt2(settings: _Settings) -> dict[str, Any]:
    width, heads = settings.take("n_embd", int), settings.take("n_head", int)
    head_dim = _divide(width, heads, "n_embd", "n_head")
    scaled = settings.take("scale_attn_weights", bool, True)
    return {
        "vocab_size": settings.take("vocab_size", int),
        "embed_dim": width,
        "num_heads": heads,
        "num_layers": settings.take("n_layer", int),
        "head_dim": head_dim,
        "mlp_dim": settings.take("n_inner", int, 4 * width),
        "mlp_activations": (_activation(settings, "activation_function", "gelu_new"),),
        "tied_logits": settings.take("tie_word_embeddings", bool, True),
        "positions": "learned",
        "max_positions": settings.take("n_positions", int),
        "attention_scale": head_dim**-0.5 if scaled else 1.0,
        "logits_scale": 1.0,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "norm": "layer",
        "norm_epsilon": settings.take("layer_norm_epsilon", float, 1e-5),
    }


def _rotary(family: str, settings: _Settings) -> dict[str, Any]:
    gemma = family.startswith("gemma")
    width, heads = settings.take("hidden_size", int), settings.take("num_attention_heads", int)
    num_layers = settings.take("num_hidden_layers", int)
    head_dim = settings.take("head_dim", int, _REQUIRED if gemma or family == "qwen3" else 0)
    head_dim = head_dim or _divide(width, heads, "hidden_size", "num_attention_heads")
    has_bias = family not in ("mistral", "qwen2") and settings.take("attention_bias", bool, False)
    activation = _activation(settings, "hidden_act", "gelu_pytorch_tanh" if gemma else "silu")
    if gemma:  # Older files have both, of which this one counts.
        activation = _activation(settings, "hidden_activation", "gelu_pytorch_tanh")
    window, period = _windows(family, settings, num_layers)
    return {
        "vocab_size": settings.take("vocab_size", int),
        "embed_dim": width,
        "num_heads": heads,
        "num_layers": num_layers,
        "head_dim": head_dim,
        "mlp_dim": settings.take("intermediate_size", int),
        "num_kv_heads": settings.take(
            "num_key_value_heads", int, heads if family == "llama" else _REQUIRED
        ),
        "mlp_activations": (activation, "linear"),
        "tied_logits": settings.take("tie_word_embeddings", bool, gemma),
        "positions": "rotary",
        **_rope(family, settings, sliding=window is not None),
        "attention_scale": (settings.take("query_pre_attn_scalar", float) if gemma else head_dim)
        ** -0.5,
        "attention_softcap": _softcap(settings, "attn_logit_softcapping", family, 50.0),
        "logits_softcap": _softcap(settings, "final_logit_softcapping", family, 30.0),
        "logits_scale": 1.0,
        "embedding_scale": width**0.5 if gemma else 1.0,
        "qkv_bias": has_bias or family == "qwen2",
        "out_bias": has_bias,
        "mlp_bias": family == "llama" and settings.take("mlp_bias", bool, False),
        "qk_norm": family in ("qwen3", "gemma3_text"),
        "norm": "rms_plus_one" if gemma else "rms",
        "norm_epsilon": settings.take("rms_norm_eps", float, 1e-6),
        "post_norms": gemma,
        "sliding_window": window,
        "sliding_period": period,
    }


def _divide(width: int, heads: int, width_name: str, heads_name: str) -> int:
    if heads < 1 or width % heads:
        raise ValueError(
            f"config.json: {width_name} = {width} is not a multiple of {heads_name} = {heads}."
        )
    return width // heads


def _activation(settings: _Settings, name: str, default: str) -> str:
    activation = settings.take(name, str, default)
    check_known(activation, ACTIVATIONS, f"config.json: {name}")
    return ACTIVATIONS[activation]


def _softcap(settings: _Settings, name: str, family: str, default: float) -> float | None:
    """Returns a bound of logits: Gemma 2's default is that of `transformers`, and null is none."""
    if not family.startswith("gemma"):
        return None
    absent = family == "gemma2" and not settings.has(name)
    return default if absent else settings.take(name, float, None)


def _windows(family: str, settings: _Settings, num_layers: int) -> tuple[int | None, int | None]:
    """Returns `sliding_window` and `sliding_period`."""
    if family == "llama":
        return None, None
    window = settings.take("sliding_window", int, None)
    if family == "mistral":
        return window, None
    if family.startswith("qwen"):
        used = settings.take("use_sliding_window", bool, False)
        start = settings.take("max_window_layers", int, num_layers) if used else num_layers
        sliding = [number >= start for number in range(num_layers)]
    else:
        default = 2 if family == "gemma2" else 6
        period = default if family == "gemma2" else settings.take(
            "sliding_window_pattern", int, settings.take("_sliding_window_pattern", int, default)
        )  # fmt: skip
        sliding = [(number + 1) % period != 0 for number in range(num_layers)]
    types = settings.take("layer_types", list, None)
    if types is not None:
        for kind in types:
            check_known(kind, ("sliding_attention", "full_attention"), "config.json: layer_types")
        sliding = [kind == "sliding_attention" for kind in types]
        if len(types) != num_layers:
            raise ValueError(
                f"config.json: layer_types has {len(types)} entries for num_hidden_layers = "
                f"{num_layers}."
            )
    if not any(sliding):
        return None, None
    if window is None:
        raise ValueError("config.json lacks sliding_window, which its layers need.")
    if all(sliding):
        return window, None
    period = sliding.index(False) + 1
    if sliding != [(number + 1) % period != 0 for number in range(num_layers)]:
        raise ValueError(
            "config.json: layers with a sliding window must alternate with others, every n-th of "
            f"which sees everything; these have windows: {[n for n, x in enumerate(sliding) if x]}."
        )
    return window, period


def _rope(family: str, settings: _Settings, *, sliding: bool) -> dict[str, Any]:
    """Returns the settings of rotary positions, from either form that files have."""
    gemma3 = family == "gemma3_text"
    theta = settings.take("rope_theta", float, None)
    local = settings.take("rope_local_base_freq", float, None) if gemma3 else None
    scaling = settings.take("rope_scaling", dict, {})
    interleaved = settings.take("rope_interleaved", bool, False)
    if interleaved:
        raise ValueError("config.json: rope_interleaved = True; expected false.")
    new = settings.take("rope_parameters", dict, {})
    if new and (scaling or theta or local):
        raise ValueError(
            "config.json has rope_parameters beside rope_theta, rope_scaling or "
            "rope_local_base_freq; expected one form."
        )
    if gemma3 and new:
        nested = _Settings(new, "rope_parameters.")
        other = _Settings(nested.take("sliding_attention", dict, {}), "sliding_attention.")
        local = other.take("rope_theta", float, None)
        if other.take("rope_type", str, "default") != "default":
            raise ValueError("config.json: sliding_attention.rope_type; expected 'default'.")
        other.finish()
        scaling = nested.take("full_attention", dict, {})
        nested.finish()
    elif new:
        scaling = new
    inner = _Settings(scaling, "rope_parameters." if new else "rope_scaling.")
    theta = inner.take("rope_theta", float, theta)
    fields = {
        "rope_theta": theta or (1e6 if gemma3 else 1e4),
        "rope_local_theta": (local or 1e4) if gemma3 and sliding else None,
        "rope_scaling": _scaling(inner),
    }
    inner.finish()
    return fields


def _scaling(inner: _Settings) -> RopeScaling | None:
    older = inner.take("type", str, None)
    kind = inner.take("rope_type", str, older or "default")
    if older not in (None, kind):
        raise ValueError(f"config.json: rope_type = {kind!r} beside type = {older!r}.")
    check_known(kind, ("default", "linear", "llama3"), "config.json: rope_type")
    if inner.take("partial_rotary_factor", float, 1.0) != 1.0:
        raise ValueError("config.json: partial_rotary_factor; expected 1.0.")
    if kind == "default":
        return None
    factor = inner.take("factor", float)
    if kind == "linear":
        return RopeScaling(kind, factor)
    return RopeScaling(
        kind,
        factor,
        inner.take("low_freq_factor", float),
        inner.take("high_freq_factor", float),
        inner.take("original_max_position_embeddings", int),
    )


def hf_config_of(config: TransformerConfig, longest: int) -> dict[str, Any]:
    """Returns the `config.json` of a network, in the form that all versions of the library read.

    Args:
      config: Any configuration that `config_of` might have returned.
      longest: Tokens of the longest text, of which rotary positions keep no record.

    Raises:
      ValueError: If no family has such networks; the message names what is in the way.
    """
    if config.positions == "learned":
        written = _write_gpt2(config)
    else:
        written = {**_write_rotary(config), "max_position_embeddings": longest}
    written |= {
        "architectures": [FAMILIES[written["model_type"]]],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_logits,
    }
    if wrong := differences(config, TransformerConfig(**config_of(written))):
        raise ValueError(
            f"config.json: {written['model_type']}, the nearest family, has no networks with "
            f"{', '.join(wrong)}."
        )
    return written


def differences(config: TransformerConfig, expected: TransformerConfig) -> list[str]:
    """Returns the settings of a network that differ from those expected and change its numbers."""
    names = [x.name for x in dataclasses.fields(config) if not _FREE.fullmatch(x.name)]
    names[names.index("num_kv_heads")] = "kv_heads"
    return [
        f"{name} = {getattr(config, name)!r} (expected {getattr(expected, name)!r})"
        for name in names
        if getattr(expected, name) != getattr(config, name)
    ]


def _write_activation(config: TransformerConfig, tanh: str) -> str:
    names = {**{ours: theirs for theirs, ours in ACTIVATIONS.items()}, "gelu": tanh, "silu": "silu"}
    check_known(config.mlp_activations[0], names, "config.json: mlp_activations")
    return names[config.mlp_activations[0]]


def _write_gpt2(config: TransformerConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": config.embed_dim,
        "n_head": config.num_heads,
        "n_layer": config.num_layers,
        "n_inner": config.mlp_dim,
        "n_positions": config.max_positions,
        "activation_function": _write_activation(config, "gelu_new"),
        "layer_norm_epsilon": config.norm_epsilon,
        "scale_attn_weights": config.attention_scale != 1.0,
    }


def _write_rotary(config: TransformerConfig) -> dict[str, Any]:
    gemma = config.norm == "rms_plus_one"
    if gemma:
        family = "gemma3_text" if config.qk_norm else "gemma2"
    elif config.qk_norm:
        family = "qwen3"
    elif config.qkv_bias and not config.out_bias:
        family = "qwen2"
    else:
        family = "llama" if config.sliding_window is None else "mistral"
    written: dict[str, Any] = {
        "model_type": family,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_scaling": _write_scaling(config.rope_scaling),
        "hidden_activation" if gemma else "hidden_act": _write_activation(
            config, "gelu_pytorch_tanh"
        ),
    }
    if family not in ("mistral", "qwen2"):
        written["attention_bias"] = config.out_bias
    if family == "llama":
        written["mlp_bias"] = config.mlp_bias
    elif family == "mistral":
        written["sliding_window"] = config.sliding_window
    elif not gemma:
        used = config.sliding_window is not None
        written |= {"use_sliding_window": used, "sliding_window": config.sliding_window}
        written["max_window_layers"] = 0 if used else config.num_layers
    if gemma:
        scale = config.attention_scale or 1.0
        written |= {
            "query_pre_attn_scalar": round(scale**-2),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logits_softcap,
            "sliding_window": config.sliding_window,
        }
    if family == "gemma3_text":
        written["sliding_window_pattern"] = config.sliding_period or config.num_layers + 1
        written["rope_local_base_freq"] = config.rope_local_theta
    return written


def _write_scaling(scaling: Any) -> dict[str, Any] | None:
    if scaling is None:
        return None
    written: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        written |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return written
