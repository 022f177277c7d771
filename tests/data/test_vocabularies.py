"""Vocabularies lose no text, whatever it is, and say which names there are."""

import random

import pytest
import seqio

import gin
from diffusion_t5x.data import cache, sources, vocabularies

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


@pytest.mark.parametrize("name", ["embedded", "bytes"])
def test_tensorflow_tokenizes_as_python_does(name):
    vocabulary = vocabularies.get_vocabulary(name)
    for text in TEXTS:
        assert vocabulary.encode_tf(text).numpy().tolist() == list(vocabulary.encode(text))


def test_embedded_held_out_text_survives_in_few_tokens():
    vocabulary = vocabularies.get_vocabulary()
    rows = cache.read_jsonl(sources.translation_files("en", "fr")["test"])[:300]
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


def test_training_on_the_same_text_gives_the_same_model(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabularies, "LINES", dict.fromkeys(vocabularies.LINES, 400))
    monkeypatch.setattr(vocabularies, "EMBEDDED_PIECES", 450)
    models = []
    for name in ("one", "two"):
        vocabularies._train_sentencepiece(tmp_path / name)
        models.append((tmp_path / name).read_bytes())
    assert models[0] == models[1]
    # SentencePiece notes where its rules were, which would tell machines apart.
    assert str(tmp_path).encode() not in models[0]


def test_the_embedded_model_is_trained_on_training_splits_alone(monkeypatch):
    read = []

    def spy(path):
        read.append(path)
        return [{"text": "line"}]

    monkeypatch.setattr(cache, "read_jsonl", spy)
    vocabularies._training_lines()
    assert len(read) == 5
    assert all(path.endswith("-train.jsonl") for path in read)


@pytest.mark.parametrize(
    "name,hint",
    [("embeded", "did you mean 'embedded'"), ("byte", "did you mean 'bytes'"), ("/no/file", "")],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, hint):
    with pytest.raises(ValueError, match=rf"vocabulary '{name}' is neither.*{hint}.*Known"):
        vocabularies.get_vocabulary(name)
