"""Vocabularies lose no text, whatever it is, and say which names there are."""

import io
import random

import pytest
import sentencepiece
import seqio
import tensorflow as tf
from sentencepiece import sentencepiece_model_pb2

import gin
from diffusion_t5x.data import preprocessors, vocabularies
from diffusion_t5x.data.embedded import file_cache, sources

TEXTS = (
    "",
    "in 5 minutes",
    " leading, trailing ",
    "two  spaces and\ttab",
    "\n\n    return x ** 2\n",
    "def f(a: int = -1) -> list[str]:\n    return [a] * 10\n",
    "1\u202f040,50\xa0€",
    "Ünïcödé ½ ﬁ Ⅷ",  # compatibility characters, which normalisation would change
    "e\u0301 é",
    "日本語 العربية हिन्दी",
    "🙂👩‍👩‍👧",
    "\x01\x7f\u2028\U0010fffd",
    "<unk> </s> <extra_id_0> <0x41>",
)


def _random_text(rng):
    ranges = ((0x20, 0x7F), (0xA1, 0x250), (0x370, 0x530), (0x3041, 0x30FF), (0x1F300, 0x1F600))
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))


@pytest.mark.parametrize("name", ["embedded", "bytes"])
def test_any_text_survives_tokens_and_back(name):
    vocabulary = vocabularies.get_vocabulary(name)
    rng = random.Random(0)
    for text in [*TEXTS, *(_random_text(rng) for _ in range(200))]:
        tokens = vocabulary.encode(text)
        assert vocabulary.decode(tokens) == text
        assert all(2 <= token < vocabulary.vocab_size for token in tokens)
        assert vocabulary.unk_id not in tokens


# What is trained so -> what programs lose; all have tokens for bytes unless that is said.
TRAINED = {
    "everything kept": ({}, []),
    "as Gemma's and Llama's": ({"add_dummy_prefix": True}, []),
    "as sentencepiece's default": (
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        ["line breaks", "first line", "of lines", "tabs", "runs of spaces", "text's end"],
    ),
    "spaces collapsed": (
        {"remove_extra_whitespaces": True},
        ["first line", "of lines", "runs of spaces"],
    ),
    "small letters alone": ({"normalization_rule_name": "nfkc_cf"}, ["characters ABCDEF"]),
    "no bytes": (
        {"byte_fallback": False, "character_coverage": 1.0},
        ["line breaks", "tabs", "characters "],
    ),
}


@pytest.mark.parametrize("case", TRAINED)
def test_what_programs_lose_is_found_before_they_do(case, tmp_path):
    settings, expected = TRAINED[case]
    model = io.BytesIO()
    defaults = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "byte_fallback": True,
        "vocab_size": 300 if settings.get("byte_fallback", True) else 40,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["return the number of words in the text", "if x is none"] * 50),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        **(defaults | settings),
    )
    (tmp_path / "a.model").write_bytes(model.getvalue())
    vocabulary = vocabularies.get_vocabulary(str(tmp_path / "a.model"))
    lost = vocabularies.lost_of_code(vocabulary)
    assert all(any(text in one for one in lost) for text in expected), lost
    assert bool(lost) == bool(expected)


@pytest.mark.parametrize("name", ["embedded", "bytes"])
def test_programs_lose_nothing_in_the_vocabularies_here(name):
    assert vocabularies.lost_of_code(vocabularies.get_vocabulary(name)) == []


@pytest.mark.parametrize("name", ["embedded", "bytes"])
def test_tensorflow_tokenizes_as_python_does(name):
    vocabulary = vocabularies.get_vocabulary(name)
    for text in TEXTS:
        assert vocabulary.encode_tf(text).numpy().tolist() == list(vocabulary.encode(text))


def test_embedded_held_out_text_survives_in_few_tokens():
    vocabulary = vocabularies.get_vocabulary()
    rows = file_cache.read_jsonl(sources.translation_files("en", "fr")["test"])[:300]
    texts = [text for row in rows for text in row.values()]
    assert all(vocabulary.decode(vocabulary.encode(text)) == text for text in texts)
    tokens = sum(len(vocabulary.encode(text)) for text in texts)
    assert tokens < 0.8 * sum(map(len, texts))


def test_the_embedded_vocabulary_has_its_ids_where_models_expect_them():
    vocabulary = vocabularies.get_vocabulary("embedded", extra_ids=32)
    assert vocabulary.vocab_size == 768
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
    assert vocabulary.extra_ids == 32
    # Sentinels count down from the last token.
    assert vocabulary.tokenizer.IdToPiece(767) == "▁<extra_id_0>"
    assert vocabulary.tokenizer.IdToPiece(767 - 31) == "▁<extra_id_31>"
    assert not vocabulary.tokenizer.IdToPiece(767 - 32).startswith("▁<extra_id")


def test_digits_stand_alone_and_lines_end_with_one_token():
    vocabulary = vocabularies.get_vocabulary()
    assert len(vocabulary.encode("2011")) == 4
    assert vocabulary.encode("a\n") == [*vocabulary.encode("a"), *vocabulary.encode("\n")]
    assert len(vocabulary.encode("\n")) == 1


def test_the_number_of_sentinels_is_free():
    for name, tokens in (("embedded", 736), ("bytes", 259)):
        for extra_ids in (0, 5, 100):
            vocabulary = vocabularies.get_vocabulary(name, extra_ids)
            assert vocabulary.vocab_size == tokens + extra_ids
            assert vocabulary.encode("a 1") == vocabularies.get_vocabulary(name).encode("a 1")


