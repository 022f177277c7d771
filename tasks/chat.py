"""Conversations and completions of users' own files, learned turn by turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusion_t5x.data import chat, vocabularies
from diffusion_t5x.data.files.conversations import Conversations
from diffusion_t5x.data.files.local_files import LocalFiles, LocalFilesDataSource

from . import metrics
from .features import register

CHAT = "chat"


def _reader(settings: LocalFiles) -> Conversations:
    return Conversations(chat.ChatFormat().load(vocabularies.get_vocabulary()))


def _no_files() -> Mapping[str, Any]:
    raise ValueError(
        "the task 'chat' reads your files; set LOCAL_FILES = {'chat': {'train': 'chats.jsonl'}}, "
        "JSON lines with 'messages', or 'prompt' and 'completion'."
    )


def postprocess(text: str, example: Mapping[str, Any], is_target: bool) -> str:
    """Turns targets into the turn's own text, and returns predictions unchanged."""
    return example["targets_pretokenized"].decode() if is_target else text


register(
    CHAT,
    LocalFilesDataSource(
        CHAT, _reader, default_files=_no_files, splits=("train", "validation", "test")
    ),
    [chat.tokenize_turns],
    postprocess_fn=postprocess,
    metric_fns=[metrics.exact_match, metrics.bleu],
)
