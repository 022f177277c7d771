"""Low-rank factors against `peft`: the same logits, and the same merged weights."""

import json

import jax
import numpy as np
import pytest
from hf_side import batch, draw, make, read_golden, tokens
from small_networks import QUICK

from diffusion_t5x.interop.low_rank import merge_low_rank
from diffusion_t5x.interop.stored_arrays import StoredArray
from diffusion_t5x.networks.low_rank import LowRank
from diffusion_t5x.runtime.train_state import named_leaves

THEIRS = {"self_attention/query": "self_attn.q_proj", "mlp/wo": "mlp.down_proj"}
RANK, ALPHA = 3, 5.0


@pytest.mark.slow  # loads torch; training/test_low_rank.py holds the merge to the formula
def test_logits_and_merged_kernels_of_a_llama_are_those_of_peft():
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    written = json.loads(str(read_golden("llama")["config"]))
    low_rank = LowRank(tuple(THEIRS), RANK, ALPHA)
    model, params, tensors = make(written, low_rank=low_rank)
    config = transformers.AutoConfig.for_model(written.pop("model_type"), **written)
    network = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    network.load_state_dict({n: torch.from_numpy(x) for n, x in tensors.items()}, strict=False)
    targets = [name.rpartition(".")[2] for name in THEIRS.values()]
    adapted = peft.get_peft_model(
        network, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
    ).eval()
    for layer, module in enumerate(network.model.layers):
        for ours, theirs in THEIRS.items():
            node = params["decoder"][f"layers_{layer}"]
            for part in ours.split("/"):
                node = node[part]
            rows, columns = node["kernel"].shape
            node["low_rank_a"] = draw(f"{layer}{ours}a", (rows, RANK))
            node["low_rank_b"] = draw(f"{layer}{ours}b", (RANK, columns))
            node["low_rank_scale"] = np.float32(ALPHA / RANK)
            factors = module.get_submodule(theirs)
            for which, part in ((factors.lora_A, "a"), (factors.lora_B, "b")):
                value = torch.from_numpy(node[f"low_rank_{part}"].T.copy())
                which["default"].weight.data = value
    text = batch([tokens()[0, :1].tolist()], tokens()[:, 1:])

    def compute(params):
        bound = model.bind(params, text)
        return bound.logits(bound.forward(text["decoder_target_tokens"], None))

    logits = jax.jit(compute, compiler_options=QUICK)(params)
    with torch.no_grad():
        expected = adapted(torch.from_numpy(tokens()).long()).logits.numpy()
    np.testing.assert_allclose(logits, expected[:, :-1], atol=1e-4)
    stored = {
        name: StoredArray(name, np.shape(x), np.dtype(np.float32), lambda x=x: np.asarray(x))
        for name, x in named_leaves(params).items()
    }
    merged = merge_low_rank(stored)
    state = adapted.merge_and_unload().state_dict()
    for layer in range(len(network.model.layers)):
        for ours, theirs in THEIRS.items():
            kernel = merged[f"decoder/layers_{layer}/{ours}/kernel"].read()
            expected = state[f"model.layers.{layer}.{theirs}.weight"].numpy().T
            np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-6)
