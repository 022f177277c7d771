"""`config.json` as published models have it, and what cannot be read of it."""

import dataclasses
import json

import pytest
from hf_side import CASES, read_golden

from diffusion_t5x.interop import hf_names
from diffusion_t5x.interop.hf_configs import config_of, hf_config_of
from diffusion_t5x.networks.config import RopeScaling, TransformerConfig

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
    "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
    "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False,
    "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 49152,
}  # fmt: skip
LLAMA3 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "eos_token_id": [128001],
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "mlp_bias": False,
    "max_position_embeddings": 131072, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256,
}  # fmt: skip
MISTRAL = {
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "model_type": "mistral",
    "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu",
    "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
    "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288,
    "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False,
    "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216,
    "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
    "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
}  # fmt: skip
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
    "attn_logit_softcapping": None, "cache_implementation": "hybrid",
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768,
    "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26,
    "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
}  # fmt: skip
GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": 50256, "embd_pdrop": 0.1, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
    "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
    "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True, "vocab_size": 50257,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip
PUBLISHED = [SMOLLM2, LLAMA3, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, GPT2]
EXPECTED = [
    (SMOLLM2, {"head_dim": 64, "rope_theta": 1e5, "tied_logits": True, "num_kv_heads": 3}),
    (LLAMA3, {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192), "tied_logits": False}),
    (MISTRAL, {"sliding_window": 4096, "sliding_period": None, "norm_epsilon": 1e-5}),
    (QWEN2, {"qkv_bias": True, "out_bias": False, "sliding_window": None, "head_dim": 64}),
    (QWEN3, {"qk_norm": True, "qkv_bias": False, "attention_scale": 128**-0.5}),
    (GEMMA2, {"attention_softcap": 50.0, "logits_softcap": 30.0, "sliding_period": 2,
              "embedding_scale": 48.0, "norm": "rms_plus_one",
              "mlp_activations": ("gelu", "linear"), "attention_scale": 0.0625,
              "tied_logits": True, "post_norms": True}),
    (GEMMA3, {"attention_softcap": None, "sliding_period": 6, "rope_local_theta": 1e4,
              "rope_theta": 1e6, "qk_norm": True, "sliding_window": 512}),
    (GPT2, {"positions": "learned", "max_positions": 1024, "norm": "layer", "mlp_dim": 3072,
            "mlp_activations": ("gelu",), "tied_logits": True, "attention_scale": 0.125}),
]  # fmt: skip


@pytest.mark.parametrize(("published", "expected"), EXPECTED, ids=lambda x: x.get("model_type"))
def test_published_models_have_the_settings_that_are_known_of_them(published, expected):
    fields = config_of(published)
    assert {name: fields[name] for name in expected} == expected
    TransformerConfig(**fields)


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda x: x["model_type"])
def test_files_written_by_another_version_of_the_library_mean_the_same(published):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**published)
    assert config_of(json.loads(config.to_json_string())) == config_of(published)


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda x: x["model_type"])
def test_what_is_written_of_a_network_is_read_as_the_same_here_and_by_the_library(published):
    config = TransformerConfig(**config_of(published), remat="full", scan_layers=True)
    written = hf_config_of(config, 512)
    assert config_of(written) == config_of(published)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(**written)
    assert theirs.max_position_embeddings == (1024 if published is GPT2 else 512)
    assert config_of(json.loads(theirs.to_json_string())) == config_of(published)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (LLAMA3, {"embedding_scale": 2.0}, r"llama, .*embedding_scale = 2.0 \(expected 1.0\)"),
        (LLAMA3, {"start_token": True}, "start_token = True"),
        (LLAMA3, {"qk_norm": True, "norm": "layer"}, "qwen3, .*norm = 'layer'"),
        (LLAMA3, {"mlp_activations": ("relu", "silu")}, "mlp_activations = "),
        (LLAMA3, {"mlp_activations": ("tanh", "linear")}, "mlp_activations = 'tanh'"),
        (GEMMA2, {"sliding_period": 3}, "sliding_period = 3"),
        (GPT2, {"attention_scale": 0.3}, "attention_scale = 0.3"),
        (QWEN2, {"positions": "relative_bias"}, "positions = 'relative_bias'"),
    ],
    ids=str,
)
def test_a_network_that_no_family_has_is_refused_by_what_is_in_the_way(base, changes, message):
    config = dataclasses.replace(TransformerConfig(**config_of(base)), **changes)
    with pytest.raises(ValueError, match=message):
        hf_config_of(config, 512)


def test_smollm2_has_as_many_parameters_as_its_card_says():
    width, layers, mlp, kv = 576, 30, 1536, 3 * 64
    per_layer = 2 * width * width + 2 * width * kv + 3 * width * mlp + 2 * width
    assert 49152 * width + layers * per_layer + width == 134_515_008
    names = [name for x in hf_names.tensors_of(config_of(SMOLLM2)) for name in x.theirs]
    assert len(names) == len(set(names)) == 2 + 30 * 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "model_type = 'lama' .*did you mean 'llama'"),
        ({"model_type": "bert"}, "model_type = 'bert'"),
        ({"model_type": None}, "lacks model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "expected a causal LM's"),
        ({"hidden_size": None}, "lacks hidden_size; expected a whole number"),
        ({"hidden_size": "576"}, "hidden_size = '576'; expected a whole number"),
        ({"hidden_size": True}, "hidden_size = True"),
        ({"hidden_size": 577}, "hidden_size = 577 is not a multiple of num_attention_heads = 9"),
        ({"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "lacks rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "turns": 1}}, "rope_scaling.turns = 1"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "expected factor >= 1"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "beside type = 'linear'"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters beside rope_theta"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .* is not known"),
        ({"num_experts": 8}, "num_experts = 8 is not known"),
    ],
    ids=str,
)
def test_what_is_missing_unknown_or_of_another_type_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of({**SMOLLM2, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries"),
        ({"layer_types": ["full_atention"] * 26}, "did you mean 'full_attention'"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 13}, "must alternate"),
        ({"sliding_window": None}, "lacks sliding_window"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not known"),
        ({"model_type": "gemma3"}, "model_type = 'gemma3'"),
    ],
    ids=str,
)
def test_windows_that_no_setting_stands_for_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of({**GEMMA3, **changes})


def test_windows_of_the_last_layers_alone_are_refused_and_of_all_or_none_are_read():
    windowed = {**QWEN2, "use_sliding_window": True}
    with pytest.raises(ValueError, match=r"these have windows: \[21, 22, 23\]"):
        config_of(windowed)
    assert config_of({**windowed, "max_window_layers": 0})["sliding_window"] == 32768
    assert config_of({**windowed, "max_window_layers": 24})["sliding_window"] is None


@pytest.mark.parametrize("name", CASES)
def test_names_without_that_of_the_base_model_and_buffers_are_known(name):
    fields = config_of(json.loads(str(read_golden(name)["config"])))
    tensors = hf_names.tensors_of(fields)
    names = [name for x in tensors for name in x.theirs]
    assert len(names) == len(set(names))
    base = names[0].partition(".")[0] + "."
    short = [name.removeprefix(base) for name in names]
    assert [name for x in hf_names.tensors_of(fields, short) for name in x.theirs] == short
    assert hf_names.is_redundant("lm_head.weight", fields) == fields["tied_logits"]
    assert hf_names.is_redundant("h.3.attn.bias", fields)
    assert hf_names.is_redundant("model.layers.0.self_attn.rotary_emb.inv_freq", fields)
    assert not any(hf_names.is_redundant(name, fields) for name in names)
