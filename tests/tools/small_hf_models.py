"""A tiny model of a family, written as a Hugging Face directory with a tokenizer that chats."""

import json

import numpy as np
import small_tokenizers
from hf_side import draw, read_golden

from diffusion_t5x.interop import hf_configs, hf_models, hf_names, tensor_files
from diffusion_t5x.interop.stored_arrays import StoredArray

ROWS = 410
TOKENIZER = {
    "tokenizer.json": small_tokenizers.byte_level().to_str().encode(),
    "tokenizer_config.json": b'{"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}',
    "chat_template.jinja": small_tokenizers.CHATML.encode(),
    "generation_config.json": b'{"temperature": 0.5}',
}


def write(directory, name="llama", dtype=np.float32, change=None, files=TOKENIZER):
    """Writes a tiny model, and returns its tensors and `config.json`."""
    config = json.loads(str(read_golden(name)["config"])) | {"vocab_size": ROWS}
    fields = hf_configs.config_of(config)
    shapes = hf_models.parameter_shapes(fields)
    theirs = {}
    for group in hf_names.tensors_of(fields):
        arrays = group.to_theirs(*(draw(name, shapes[name]) for name in group.ours))
        theirs |= {key: x.astype(dtype) for key, x in zip(group.theirs, arrays, strict=True)}
    if change is not None:
        change(theirs, config)
    stored = {key: StoredArray(key, x.shape, x.dtype, lambda x=x: x) for key, x in theirs.items()}
    tensor_files.write_model(directory, stored, config, files)
    return theirs, config
