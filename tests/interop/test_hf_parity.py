"""Our network with the settings and parameters of other families, against `transformers`."""

import json

import jax
import numpy as np
import pytest
from hf_side import CASES, batch, compute_theirs, make, prompts, read_golden, tokens
from small_networks import QUICK

from diffusion_t5x.interop import hf_configs, hf_names

NEW = 12


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_texts_are_those_of_the_original_library(name):
    theirs = read_golden(name)
    model, params, _ = make(json.loads(str(theirs["config"])))
    text = batch([tokens()[0, :1].tolist()], tokens()[:, 1:])
    # Prefixes of several lengths in one batch, read with a cache.
    several = batch(prompts(), np.zeros((3, NEW), np.int32))

    def compute(params):
        network = model.bind(params, text)
        logits = network.logits(network.forward(text["decoder_target_tokens"], None))
        return logits, model.predict_batch(params, several)

    logits, greedy = jax.jit(compute, compiler_options=QUICK)(params)
    np.testing.assert_allclose(logits, theirs["logits"][:, :-1], atol=3e-5)
    np.testing.assert_array_equal(greedy, theirs["greedy"])


@pytest.mark.parametrize("name", CASES)
def test_tensors_come_back_bit_for_bit(name):
    written = json.loads(str(read_golden(name)["config"]))
    model, _, theirs = make(written)
    back = {}
    for tensors in hf_names.tensors_of(hf_configs.config_of(written)):
        ours = tensors.to_ours(*(jax.numpy.asarray(theirs[n]) for n in tensors.theirs))
        back |= zip(tensors.theirs, tensors.to_theirs(*ours), strict=True)
    assert back.keys() == theirs.keys()
    for tensor, array in theirs.items():
        np.testing.assert_array_equal(back[tensor], array, err_msg=tensor)
    assert hf_configs.config_of(hf_configs.hf_config_of(model.module.config, 64)) == (
        hf_configs.config_of(written)
    )


@pytest.mark.parametrize("name", CASES)
def test_the_known_results_are_those_of_the_library_that_is_installed(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    known, found = read_golden(name), compute_theirs(name)
    np.testing.assert_allclose(found["logits"], known["logits"], atol=3e-5)
    np.testing.assert_array_equal(found["greedy"], known["greedy"])
