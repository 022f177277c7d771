"""Tokenizers as others publish them: `tokenizer.json` and the files beside it, GGUF's metadata.

Both become the content of a `tokenizer.json`, from which the package `tokenizers` makes one.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from diffusion_t5x import paths
from diffusion_t5x.data.gguf_header import Header, read_header
from diffusion_t5x.data.id_map import IdMap, choose_padding
from diffusion_t5x.names import did_you_mean

ROLES = ("bos", "eos", "unk", "pad")
# What ends texts, where no file says so.
_USUAL_ENDS = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>")
_SPACE = "\u2581"
# A tokenizer's files, what is known of sampling, and the terms of use.
_COPIED = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|"
    r"\w+\.model|chat_template.*|generation_config\.json|(LICENSE|NOTICE|USE_POLICY).*"
)
_WORDS_OF_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer, as its files say.

    Attributes:
      path: Where it is from.
      spec: The content of a `tokenizer.json`.
      roles: The ids of 'bos', 'eos', 'unk' and 'pad', as far as there are such.
      free: Ids for which the embedding has rows, and the tokenizer no tokens.
      chat_template: The Jinja template of conversations; None if there is none.
    """

    path: str
    spec: Mapping[str, Any]
    roles: Mapping[str, int]
    free: tuple[int, ...] = ()
    chat_template: str | None = None


def is_tokenizer(path: epath.Path) -> bool:
    """Returns whether a file or directory is read by `read_tokenizer`."""
    return path.name.endswith((".json", ".gguf")) or (path / "tokenizer.json").exists()


def read_tokenizer(path: epath.Path) -> TokenizerFiles:
    """Reads a directory with `tokenizer.json`, that file, or the metadata of a GGUF file.

    Raises:
      ValueError: if a file is damaged, is of a kind that is not read, or nothing ends texts.
    """
    if path.name.endswith(".gguf"):
        if paths.is_remote(path):
            raise ValueError(f"{path} is in a bucket; expected a path on this machine: copy it.")
        return _of_gguf(read_header(path))
    directory, file = (path.parent, path) if path.is_file() else (path, path / "tokenizer.json")
    spec = _read_object(file)
    ids = token_ids(spec, str(file))
    settings = _read_object(directory / "tokenizer_config.json", {})
    tokens = _read_object(directory / "special_tokens_map.json", {}) | settings
    config = _read_object(directory / "config.json", {})
    config = config.get("text_config", config)
    roles = {}
    for role in ROLES:
        token = tokens.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        number = config.get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(token, str):
            if token not in ids:
                raise ValueError(f"{directory}: {role}_token {token!r} is no token of {file.name}.")
            roles[role] = ids[token]
        elif isinstance(number, int):
            roles[role] = number
    size = max(ids.values()) + 1
    rows = config.get("vocab_size", 0)
    if isinstance(rows, int) and 0 < rows < size:
        raise ValueError(
            f"{file} has {size:,} tokens, but the embedding of {directory / 'config.json'} has "
            f"vocab_size = {rows:,} rows: they are not of one model."
        )
    return TokenizerFiles(
        str(path),
        spec,
        _with_end(roles, spec, str(path)),
        tuple(range(size, rows)),
        _template(directory, settings),
    )


def _read_object(path: epath.Path, otherwise: dict[str, Any] | None = None) -> dict[str, Any]:
    if otherwise is not None and not path.exists():
        return otherwise
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def token_ids(spec: Mapping[str, Any], name: str) -> dict[str, int]:
    """Returns the ids of all tokens of a `tokenizer.json`.

    Raises:
      ValueError: if it is none.
    """
    try:
        vocab = spec["model"]["vocab"]
        ids = dict(vocab) if isinstance(vocab, dict) else {x[0]: i for i, x in enumerate(vocab)}
        ids |= {token["content"]: token["id"] for token in spec.get("added_tokens") or ()}
        if not ids or not all(isinstance(number, int) for number in ids.values()):
            raise ValueError("its vocabulary")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{name} is no tokenizer.json of the library tokenizers: {error}"
        ) from error
    return ids


def id_map_of(files: TokenizerFiles) -> IdMap:
    """Returns the exchange of token 0 with the token of a tokenizer that is padding here."""
    added = files.spec.get("added_tokens") or ()
    special = {token["id"]: token["content"] for token in added if token.get("special")}
    rows = max([*token_ids(files.spec, files.path).values(), *files.free]) + 1
    whole = files.spec["model"].get("byte_fallback") or "ByteLevel" in json.dumps(
        files.spec.get("pre_tokenizer")
    )
    return IdMap(choose_padding(rows, special, files.roles, files.free, not whole))


