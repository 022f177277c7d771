"""Conversations as examples: what is before a turn of the assistant, and the turn."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

import gin
from diffusion_t5x import paths
from diffusion_t5x.data.chat_templates import ChatTemplate, TemplateError
from diffusion_t5x.data.hf_tokenizer import TokenizerVocabulary

Example = Mapping[str, Any]
# Messages of these roles at the beginning are never dropped.
_HEAD = ("system", "developer")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """How conversations become texts.

    Attributes:
      template: The path of a Jinja template; None for the tokenizer's own.
      date: What a template that asks for today's date gets, `YYYY-MM-DD`: a fixed day, so that a
        run that resumes later reads the same texts.
    """

    template: str | None = None
    date: str = "2024-07-26"

    def load(self, vocabulary: seqio.Vocabulary) -> ChatTemplate | None:
        """Returns the template; None if neither this nor the vocabulary has one.

        Raises:
          ValueError: if the file does not exist.
        """
        own = isinstance(vocabulary, TokenizerVocabulary)
        source, name = (
            (vocabulary.files.chat_template, vocabulary.files.path) if own else (None, "")
        )
        if self.template is not None:
            path = paths.readable(self.template, "ChatFormat.template")
            if not path.is_file():
                raise ValueError(f"ChatFormat.template = {self.template!r} is no file.")
            source, name = path.read_bytes().decode("utf-8"), str(path)
        if source is None:
            return None
        texts = vocabulary.role_texts.items() if own else ()
        tokens = tuple((f"{role}_token", text) for role, text in texts)
        return ChatTemplate(source, name, tokens, self.date)


def tokenize_turns(
    dataset: tf.data.Dataset,
    output_features: Mapping[str, seqio.Feature],
    sequence_length: Mapping[str, int] | None = None,
) -> tf.data.Dataset:
    """Makes an example of each turn of the assistant.

    Records are those of `files.conversations.Conversations`. 'inputs' are the tokens of all that
    is before the turn, the template's beginning of a turn included; 'targets' those of the turn up
    to its end, which is left out if it is the end-of-text token, added later. Of a conversation
    whose inputs do not fit, the oldest exchanges after the system's message are dropped, whole,
    until they do; of a single one, the first tokens. A template does not render a `prompt`, which
    begins with the beginning-of-text token if the tokenizer begins texts so.
    """
    vocabulary = output_features["targets"].vocabulary
    template = ChatFormat().load(vocabulary)
    limit = (sequence_length or {}).get("inputs")

    def encode(example: bytes, turn: bytes) -> tuple[np.ndarray, np.ndarray, bytes, bytes]:
        value = json.loads(example)
        if "prompt" in value:
            inputs, targets = _completion(value, vocabulary)
            before, text = value["prompt"], value["completion"]
        else:
            assert template is not None  # else messages are refused when files are checked
            messages = value["messages"][: int(turn) + 1]
            inputs, targets, before = _fitting(
                messages, value["tools"], template, vocabulary, limit
            )
            text = messages[-1]["content"]
        inputs = inputs[-limit:] if limit else inputs
        arrays = np.array(inputs, np.int32), np.array(targets, np.int32)
        return *arrays, before.encode(), text.encode()

    def turns(record: Mapping[str, tf.Tensor]) -> tf.data.Dataset:
        example = record["example"]
        return tf.data.Dataset.from_tensor_slices(record["turns"]).map(lambda turn: (example, turn))

    def tokens(example: tf.Tensor, turn: tf.Tensor) -> Mapping[str, tf.Tensor]:
        types = [tf.int32, tf.int32, tf.string, tf.string]
        inputs, targets, before, text = tf.numpy_function(
            encode, [example, turn], types, stateful=False
        )
        return {
            "inputs": tf.ensure_shape(inputs, [None]),
            "targets": tf.ensure_shape(targets, [None]),
            "inputs_pretokenized": tf.ensure_shape(before, []),
            "targets_pretokenized": tf.ensure_shape(text, []),
        }

    return dataset.flat_map(turns).map(tokens, num_parallel_calls=4)


def _completion(value: Example, vocabulary: seqio.Vocabulary) -> tuple[list[int], list[int]]:
    """Tokenizes a prompt and its completion as one text, where the vocabulary can divide it."""
    prompt, completion = value["prompt"], value["completion"]
    if not isinstance(vocabulary, TokenizerVocabulary):
        return list(vocabulary.encode(prompt)), list(vocabulary.encode(completion))
    before = vocabulary.protect(prompt)
    inputs, targets = vocabulary.encode_rendered(
        before + vocabulary.protect(completion), len(before)
    )
    bos = vocabulary.bos_id if vocabulary.adds_bos else None
    return inputs if bos is None else [bos, *inputs], targets


def message_tokens(text: str, vocabulary: seqio.Vocabulary) -> list[int]:
    """Returns the tokens of a user's message and of the beginning of the assistant's turn.

    Raises:
      ValueError: if there is no template, or it refuses the message.
    """
    if (template := ChatFormat().load(vocabulary)) is None:
        raise ValueError(
            "AS_CHAT = True, but the vocabulary has no chat template; set ChatFormat.template, or "
            "get_vocabulary.name to a tokenizer with one."
        )
    own = isinstance(vocabulary, TokenizerVocabulary)
    content = vocabulary.protect(text) if own else text
    rendered = template.render([{"role": "user", "content": content}], None, True)
    return vocabulary.encode_rendered(rendered)[1] if own else list(vocabulary.encode(rendered))


def _fitting(
    messages: list[Example],
    tools: Any,
    template: ChatTemplate,
    vocabulary: seqio.Vocabulary,
    limit: int | None,
) -> tuple[list[int], list[int], str]:
    """Tokenizes the last turn, and as many exchanges before it as fit."""
    first = next((n for n, one in enumerate(messages) if one["role"] not in _HEAD), 0)
    later = [n for n in range(first + 1, len(messages)) if messages[n]["role"] == "user"]
    inputs: list[int] = []
    targets: list[int] = []
    before = ""
    for begin in (first, *later):
        kept = [*messages[:first], *messages[begin:]]
        try:
            inputs, targets, before = _turn(kept, tools, template, vocabulary)
        except TemplateError:  # of what is left; the whole has been rendered before
            if begin == first:
                raise
        if limit is None or len(inputs) <= limit:
            break
    return inputs, targets, before


def _turn(
    messages: list[Example], tools: Any, template: ChatTemplate, vocabulary: seqio.Vocabulary
) -> tuple[list[int], list[int], str]:
    text, border = template.turn(messages, tools)
    before = text[:border]
    if not isinstance(vocabulary, TokenizerVocabulary):
        return list(vocabulary.encode(before)), list(vocabulary.encode(text[border:])), before
    protected = [_protected(message, vocabulary) for message in messages]
    if protected != messages:
        text, border = template.turn(protected, tools)
    inputs, targets = vocabulary.encode_rendered(text, border)
    ends = [place for place, token in enumerate(targets) if token in vocabulary.special_ids]
    if ends:
        end = ends[-1]
        targets = targets[: end if targets[end] == vocabulary.eos_id else end + 1]
    return inputs, targets, before


def _protected(value: Any, vocabulary: TokenizerVocabulary) -> Any:
    """Protects all texts of a message, so that none of them is taken for a special token."""
    if isinstance(value, str):
        return vocabulary.protect(value)
    if isinstance(value, dict):
        return {key: _protected(inner, vocabulary) for key, inner in value.items()}
    return [_protected(one, vocabulary) for one in value] if isinstance(value, list) else value
