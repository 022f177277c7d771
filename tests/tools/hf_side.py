"""Tiny models of each family of Hugging Face's, and what `transformers` computes with them.

python -m tests.tools.hf_side   # writes tests/interop/golden/hf.npz; needs transformers and torch
"""

from __future__ import annotations

import functools
import json
import pathlib
import types
import zlib

import jax
import numpy as np

from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.interop import hf_configs, hf_names
from diffusion_t5x.models import Model
from diffusion_t5x.networks.config import TransformerConfig
from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.objectives import NextToken

GOLDEN = pathlib.Path(__file__).parent.parent / "interop" / "golden" / "hf.npz"
VOCAB, LENGTH, NEW = 48, 24, 12
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA = {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 5, "sliding_window": 5}
# name -> (model_type, settings of their configuration)
CASES = {
    "llama": ("llama", {**SIZES, "tie_word_embeddings": True}),
    "llama3": ("llama", {**SIZES, "head_dim": 16, "rope_parameters": LLAMA3}),
    "llama_biases": (
        "llama",
        {
            **SIZES,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "mistral": ("mistral", {**SIZES, "sliding_window": 5}),
    "qwen2": ("qwen2", {**SIZES, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen3": ("qwen3", {**SIZES, "head_dim": 8}),
    "gemma2": (
        "gemma2",
        {
            **GEMMA,
            "num_hidden_layers": 4,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            **GEMMA,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
            },
        },
    ),
    "gpt2": (
        "gpt2",
        {"vocab_size": VOCAB, "n_embd": 24, "n_head": 4, "n_layer": 2, "n_positions": 40},
    ),
}


def tokens() -> np.ndarray:
    """Returns a text without padding, `[1, LENGTH]`."""
    return np.random.RandomState(0).randint(1, VOCAB, (1, LENGTH)).astype(np.int32)


def prompts() -> list[list[int]]:
    """Returns the beginnings of texts, of several lengths."""
    draws = np.random.RandomState(1)
    return [draws.randint(1, VOCAB, length).tolist() for length in (11, 1, 6)]


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draws a tensor of theirs, which depends on nothing but its name and shape."""
    draws = np.random.RandomState(zlib.crc32(name.encode()))
    return draws.normal(0.3 if "norm" in name else 0.0, 0.4, shape).astype(np.float32)


def make(hf_config: dict, **overrides):
    """Returns our model of a `config.json`, its parameters, and the tensors that they are."""
    fields = hf_configs.config_of(hf_config)
    module = DecoderOnly(TransformerConfig(**fields, **overrides))
    model = Model(
        module,
        NextToken(),
        AutoregressiveDecoder(eos_id=-1),
        types.SimpleNamespace(vocab_size=VOCAB, eos_id=None),
        None,
    )
    single = DecoderOnly(TransformerConfig(**fields))
    init = functools.partial(single.init, attention_pattern="causal")
    one = np.ones((1, 1), np.int32)
    shapes = jax.eval_shape(init, jax.random.PRNGKey(0), one, one)["params"]
    shapes = {"/".join(key.key for key in path): x.shape
              for path, x in jax.tree_util.tree_leaves_with_path(shapes)}  # fmt: skip
    ours, theirs = {}, {}
    for tensors in hf_names.tensors_of(fields):
        wanted = tensors.to_theirs(*(hf_names.shape_only(shapes[name]) for name in tensors.ours))
        arrays = [draw(n, x.shape) for n, x in zip(tensors.theirs, wanted, strict=True)]
        theirs |= zip(tensors.theirs, arrays, strict=True)
        ours |= zip(tensors.ours, tensors.to_ours(*arrays), strict=True)
    assert {name: x.shape for name, x in ours.items()} == shapes
    return model, nest(ours, scan=module.config.scan_layers), theirs


def nest(flat: dict[str, np.ndarray], *, scan: bool = False) -> dict:
    """Returns the tree of parameters by name, with layers stacked if they are scanned."""
    tree: dict = {}
    for name, array in flat.items():
        *path, last = name.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), path, tree)[last] = array
    if scan:
        stack = tree["decoder"]
        numbers = range(sum(key.startswith("layers_") for key in stack))
        layers = [stack.pop(f"layers_{number}") for number in numbers]
        stack["layers"] = jax.tree.map(lambda *x: np.stack(x), *layers)
    return tree


def batch(prefixes: list[list[int]], target: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the features that are read of prefixes and `target [batch, length]`."""
    longest = max(map(len, prefixes))
    padded = [[*prefix, *[0] * (longest - len(prefix))] for prefix in prefixes]
    return {
        "encoder_input_tokens": np.array(padded, np.int32),
        "decoder_target_tokens": target,
        "decoder_input_tokens": target,
    }


def compute_theirs(name: str) -> dict[str, np.ndarray]:
    """Returns `config.json`, logits and greedy texts of a family, by `transformers`."""
    import torch
    import transformers

    kind, settings = CASES[name]
    config = transformers.AutoConfig.for_model(kind, **settings)
    # No token ends a text, and none is padding.
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    network = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    written = json.loads(config.to_json_string())
    _, _, tensors = make(written)
    missing, unknown = network.load_state_dict(
        {name: torch.from_numpy(x) for name, x in tensors.items()}, strict=False
    )
    fields = hf_configs.config_of(written)
    assert not unknown, unknown
    assert all(hf_names.is_redundant(name, fields) for name in missing), missing
    network.eval()
    with torch.no_grad():
        logits = network(torch.from_numpy(tokens()).long()).logits.numpy()
        greedy = [
            network.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW
            )[0, len(prompt) :].numpy()
            for prompt in prompts()
        ]
    return {
        "config": np.array(json.dumps(written)),
        "logits": logits,
        "greedy": np.stack(greedy).astype(np.int32),
    }


def read_golden(name: str) -> dict[str, np.ndarray]:
    """Returns what `compute_theirs` returned when the file was written."""
    with np.load(GOLDEN) as file:
        return {key: file[f"{name}/{key}"] for key in ("config", "logits", "greedy")}


def main() -> None:
    """Writes the golden file."""
    arrays = {f"{name}/{key}": x for name in CASES for key, x in compute_theirs(name).items()}
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
