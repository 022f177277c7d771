"""A reader of conversations and completions, of which each turn of the assistant is an example."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from diffusion_t5x.data.chat_templates import ChatTemplate, TemplateError
from diffusion_t5x.data.files import readers
from diffusion_t5x.data.files.lines import Batch, Malformed
from diffusion_t5x.data.files.readers import Record

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant"}
_FORMS = "expected 'messages', 'conversations', or 'prompt' and 'completion'"


@dataclasses.dataclass(frozen=True)
class Conversations:
    """A reader of objects in JSON lines, arrays or Parquet.

    They have 'messages', a list of objects with 'role' and 'content'; or 'conversations', with
    'from' and 'value'; or 'prompt' and 'completion', two texts or two lists of messages; and
    perhaps 'tools'. A turn whose 'weight' is 0 is not learned. A record is `example`, JSON of
    `messages` and `tools`, or of `prompt` and `completion`, and `turns`, the places of the
    messages that are to be learned.

    Attributes:
      template: Renders the messages of each record once, so that what it refuses is known before
        a run starts; None if the tokenizer has none.
    """

    template: ChatTemplate | None

    fields = {"example": readers.TEXT, "turns": readers.TEXTS}

    def batches(self, files: tuple[str, ...]) -> Iterator[Batch]:
        [path] = files
        columns = ("messages", "conversations", "prompt", "completion", "tools")
        return readers.object_batches(path, columns)

    def record(self, item: Any, kind: str, split: str | None) -> Record | None:
        if readers.is_blank(item, kind):
            return None
        value = readers.json_object(item, kind)
        if value.get("messages") or value.get("conversations"):
            name = "messages" if value.get("messages") else "conversations"
            messages, learned = _messages(value[name], name), 0
        elif isinstance(value.get("prompt"), str) and isinstance(value.get("completion"), str):
            text = {name: readers.check_text(value[name], name, readers.OPTIONAL_TEXT)
                    for name in ("prompt", "completion")}  # fmt: skip
            readers.check_text(text["completion"], "completion")
            return {"example": json.dumps(text), "turns": ["0"]}
        elif isinstance(value.get("prompt"), list) and isinstance(value.get("completion"), list):
            prompt = _messages(value["prompt"], "prompt")
            messages, learned = prompt + _messages(value["completion"], "completion"), len(prompt)
        else:
            raise Malformed(f"{_FORMS}; it has {sorted(value)}")
        turns = [
            place
            for place, message in enumerate(messages)
            if place >= learned and message["role"] == "assistant" and message.get("weight") != 0
        ]
        if not turns:
            raise Malformed("has no turn of the assistant, so nothing to learn")
        if not isinstance(tools := value.get("tools") or None, list | None):
            raise Malformed(f"'tools' is {tools!r:.40}, expected a list")
        example = {"messages": messages, "tools": tools}
        written = readers.check_text(json.dumps(example, ensure_ascii=False), "messages")
        self._check(example, turns)
        return {"example": written, "turns": [str(turn) for turn in turns]}

    def _check(self, example: Mapping[str, Any], turns: list[int]) -> None:
        if self.template is None:
            raise Malformed(
                "has messages, but the vocabulary has no chat template; set ChatFormat.template, "
                "or get_vocabulary.name to a tokenizer with one"
            )
        for turn in turns:
            try:
                self.template.turn(example["messages"][: turn + 1], example["tools"])
            except TemplateError as error:
                raise Malformed(str(error)) from error


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise Malformed(f"{name!r} is {value!r:.40}, expected a list of messages")
    return [_message(message, f"{name}[{place}]") for place, message in enumerate(value)]


def _message(message: Any, place: str) -> dict[str, Any]:
    """Returns a message with 'role' and 'content'; what else it has, templates may read."""
    if not isinstance(message, dict):
        raise Malformed(f"{place} is {message!r:.40}, expected an object")
    found = {key: value for key, value in message.items() if value is not None}  # of Parquet
    if "from" in found and "role" not in found:
        role = found.pop("from")
        found["role"] = _SHAREGPT.get(role, role) if isinstance(role, str) else role
        found["content"] = found.pop("value", None)
    if found.get("role") not in ROLES:
        raise Malformed(f"{place} has the role {found.get('role')!r}, expected one of {ROLES}")
    content = found.get("content", "" if found.get("tool_calls") else None)
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise Malformed(f"{place} has parts of another type than 'text'")
        content = "".join(readers.check_text(part.get("text"), place) for part in content)
    empty = found["role"] != "assistant" or found.get("tool_calls")
    kind = readers.OPTIONAL_TEXT if empty else readers.TEXT
    found["content"] = readers.check_text(content, f"{place}.content", kind)
    return found
