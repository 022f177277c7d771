"""Models of other families come in as checkpoints, and leave as they came."""

import filecmp
import json
import subprocess
import sys
import types

import ml_dtypes
import numpy as np
import pytest
from hf_side import CASES
from small_hf_models import ROWS, TOKENIZER, write

import gin
from diffusion_t5x import convert, gin_utils, models
from diffusion_t5x.checkpointing import hf_export, reading
from diffusion_t5x.checkpointing.checkpoints import list_checkpoints
from diffusion_t5x.data.vocabularies import get_vocabulary
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.interop import hf_models, tensor_files
from diffusion_t5x.networks.config import TransformerConfig
from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.objectives import NextToken

FAMILY = "--gin_file=models/hugging_face.gin"


def _model(directory, decoder, objective):
    fields = hf_models.network_fields(directory, hf_models.read_config(directory))
    return types.SimpleNamespace(
        module=DecoderOnly(TransformerConfig(**fields)),
        output_vocabulary=get_vocabulary(str(directory)),
        decoder=decoder,
        objective=objective,
    )


@pytest.mark.parametrize("name", CASES)
def test_what_comes_in_goes_out_as_the_same_bits(name, tmp_path):
    dtype = {"llama": np.float16, "gemma3": ml_dtypes.bfloat16}.get(name, np.float32)
    theirs, config = write(tmp_path, name, dtype)
    params = hf_models.open_params(str(tmp_path))
    model = _model(tmp_path, AutoregressiveDecoder(eos_id=-1), NextToken())
    export = hf_export.prepare("x", params, model, str(tmp_path))
    assert export.arrays.keys() == theirs.keys()
    for key, array in theirs.items():
        out = export.arrays[key].read()
        assert (out.dtype, out.tobytes()) == (array.dtype, array.tobytes()), key
    assert {**export.config, "torch_dtype": None} == {**config, "torch_dtype": None}
    assert export.other_files == TOKENIZER


@pytest.mark.slow  # compiles a run
def test_a_run_trains_from_a_model_and_leaves_in_another_type(tmp_path):
    source, run, out = tmp_path / "hf", tmp_path / "run", tmp_path / "out"
    theirs, config = write(source)
    files = [FAMILY, "--gin_file=objectives/diffusion.gin", "--gin_file=runs/finetune.gin"]
    lengths = {"inputs": 16, "targets": 16}
    # A process of its own: tasks keep the vocabulary that they are first asked for.
    subprocess.run(
        [sys.executable, "-m", "diffusion_t5x.train", *files,
         f"--gin.HF_MODEL={source}", f"--gin.INITIAL_CHECKPOINT_PATH={source}",
         f"--gin.MODEL_DIR={run}", "--gin.MIXTURE_OR_TASK_NAME=embedded_translation_en_fr",
         f"--gin.TASK_FEATURE_LENGTHS={lengths}", "--gin.BATCH_SIZE=2", "--gin.TRAIN_STEPS=1",
         "--gin.EVAL_STEPS=1", "--gin.EVALUATOR_NUM_EXAMPLES=0", "--gin.NUM_SAMPLES=1",
         "--gin.trainer.train.infer_eval_dataset_cfg=None"],
        check=True,
    )  # fmt: skip
    [(step, checkpoint)] = list_checkpoints(str(run))
    assert step == 1
    before, after = hf_models.open_params(str(source)), reading.open_params(checkpoint)
    for name, array in before.items():  # a step of 1e-3 from where it began
        np.testing.assert_allclose(array.read(), after[name].read(), atol=0.02, err_msg=name)
    convert.main([f"--from={run}", f"--to={out}", "--format=hugging_face", "--dtype=bfloat16",
                  f"--gin_file={run}/config.gin"])  # fmt: skip
    written = tensor_files.open_model(out, "x")
    assert written.config == config | {"torch_dtype": "bfloat16"}
    assert {written.dtype(name).name for name in written.names()} == {"bfloat16"}
    assert written.names() and set(written.names()) == theirs.keys()
    settings = json.loads((out / hf_export.SETTINGS).read_text())
    assert settings["task_feature_lengths"] == lengths
    assert settings["decoder"]["num_samples"] == 1
    assert settings["attention_pattern"] == "bidirectional"