def copy_files(files: TokenizerFiles) -> dict[str, bytes]:
    """Returns name and content of a tokenizer's files; those of a GGUF file are made anew."""
    path = epath.Path(files.path)
    if not path.name.endswith(".gguf"):
        directory = path.parent if path.is_file() else path
        found = [file for file in directory.iterdir() if _COPIED.fullmatch(file.name)]
        return {file.name: file.read_bytes() for file in found if file.is_file()}
    contents = {number: text for text, number in token_ids(files.spec, files.path).items()}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": contents[number] for role, number in files.roles.items()},
    }
    if files.chat_template is not None:
        settings["chat_template"] = files.chat_template
    generation = {f"{role}_token_id": n for role, n in files.roles.items() if role != "unk"}
    made = {
        "tokenizer.json": files.spec,
        "tokenizer_config.json": settings,
        "generation_config.json": generation,
    }
    return {
        name: (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
        for name, value in made.items()
    }


def _with_end(roles: Mapping[str, int], spec: Mapping[str, Any], name: str) -> dict[str, int]:
    """Adds 'eos' where the files do not say it, if one token alone can be meant."""
    if "eos" in roles:
        return dict(roles)
    ids = {token["content"]: token["id"] for token in spec.get("added_tokens") or ()}
    found = [token for token in _USUAL_ENDS if token in ids]
    if len(found) != 1:
        raise ValueError(
            f"{name} does not say which token ends texts; expected eos_token in "
            f"tokenizer_config.json beside it, one of {sorted(ids)}."
        )
    return {**roles, "eos": ids[found[0]]}


def _template(directory: epath.Path, settings: Mapping[str, Any]) -> str | None:
    if (directory / "chat_template.jinja").exists():
        return (directory / "chat_template.jinja").read_bytes().decode("utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


# How the text is divided before merging, by GGUF's name: normalizer, splits, `ignore_merges`.
def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _split(regex: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": regex},
        "behavior": "Isolated",
        "invert": False,
    }


_DIGITS = {"type": "Digits", "individual_digits": True}
_LLAMA_3 = (None, [_split(_WORDS_OF_LLAMA_3.replace("NUMBERS", "{1,3}")), _byte_level(False)], True)
_QWEN_2 = (
    {"type": "NFC"},
    [_split(_WORDS_OF_LLAMA_3.replace("NUMBERS", "")), _byte_level(False)],
    False,
)
_GPT_2 = (None, [_byte_level(True)], False)
_BYTE_LEVEL = {
    "gpt-2": _GPT_2,
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "qwen2": _QWEN_2,
    "smollm": (None, [_DIGITS, _byte_level(True)], False),
}


def _of_gguf(header: Header) -> TokenizerFiles:
    def require(key: str) -> Any:
        if (value := header.metadata.get(f"tokenizer.ggml.{key}")) is None:
            raise ValueError(f"{header.path}: its metadata lack tokenizer.ggml.{key}.")
        return value

    tokens, kind = require("tokens"), require("model")
    kinds = header.metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if len(set(tokens)) < len(tokens) or len(kinds) != len(tokens):
        raise ValueError(f"{header.path}: its {len(tokens):,} tokens are not all different, or "
                         f"have {len(kinds):,} types.")  # fmt: skip
    names = {"unk": "unknown", "pad": "padding"}
    given = {
        role: header.metadata.get(f"tokenizer.ggml.{names.get(role, role)}_token_id")
        for role in ROLES
    }
    roles = {role: int(token) for role, token in given.items() if token is not None}
    if any(token >= len(tokens) for token in roles.values()):
        raise ValueError(f"{header.path}: of {len(tokens):,} tokens, {roles} are not all there.")
    added = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kinds[number] != 4,
        }
        for number, token in enumerate(tokens)
        if kinds[number] == 3 or (kinds[number] == 4 and _SPACE not in token)
        or (kinds[number] == 2 and kind == "llama") or number in roles.values()
    ]  # fmt: skip
    if kind == "gpt2":
        parts = _byte_level_parts(header.metadata, str(header.path), tokens, require("merges"))
    elif kind == "llama":
        parts = _sentencepiece_parts(header.metadata, tokens, require("scores"), kinds, roles)
    else:
        raise ValueError(
            f"{header.path}: the tokenizer {kind!r} is not read; "
            f"{did_you_mean(kind, ('gpt2', 'llama'))}"
        )
    spec = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "post_processor": _beginning(header.metadata, kind, tokens, roles), **parts,
    }  # fmt: skip
    free = tuple(n for n, token_kind in enumerate(kinds) if token_kind == 5)
    template = header.metadata.get("tokenizer.chat_template")
    return TokenizerFiles(header.path, spec, _with_end(roles, spec, header.path), free, template)


def _beginning(
    metadata: Mapping[str, Any], kind: str, tokens: list[str], roles: Mapping[str, int]
) -> dict[str, Any] | None:
    """Returns the post-processor that begins texts with 'bos', if they begin so."""
    if "bos" not in roles or not metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        return None
    bos = tokens[roles["bos"]]
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [roles["bos"]], "tokens": [bos]}},
    }


def _byte_level_parts(
    metadata: Mapping[str, Any], path: str, tokens: list[str], merges: list[str]
) -> dict[str, Any]:
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in _BYTE_LEVEL:
        raise ValueError(
            f"{path}: texts are divided as {pre!r}, tokenizer.ggml.pre, which is not read; "
            f"{did_you_mean(pre, _BYTE_LEVEL)} Use the model's tokenizer.json instead."
        )
    normalizer, splits, ignore_merges = _BYTE_LEVEL[pre]
    return {
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "decoder": _byte_level(True),
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
            "ignore_merges": ignore_merges,
        },
    }


def _sentencepiece_parts(
    metadata: Mapping[str, Any],
    tokens: list[str],
    scores: list[float],
    kinds: list[int],
    roles: Mapping[str, int],
) -> dict[str, Any]:
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    normalizers: list[dict[str, Any]] = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    normalizers += [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": tokens[roles["unk"]] if "unk" in roles else None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [list(pair) for pair in _merges(tokens, scores, kinds)],
        },
    }


def _merges(tokens: list[str], scores: list[float], kinds: list[int]) -> Iterator[tuple[str, str]]:
    """Yields the pairs of pieces that SentencePiece's BPE merges, best first."""
    score = {t: s for t, s, kind in zip(tokens, scores, kinds, strict=True) if kind in (1, 4)}
    for token in sorted(score, key=lambda one: -score[one]):
        for at in range(1, len(token)):
            if token[:at] in score and token[at:] in score:
                yield token[:at], token[at:]
