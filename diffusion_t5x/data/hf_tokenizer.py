"""A SeqIO vocabulary over tokenizers of the package `tokenizers`."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from diffusion_t5x.data.tokenizer_files import TokenizerFiles, id_map_of, token_ids

# In texts that are tokenized, special tokens have other names, which nobody can guess.
_SECRET = secrets.token_hex(8)


class TokenizerVocabulary(seqio.Vocabulary):
    """A tokenizer of others as a vocabulary; its ids are those of `id_map`, and 0 is padding.

    Texts are tokenized as they are: what looks like a special token is text. Only
    `encode_rendered` reads special tokens, those of a chat template. Neither adds tokens at a
    text's beginning or end. Special tokens become no text, and bytes that are no text U+FFFD.

    In tf.data Python tokenizes, one text at a time and holding Python's lock for most of it, about
    as fast as one core: costly for long texts, and no data service of TensorFlow can run it.

    Attributes:
      id_map: What exchanges token 0 with the one that is padding here.
      files: The tokenizer's files.
      sentinels: The tokens that span corruption may use, none of which texts have.
      role_texts: What stands in texts for 'bos', 'eos', 'unk' and 'pad', as far as there are such.
      special_ids: The tokens that no text has unless a template writes them.
      adds_bos: Whether texts begin with `bos_id`, as the tokenizer's files have it.
    """

    def __init__(self, files: TokenizerFiles):
        """Makes the tokenizer.

        Raises:
          ValueError: if the package `tokenizers` refuses it.
          ImportError: if that is not installed; the message has pip's command.
        """
        super().__init__(extra_ids=0)
        self.files = files
        ids = token_ids(files.spec, files.path)
        added = files.spec.get("added_tokens") or ()
        special = {token["id"]: token["content"] for token in added if token.get("special")}
        rows = max([*ids.values(), *files.free]) + 1
        self.id_map = id_map_of(files)
        self._size = max(rows, self.id_map.padding + 1)
        self._roles = {role: self._ours([token])[0] for role, token in files.roles.items()}
        self._special = {text: number for number, text in special.items()}
        contents = {number: text for text, number in ids.items()}
        self.role_texts = {role: contents.get(n, "") for role, n in files.roles.items()}
        self.special_ids = frozenset(self._ours(list(special)))
        self._tokenizer = _make(_renamed(files.spec, self._special), files.path)
        bare = _make(files.spec, files.path).encode("")
        self.adds_bos = files.roles.get("bos") in bare.ids
        self.sentinels = self._find_sentinels(ids)
        digest = hashlib.sha256(json.dumps([files.spec, dict(files.roles)]).encode()).hexdigest()
        self.fingerprint = (
            f"{type(self).__name__} of {self._size} tokens, padding for "
            f"{self.id_map.padding}, sha256 {digest[:12]}"
        )

    def _find_sentinels(self, ids: Mapping[str, int]) -> tuple[int, ...]:
        """Returns `<extra_id_0>` and so on, else reserved tokens, else rows without tokens."""
        numbered: list[int] = []
        while (name := f"<extra_id_{len(numbered)}>") in ids:
            numbered.append(ids[name])
        taken = {self.id_map.padding, *self.files.roles.values()}
        reserved = [n for text, n in self._special.items() if re.search("reserved|unused", text)]
        spare = [n for n in [*sorted(reserved), *self.files.free] if n not in taken]
        return tuple(self._ours(numbered or spare))

    @property
    def bos_id(self) -> int | None:
        """The token that begins texts, if there is one."""
        return self._roles.get("bos")

    @property
    def eos_id(self) -> int:
        """The token that ends texts."""
        return self._roles["eos"]

    @property
    def unk_id(self) -> int | None:
        """The token for what has none, if there is one."""
        return self._roles.get("unk")

    @property
    def _base_vocab_size(self) -> int:
        return self._size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenizerVocabulary) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __deepcopy__(self, memo: Any) -> TokenizerVocabulary:
        return self

    def __str__(self) -> str:
        return f"{self.fingerprint} of {self.files.path}"

    def _ours(self, ids: Sequence[int]) -> list[int]:
        exchanged: list[int] = self.id_map.exchange(np.array(ids, np.int64)).tolist()
        return exchanged

    def _encode(self, s: str) -> list[int]:
        return self._ours(self._tokenizer.encode(s, add_special_tokens=False).ids)

    def _decode(self, ids: Iterable[int]) -> str:
        theirs = self.id_map.exchange(np.array(list(ids), np.int64)).tolist()
        known = [token for token in theirs if self._tokenizer.id_to_token(token) is not None]
        text: str = self._tokenizer.decode(known, skip_special_tokens=True)
        return text

    def protect(self, text: str) -> str:
        """Returns a text for a template whose special tokens `encode_rendered` takes for text."""
        return self._replace(text, lambda number: f"[{_SECRET};{number}]")

    def encode_rendered(self, text: str, begin: int = 0) -> tuple[list[int], list[int]]:
        """Tokenizes what a template has rendered: its special tokens, and protected text.

        Returns:
          The tokens of the first `begin` characters of `text`, as they are where nothing follows,
          for so a prefix is read when it is decoded from; and those of the others, as they follow.
        """
        head, whole = self._encode(self._mark(text[:begin])), self._encode(self._mark(text))
        if whole[: len(head)] == head:
            return head, whole[len(head) :]
        return head, self._encode(self._mark(text[begin:]))

    def _mark(self, text: str) -> str:
        """Names special tokens as the tokenizer here knows them, and restores protected text."""
        marked = self._replace(text, lambda number: f"[{_SECRET}:{number}]")
        contents = {str(number): content for content, number in self._special.items()}
        return re.sub(rf"\[{_SECRET};(\d+)\]", lambda match: contents[match[1]], marked)

    def _replace(self, text: str, name: Callable[[int], str]) -> str:
        return self._pattern.sub(lambda match: name(self._special[match[0]]), text)

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        if s.shape.rank != 0:
            raise ValueError(f"texts are tokenized one by one; found the shape {s.shape}.")

        def encode(text: bytes) -> np.ndarray:
            return np.array(self._encode(text.decode("utf-8", errors="replace")), np.int32)

        tokens = tf.numpy_function(encode, [s], tf.int32, stateful=False)
        return tf.ensure_shape(tokens, [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(rows: np.ndarray) -> np.ndarray:
            texts = [self._decode(row).encode() for row in rows.reshape(-1, rows.shape[-1])]
            return np.array(texts, object).reshape(rows.shape[:-1])

        return tf.ensure_shape(tf.numpy_function(decode, [ids], tf.string), ids.shape[:-1])


def _renamed(spec: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
    """Returns a tokenizer whose special tokens no text contains."""
    absent = {"post_processor": None, "truncation": None, "padding": None}
    changed: dict[str, Any] = copy.deepcopy({**spec, **absent})
    names = {content: f"[{_SECRET}:{number}]" for content, number in special.items()}
    for token in changed["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = changed["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): n for text, n in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return changed


def _make(spec: Mapping[str, Any], name: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"{name} needs: pip install 'diffusion_t5x[llm]' ({error})") from error
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises no other kind
        raise ValueError(f"{name} is no tokenizer of the library tokenizers: {error}") from error