def test_a_conversion_stays_whole_when_the_model_goes_away(tmp_path):
    source, run, out = tmp_path / "hf", tmp_path / "run", tmp_path / "out"
    write(source, dtype=ml_dtypes.bfloat16)
    convert.main([f"--from={source}", f"--to={run}"])
    kept = tmp_path / "gone"
    source.rename(kept)
    convert.main([f"--from={run}", f"--to={out}", "--format=hugging_face", FAMILY,
                  f"--gin.HF_MODEL={run}/hugging_face"])  # fmt: skip
    same, differ, missing = filecmp.cmpfiles(kept, out, [f.name for f in kept.iterdir()], False)
    assert not missing
    assert set(differ) <= {"config.json"}  # which says the type
    assert "model.safetensors" in same


@pytest.mark.parametrize("objective", ["autoregressive", "diffusion_blocks"])
def test_network_vocabulary_and_end_follow_from_the_model(objective, tmp_path):
    write(tmp_path)
    gin.clear_config()
    blocks = ["BLOCK_LENGTH=4"] if "blocks" in objective else []
    gin_utils.parse_config(
        ["models/hugging_face.gin", f"objectives/{objective}.gin", "runs/sample.gin"],
        [f"HF_MODEL={tmp_path}", f"CHECKPOINT_PATH={tmp_path}", "INPUTS=x", "VOCAB_SIZE=512",
         "TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 8}", *blocks,
         "config.TransformerConfig.remat='full'", "config.TransformerConfig.norm_epsilon=0.5"],
    )  # fmt: skip
    model = gin.get_configurable(models.Model)()
    config = model.module.config
    assert (config.embed_dim, config.positions, config.vocab_size) == (24, "rotary", 512)
    assert (config.remat, config.norm_epsilon) == ("full", 0.5)  # what is bound takes precedence
    assert model.decoder.eos_id == model.output_vocabulary.eos_id == 2
    rows = reading.open_params(str(tmp_path), 512)[hf_models.EMBEDDING].read()
    assert rows.shape == (512, 24)
    assert not rows[ROWS:].any()


def _lacks(theirs, config):
    del theirs["model.layers.1.mlp.up_proj.weight"], config


def _has_more(theirs, config):
    theirs["model.layers.2.input_layernorm.weight"] = np.ones(24, np.float32)
    del config


def _contradicts(theirs, config):
    del theirs
    config["intermediate_size"] = 21


def _is_unknown(theirs, config):
    del theirs
    config["model_type"] = "mamba"


def _has_numbers(theirs, config):
    theirs["model.norm.weight"] = np.ones(24, np.int8)
    del config


def _has_few_rows(theirs, config):
    theirs["model.embed_tokens.weight"] = theirs["model.embed_tokens.weight"][:300]
    config["vocab_size"] = 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_lacks, r"'model.layers.1.mlp.up_proj.weight' \[20, 24\] is missing; the nearest"),
        (_has_more, r"'model.layers.2.input_layernorm.weight' \[24\] is used by nothing"),
        (_contradicts, r"gate_proj.weight' is \[20, 24\]; expected \[21, 24\]"),
        (_is_unknown, "model_type.*mamba"),
        (_has_numbers, "'model.norm.weight' is int8; expected a floating-point type"),
        (_has_few_rows, "300 rows: they are not of one model"),
    ],
)
def test_a_model_that_contradicts_itself_is_refused_before_anything_is_written(
    change, message, tmp_path
):
    write(tmp_path / "hf", change=change)
    with pytest.raises(ValueError, match=f"hf.*(?s:.*){message}"):
        convert.main([f"--from={tmp_path / 'hf'}", f"--to={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def _without_tokenizer(directory):
    (directory / "tokenizer.json").unlink()


def _truncated(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _only_torch(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _empty(directory):
    for file in directory.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_tokenizer, "has no tokenizer.json, .*save_pretrained"),
        (_truncated, "is the download complete"),
        (_only_torch, "safe_serialization=True"),
        (_empty, "is neither a checkpoint nor a run"),
    ],
)
def test_a_directory_that_is_not_whole_is_refused_by_what_it_lacks(spoil, message, tmp_path):
    write(tmp_path / "hf")
    spoil(tmp_path / "hf")
    with pytest.raises((ValueError, FileNotFoundError), match=f"hf.*{message}"):
        convert.main([f"--from={tmp_path / 'hf'}", f"--to={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_the_original_library_loads_what_is_written_bit_for_bit(tmp_path):
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    theirs, _ = write(tmp_path, "gemma2")
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    state = network.state_dict()
    for name, array in theirs.items():
        assert torch.equal(state[name], torch.from_numpy(np.ascontiguousarray(array))), name
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|im_end|>"
