"""Vocabularies by name: embedded, bytes, SentencePiece models, and Hugging Face's tokenizers."""

from __future__ import annotations

import functools
import hashlib
import pathlib

import seqio
from etils import epath
from google.protobuf.message import DecodeError

import gin
from diffusion_t5x import paths
from diffusion_t5x.data import tokenizer_files
from diffusion_t5x.data.hf_tokenizer import TokenizerVocabulary
from diffusion_t5x.names import nearest

NAMES = ("embedded", "bytes")
# What a program cannot do without, and a text that has it.
_OF_CODE = {
    "line breaks": "x = 1\ny = 2\n\n\nz = 3",
    "the indentation of a text's first line": "    return x",
    "the indentation of lines": "if x:\n  if y:\n    if z:\n            return x",
    "tabs": "if x:\n\ty\n\tz",
    "runs of spaces": "x = 'a  b   c    d'",
    "line breaks at a text's end": "x\n",
}


def sentinel_ids(vocabulary: seqio.Vocabulary) -> tuple[int, ...]:
    """Returns the tokens that replace the first corrupted span, the second, and so on.

    In a SentencePiece model they are the pieces `<extra_id_0>`, `<extra_id_1>` ..., its own, as in
    mT5's, or added ones; in a Hugging Face tokenizer those that it can spare; in other
    vocabularies the last `extra_ids` tokens, counted down.
    """
    if isinstance(vocabulary, TokenizerVocabulary):
        return vocabulary.sentinels
    if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
        last = vocabulary.vocab_size - 1
        return tuple(last - number for number in range(vocabulary.extra_ids))
    tokenizer = vocabulary.tokenizer
    ids: list[int] = []
    while True:
        pieces = (f"{mark}<extra_id_{len(ids)}>" for mark in ("\u2581", ""))
        found = [tokenizer.PieceToId(piece) for piece in pieces]
        known = [token for token in found if token != tokenizer.unk_id()]
        if not known:
            return tuple(ids)
        ids.append(known[0])


def _sentencepiece(path: str, extra_ids: int) -> seqio.SentencePieceVocabulary:
    """Loads a model that this library can use, and adds sentinels unless it has its own."""
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
            f"vocabulary {path!r} has {tokenizer.IdToPiece(0)!r} as its token 0, which can occur "
            "in texts; here token 0 is padding. Expected a model with --pad_id=0, as T5's and "
            "Gemma's, or one whose token 0 is the unknown token and never used because all bytes "
            "have tokens, as Llama's."
        )
    if sentinel_ids(vocabulary):
        return vocabulary
    return seqio.SentencePieceVocabulary(path, extra_ids)


def _local_copy(path: epath.Path) -> str:
    """Copies a model from a bucket into the cache, since SeqIO reads those of TensorFlow alone."""
    from diffusion_t5x.data.embedded import file_cache

    content = path.read_bytes()
    name = f"vocabularies/{hashlib.sha256(content).hexdigest()[:16]}.model"

    def write(copy: pathlib.Path) -> None:
        copy.write_bytes(content)

    return str(file_cache.cached_file(name, write))


@functools.cache
def _get_vocabulary(name: str, extra_ids: int) -> seqio.Vocabulary:
    if name == "embedded":
        # Imported here: users of other vocabularies need none of the embedded text.
        from diffusion_t5x.data.embedded import file_cache
        from diffusion_t5x.data.embedded import vocabulary as embedded

        path = file_cache.cached_file("embedded.model", embedded.train)
        return _sentencepiece(str(path), extra_ids)
    if name == "bytes":
        return seqio.ByteVocabulary(extra_ids)
    path = paths.readable(name, "vocabularies.get_vocabulary.name")
    if path.exists() and tokenizer_files.is_tokenizer(path):
        return TokenizerVocabulary(tokenizer_files.read_tokenizer(path))
    if path.is_dir():
        path = path / "tokenizer.model"
    if paths.is_remote(path) and path.exists():
        return _sentencepiece(_local_copy(path), extra_ids)
    if path.is_file():
        return _sentencepiece(str(path), extra_ids)
    near = nearest(name, NAMES)
    hint = f"did you mean {near!r}? " if near else ""
    raise ValueError(
        f"vocabulary {name!r} is neither a name nor a file; {hint}"
        "Known: 'embedded', 'bytes', or the path of a SentencePiece model, of a directory with "
        "tokenizer.json, or of a .gguf file."
    )


@gin.configurable
def get_vocabulary(name: str = "embedded", extra_ids: int = 32) -> seqio.Vocabulary:
    """Returns the vocabulary that tasks and models share.

    Args:
      name: 'embedded' (768 tokens including 32 sentinels, trained once from the embedded text),
        'bytes' (ByT5's), the path of a SentencePiece model, or of a Hugging Face tokenizer: a
        directory, its `tokenizer.json`, or a `.gguf` file. Token 0 of a SentencePiece model must be
        padding or never occur in texts; the module `id_map` says how others get such a token.
      extra_ids: The number of sentinels for span corruption, added at the end unless the model has
        its own; none are added to a Hugging Face tokenizer.

    Raises:
      ValueError: if `name` is neither a known name nor a file, or the file's model is unusable.
    """
    return _get_vocabulary(name, extra_ids)


@gin.configurable
def eos_id(vocabulary: seqio.Vocabulary) -> int:
    """Returns the token that ends texts; -1, which no decoder waits for, if there is none."""
    return -1 if vocabulary.eos_id is None else vocabulary.eos_id


def fingerprint(vocabulary: seqio.Vocabulary) -> str:
    """Describes a vocabulary for people; equal SentencePiece models have equal fingerprints."""
    text = f"{type(vocabulary).__name__} of {vocabulary.vocab_size} tokens"
    if isinstance(vocabulary, TokenizerVocabulary):
        return vocabulary.fingerprint
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return f"{text}, sha256 {hashlib.sha256(vocabulary.sp_model).hexdigest()[:12]}"
    return f"{text}, {getattr(vocabulary, 'extra_ids', 0)} of them sentinels"


def lost_of_code(vocabulary: seqio.Vocabulary) -> list[str]:
    """Returns what programs lose when they become tokens and text again, as words for people."""

    def keeps(text: str) -> bool:
        return vocabulary.decode(list(vocabulary.encode(text))) == text

    lost = [name for name, text in _OF_CODE.items() if not keeps(text)]
    characters = "".join(char for char in map(chr, range(33, 127)) if not keeps(f"x{char}y"))
    return [*lost, f"the characters {characters}"] if characters else lost


def check_task(
    task: seqio.Task | seqio.Mixture,
    input_vocabulary: seqio.Vocabulary,
    output_vocabulary: seqio.Vocabulary,
) -> None:
    """Checks that a task and a model have the same vocabularies of 'inputs' and of 'targets'.

    Raises:
      ValueError: if they differ.
    """
    for name, ours in (("inputs", input_vocabulary), ("targets", output_vocabulary)):
        feature = task.output_features.get(name)
        if feature is None or feature.vocabulary == ours:
            continue
        theirs = fingerprint(feature.vocabulary)
        if isinstance(ours, seqio.SentencePieceVocabulary) and theirs == fingerprint(ours):
            continue
        raise ValueError(
            f"MIXTURE_OR_TASK_NAME = {task.name!r}: its {name} are tokens of {theirs}, but the "
            f"model's VOCABULARY is {fingerprint(ours)}. Register the task with the features of "
            "diffusion_t5x.tasks.features.output_features, which follow "
            "vocabularies.get_vocabulary as the model does, or set VOCABULARY to the task's."
        )