def test_the_same_vocabulary_is_the_same_object_and_gin_configures_it():
    assert vocabularies.get_vocabulary() is vocabularies.get_vocabulary("embedded", 32)
    gin.parse_config("get_vocabulary.name = 'bytes'\nget_vocabulary.extra_ids = 7")
    assert vocabularies.get_vocabulary() == seqio.ByteVocabulary(7)


def test_any_sentencepiece_file_is_a_vocabulary(tmp_path):
    embedded = vocabularies.get_vocabulary("embedded", 0)
    path = tmp_path / "my.model"
    path.write_bytes(embedded.sp_model)
    mine = vocabularies.get_vocabulary(str(path), extra_ids=10)
    assert mine.vocab_size == 746
    assert mine.encode(TEXTS[5]) == embedded.encode(TEXTS[5])


def _model(tmp_path, pieces=(), **settings):
    """Trains a small SentencePiece model, as other projects have it, and appends `pieces`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a dog ate the hat", "0 1 2 3"] * 20),
        model_writer=model,
        **{"vocab_size": 320, "hard_vocab_limit": False, "minloglevel": 2, **settings},
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    for piece in pieces:
        kind = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
        proto.pieces.add(piece=piece, score=0.0, type=kind)
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.model"
    path.write_bytes(proto.SerializeToString())
    return str(path)


T5 = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
GEMMA = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "byte_fallback": True}
LLAMA = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "byte_fallback": True}
GEMMA |= {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
LLAMA |= {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"}


@pytest.mark.parametrize("settings,eos_id", [(T5, 1), (GEMMA, 1), (LLAMA, 2)])
def test_models_of_other_projects_plug_in_and_get_sentinels(settings, eos_id, tmp_path):
    path = _model(tmp_path, **settings)
    size = sentencepiece.SentencePieceProcessor(model_file=path).GetPieceSize()
    vocabulary = vocabularies.get_vocabulary(path, extra_ids=7)
    assert vocabulary.vocab_size == size + 7
    assert vocabulary.eos_id == eos_id
    assert vocabularies.sentinel_ids(vocabulary) == tuple(range(size + 6, size - 1, -1))
    for text in (
        ("the cat sat", "été 日本 \n\n    x") if "byte_fallback" in settings else ("the cat",)
    ):
        tokens = vocabulary.encode(text)
        assert vocabulary.decode(tokens) == text
        assert vocabulary.encode_tf(text).numpy().tolist() == list(tokens)
        assert not {0, eos_id} & set(tokens)  # text never looks like padding or the end


@pytest.mark.parametrize("mark", ["\u2581", ""])
def test_a_model_with_sentinels_keeps_its_own_wherever_they_are(mark, tmp_path):
    descending = [f"{mark}<extra_id_{number}>" for number in reversed(range(5))]  # as mT5's
    path = _model(tmp_path, pieces=descending, **T5)
    size = sentencepiece.SentencePieceProcessor(model_file=path).GetPieceSize()
    vocabulary = vocabularies.get_vocabulary(path, extra_ids=32)
    assert vocabulary.vocab_size == size
    assert vocabularies.sentinel_ids(vocabulary) == tuple(range(size - 1, size - 6, -1))
    path = _model(tmp_path, pieces=[*descending[::-1], "other"], **T5)
    vocabulary = vocabularies.get_vocabulary(path, extra_ids=32)
    assert vocabularies.sentinel_ids(vocabulary) == tuple(range(size - 5, size))


def test_spans_are_replaced_by_a_models_own_sentinels(tmp_path):
    pieces = [f"<extra_id_{number}>" for number in range(9)]
    vocabulary = vocabularies.get_vocabulary(_model(tmp_path, pieces=[*pieces, "other"], **T5))
    sentinels = vocabularies.sentinel_ids(vocabulary)
    document = tf.data.Dataset.from_tensors({"targets": tf.fill([40], 5)})
    with seqio.map_seed_manager(0):
        [example] = preprocessors.span_corruption(
            document, {"inputs": 60, "targets": 20}, {"targets": seqio.Feature(vocabulary)}
        )
    for feature in ("inputs", "targets"):
        found = [token for token in example[feature].numpy() if token != 5]
        assert found == list(sentinels[:2])  # 40 tokens, 15 % of them in spans of 3


def test_sentinels_of_vocabularies_of_other_kinds_count_down_from_the_end():
    assert vocabularies.sentinel_ids(vocabularies.get_vocabulary("bytes", 3)) == (261, 260, 259)
    embedded = vocabularies.get_vocabulary("embedded", 3)
    assert vocabularies.sentinel_ids(embedded) == (738, 737, 736)
    assert vocabularies.sentinel_ids(vocabularies.get_vocabulary("embedded", 0)) == ()


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"eos_id": -1, "pad_id": 0, "unk_id": 1, "bos_id": -1}, "end-of-text token -1; expected"),
        ({"eos_id": 0, "pad_id": -1, "unk_id": 1, "bos_id": -1}, "end-of-text token 0; expected"),
        ({"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}, "'<unk>' as its token 0"),
        ({"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3}, "'<unk>' as its token 0"),
    ],
)
def test_a_model_without_padding_or_end_is_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=rf"vocabulary '.*\.model' has .*{message}"):
        vocabularies.get_vocabulary(_model(tmp_path, **settings))


def test_a_file_that_is_no_model_is_refused(tmp_path):
    for data in (b"not a model", b""):
        path = tmp_path / f"{len(data)}.model"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"\.model' is not a SentencePiece model"):
            vocabularies.get_vocabulary(str(path))


@pytest.mark.parametrize(
    "name,hint",
    [("embeded", "did you mean 'embedded'"), ("byte", "did you mean 'bytes'"), ("/no/file", "")],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, hint):
    with pytest.raises(ValueError, match=rf"vocabulary '{name}' is neither.*{hint}.*Known"):
        vocabularies.get_vocabulary(name)
