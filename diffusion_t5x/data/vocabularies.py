"""Vocabularies by name: the embedded SentencePiece, bytes, or any SentencePiece file."""

from __future__ import annotations

import difflib
import functools
import hashlib
import io
import itertools
import pathlib

import sentencepiece
import seqio
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

import gin
from diffusion_t5x.data.embedded import file_cache, sources

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
        records = file_cache.read_jsonl(files["train"])
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


def sentinel_ids(vocabulary: seqio.Vocabulary) -> tuple[int, ...]:
    """The tokens that stand for corrupted spans: of the first span, of the second, and so on.

    They are the pieces `<extra_id_0>`, `<extra_id_1>` ... of a SentencePiece model, wherever they
    are, be they its own, as mT5's, or added; the last tokens, counted down, of other vocabularies.
    """
    if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
        last = vocabulary.vocab_size - 1
        return tuple(last - number for number in range(vocabulary.extra_ids))
    tokenizer = vocabulary.tokenizer
    ids = []
    while True:
        pieces = (f"{mark}<extra_id_{len(ids)}>" for mark in ("\u2581", ""))
        found = [tokenizer.PieceToId(piece) for piece in pieces]
        known = [token for token in found if token != tokenizer.unk_id()]
        if not known:
            return tuple(ids)
        ids.append(known[0])


def _sentencepiece(path: str, extra_ids: int) -> seqio.SentencePieceVocabulary:
    """The model of a file, with sentinels added unless it has its own.

    Raises:
      ValueError: if it has no end-of-text token, or its token 0 may stand in a text.
    """
    vocabulary = seqio.SentencePieceVocabulary(path, extra_ids=0)
    try:
        tokenizer = vocabulary.tokenizer
    except (RuntimeError, DecodeError) as error:
        raise ValueError(f"vocabulary {path!r} is not a SentencePiece model: {error}") from error
    if tokenizer.eos_id() <= 0:
        raise ValueError(
            f"vocabulary {path!r} has the end-of-text token {tokenizer.eos_id()}; expected one "
            "above 0. SentencePiece models are trained with --eos_id."
        )
    has_bytes = tokenizer.IsByte(tokenizer.PieceToId("<0x00>"))
    if not (
        tokenizer.IsControl(0) or tokenizer.IsUnused(0) or (tokenizer.IsUnknown(0) and has_bytes)
    ):
        raise ValueError(
            f"vocabulary {path!r} has {tokenizer.IdToPiece(0)!r} as its token 0, which texts may "
            "hold; here token 0 is padding. Expected a model with --pad_id=0, as T5's and Gemma's, "
            "or one whose token 0 is the unknown token and never used because all bytes have "
            "tokens, as Llama's."
        )
    if sentinel_ids(vocabulary):
        return vocabulary
    return seqio.SentencePieceVocabulary(path, extra_ids)


@functools.cache
def _get_vocabulary(name: str, extra_ids: int) -> seqio.Vocabulary:
    if name == "embedded":
        path = file_cache.cached_file("embedded.model", _train_sentencepiece)
        return _sentencepiece(str(path), extra_ids)
    if name == "bytes":
        return seqio.ByteVocabulary(extra_ids)
    if "://" in name or pathlib.Path(name).is_file():
        return _sentencepiece(name, extra_ids)
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
        'bytes' (ByT5's), or the path of a SentencePiece model. Its token 0 is padding: one
        that has this token, or never writes another as 0; any end-of-text token above 0 will do.
      extra_ids: sentinels added at the end, for span corruption, unless the model has its own.

    Raises:
      ValueError: if `name` is neither a known name nor a file, or the file's model does not fit.
    """
    return _get_vocabulary(name, extra_ids)


def fingerprint(vocabulary: seqio.Vocabulary) -> str:
    """A name for people, with a hash of the pieces of a SentencePiece model, wherever its file."""
    text = f"{type(vocabulary).__name__} of {vocabulary.vocab_size} tokens"
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return f"{text}, sha256 {hashlib.sha256(vocabulary.sp_model).hexdigest()[:12]}"
    return f"{text}, {getattr(vocabulary, 'extra_ids', 0)} of them sentinels"


def check_task(
    task: seqio.Task | seqio.Mixture,
    input_vocabulary: seqio.Vocabulary,
    output_vocabulary: seqio.Vocabulary,
) -> None:
    """Checks that a task's tokens are those that a model means.

    Raises:
      ValueError: if they are of another vocabulary.
    """
    for name, ours in (("inputs", input_vocabulary), ("targets", output_vocabulary)):
        feature = task.output_features.get(name)
        if feature is None or feature.vocabulary == ours:
            continue
        theirs = fingerprint(feature.vocabulary)
        pieces = isinstance(ours, seqio.SentencePieceVocabulary)
        if pieces and theirs == fingerprint(ours):
            continue
        raise ValueError(
            f"MIXTURE_OR_TASK_NAME = {task.name!r}: its {name} are tokens of {theirs}, but the "
            f"model's VOCABULARY is {fingerprint(ours)}. Register the task with the features of "
            "tasks.features.output_features, which follow vocabularies.get_vocabulary as the model "
            "does, or set VOCABULARY to the task's."
        )
