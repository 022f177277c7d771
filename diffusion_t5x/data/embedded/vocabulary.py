"""The SentencePiece model of the embedded text, trained once from its training splits."""

from __future__ import annotations

import functools
import io
import itertools
import pathlib

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from diffusion_t5x.data.embedded import file_cache, sources

PIECES = 736
# The files of each family, and how many lines of them the model is trained on.
FAMILIES = (
    (functools.partial(sources.translation_files, "en", "fr"), 12_000),
    (sources.question_files, 4_000),
    (sources.code_files, 3_000),
    (sources.prose_files, 6_000),
    (sources.source_files, 6_000),
)
MAX_LINE = 400  # characters


def training_lines() -> list[str]:
    """Returns lines of the training split of every family, and of no other split."""
    lines = []
    for files, count in FAMILIES:
        records = file_cache.read_jsonl(files()["train"])
        texts = (text for record in records for text in record.values() if isinstance(text, str))
        split = (line for text in texts for line in text.split("\n") if line)
        lines += [line[:MAX_LINE] for line in itertools.islice(split, count)]
    return lines


def train(path: pathlib.Path) -> None:
    """Trains the model and writes it: lossless, each digit a piece, bytes for unknown characters.

    A file beside it, with the suffix `.tsv`, is written as well.
    """
    model = io.BytesIO()
    # Text is not normalised, except that byte order marks are dropped. Without any rule the
    # tokenizer of TensorFlow would print a warning each time it is used.
    rules = path.with_suffix(".tsv")
    rules.write_text("FEFF\t\n", encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_lines()),
        model_writer=model,
        model_type="unigram",
        vocab_size=PIECES,
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
    proto = sentencepiece_model_pb2.ModelProto.FromString(  # type: ignore[attr-defined]
        model.getvalue()
    )
    # The model holds the rules; the path of their file would differ between machines.
    proto.normalizer_spec.ClearField("normalization_rule_tsv")
    path.write_bytes(proto.SerializeToString(deterministic=True))
