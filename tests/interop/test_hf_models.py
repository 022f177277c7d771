"""Models of other families come in as checkpoints, and leave as they came."""

import dataclasses
import filecmp
import json
import re
import types

import jax
import ml_dtypes
import numpy as np
import pytest
import small_tokenizers
from hf_side import CASES, make, read_golden

import gin
from diffusion_t5x import convert, gin_utils, models, train
from diffusion_t5x.checkpointing import hf_export, reading
from diffusion_t5x.checkpointing.checkpoints import list_checkpoints
from diffusion_t5x.data.vocabularies import get_vocabulary
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.diffusion import DiffusionDecoder
from diffusion_t5x.interop import hf_models, tensor_files
from diffusion_t5x.interop.stored_arrays import StoredArray
from diffusion_t5x.objectives import NextToken, StepUnrolledDenoising
from diffusion_t5x.objectives.corruption import UniformCorruption

ROWS = 410
TOKENIZER = {
    "tokenizer.json": small_tokenizers.byte_level().to_str().encode(),
    "tokenizer_config.json": b'{"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}',
    "chat_template.jinja": small_tokenizers.CHATML.encode(),
    "generation_config.json": b'{"temperature": 0.5}',
}
FAMILY = "--gin_file=models/hugging_face.gin"


def _write(directory, name="llama", dtype=np.float32, rows=ROWS, change=None, files=TOKENIZER):
    """Writes a tiny model, and returns its tensors and `config.json`."""
    config = json.loads(str(read_golden(name)["config"])) | {"vocab_size": rows}
    _, _, theirs = make(config)
    theirs = {key: x.astype(dtype) for key, x in theirs.items()}
    if change is not None:
        change(theirs, config)
    stored = {
        key: StoredArray(key, x.shape, x.dtype, lambda x=x: x) for key, x in theirs.items()
    }
    tensor_files.write_model(directory, stored, config, files)
    return theirs, config


def _model(directory, decoder, objective):
    config = hf_models.network_fields(directory, hf_models.read_config(directory))
    network, vocabulary = make(config_of_fields(config))[0].module, get_vocabulary(str(directory))
    return types.SimpleNamespace(
        module=network, output_vocabulary=vocabulary, decoder=decoder, objective=objective
    )


def config_of_fields(fields):
    from diffusion_t5x.interop import hf_configs
    from diffusion_t5x.networks.config import TransformerConfig

    return hf_configs.hf_config_of(TransformerConfig(**fields), 64)


@pytest.mark.parametrize("name", CASES)
def test_what_comes_in_goes_out_as_the_same_bits(name, tmp_path):
    dtype = {"llama": np.float16, "gemma3": ml_dtypes.bfloat16}.get(name, np.float32)
    theirs, config = _write(tmp_path, name, dtype)
    params = hf_models.open_params(str(tmp_path))
    model = _model(tmp_path, AutoregressiveDecoder(eos_id=-1), NextToken())
    export = hf_export.prepare("x", params, model, str(tmp_path))
    assert export.arrays.keys() == theirs.keys()
    for key, array in theirs.items():
        out = export.arrays[key].read()
        assert (out.dtype, out.tobytes()) == (array.dtype, array.tobytes()), key
    assert {**export.config, "torch_dtype": None} == {**config, "torch_dtype": None}
    assert export.other_files == TOKENIZER
