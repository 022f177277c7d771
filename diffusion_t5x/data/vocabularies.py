"""Vocabularies by name: the embedded SentencePiece, bytes, or any SentencePiece file."""

from __future__ import annotations

import difflib
import functools
import io
import itertools
import pathlib

import sentencepiece
import seqio
from sentencepiece import sentencepiece_model_pb2

import gin
from diffusion_t5x.data import cache, sources

EMBEDDED_PIECES = 736
# Lines per family that the embedded SentencePiece is trained on.
LINES = {"translation": 12_000, "question": 4_000, "code": 3_000, "prose": 6_000, "source": 6_000}
MAX_LINE = 400  # characters


def _training_lines() -> list[str]:
    """Text of every family's training split, and of no other."""
    families = {
        "translation": sources.translation_files("en", "fr"),
        "question": sources.question_files(),
        "code": sources.code_files(),
        "prose": sources.prose_files(),
        "source": sources.source_files(),
    }
    lines = []
    for family, files in families.items():
        records = cache.read_jsonl(files["train"])
        texts = (text for record in records for text in record.values() if isinstance(text, str))
        split = (line for text in texts for line in text.split("\n") if line)
        lines += [line[:MAX_LINE] for line in itertools.islice(split, LINES[family])]
    return lines


def _train_sentencepiece(path: pathlib.Path) -> None:
    """Trains the embedded SentencePiece model: lossless, digits apart, bytes for the rest."""
    model = io.BytesIO()
    # Text stays as it is but for byte order marks. Without any rule TensorFlow's tokenizer would
    # complain each time it is used.
    rules = path.with_suffix(".tsv")
    rules.write_text("FEFF\t\n", encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_training_lines()),
        model_writer=model,
        model_type="unigram",
        vocab_size=EMBEDDED_PIECES,
        character_coverage=0.9995,
        required_chars="\u00a0\u202f",
        user_defined_symbols=["\n"],
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_tsv=str(rules),
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,  # so that the same text gives the same model
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    proto.normalizer_spec.ClearField("normalization_rule_tsv")  # the rules are in it; a path is not
    path.write_bytes(proto.SerializeToString(deterministic=True))


@functools.cache
def _get_vocabulary(name: str, extra_ids: int) -> seqio.Vocabulary:
    if name == "embedded":
        path = cache.cached_file("embedded.model", _train_sentencepiece)
        return seqio.SentencePieceVocabulary(str(path), extra_ids)
    if name == "bytes":
        return seqio.ByteVocabulary(extra_ids)
    if "://" in name or pathlib.Path(name).is_file():
        return seqio.SentencePieceVocabulary(name, extra_ids)
    near = difflib.get_close_matches(name, ("embedded", "bytes"), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"vocabulary {name!r} is neither a name nor a file; {hint}"
        "Known: 'embedded', 'bytes', or the path of a SentencePiece model."
    )


@gin.configurable
def get_vocabulary(name: str = "embedded", extra_ids: int = 32) -> seqio.Vocabulary:
    """The vocabulary that tasks and models share.

    Args:
      name: 'embedded' (768 tokens with 32 sentinels, trained once from the embedded text),
        'bytes' (ByT5's), or the path of a SentencePiece model.
      extra_ids: sentinels added at the end, for span corruption.

    Raises:
      ValueError: if `name` is neither a known name nor a file.
    """
    return _get_vocabulary(name, extra_ids)
