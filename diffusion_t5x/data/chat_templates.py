"""Jinja templates of conversations, rendered as `transformers` does, in a sandbox."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]


class TemplateError(ValueError):
    """A template refuses a conversation, or is none."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template with what it may read besides messages.

    Attributes:
      source: Its text.
      name: Where it is from, for errors.
      tokens: Texts by name, such as `('bos_token', '<s>')`.
      date: What `strftime_now` takes for today, `YYYY-MM-DD`.
    """

    source: str
    name: str
    tokens: tuple[tuple[str, str], ...] = ()
    date: str = "2024-07-26"

    def render(
        self, messages: Sequence[Message], tools: Any = None, add_generation_prompt: bool = False
    ) -> str:
        """Renders a conversation.

        Args:
          add_generation_prompt: Whether to begin the assistant's next turn.

        Raises:
          TemplateError: if the template refuses it, or fails.
        """
        compiled = _compile(self.source, self.name, self.date)
        try:
            text: str = compiled.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **dict(self.tokens),
            )
        except Exception as error:  # whatever the template's author wrote
            raise TemplateError(f"the chat template of {self.name} refuses it: {error}") from error
        return text

    def turn(self, messages: Sequence[Message], tools: Any = None) -> tuple[str, int]:
        """Renders a conversation up to its last turn, the assistant's.

        Returns:
          The text, and the number of characters before that turn: what the template renders for
          the messages before, with the beginning of a turn if the template goes on from there.

        Raises:
          TemplateError: as `render` does, or if the turn changes what is before it.
        """
        text = self.render(messages, tools)
        for prompt in (True, False):
            before = self.render(messages[:-1], tools, prompt) if messages[:-1] else ""
            if text.startswith(before) and len(before) < len(text):
                return text, len(before)
        raise TemplateError(
            f"the chat template of {self.name} renders turn {len(messages)} of the assistant "
            "otherwise than as what follows the turns before"
        )


@functools.lru_cache(maxsize=8)
def _compile(source: str, name: str, date: str) -> Any:
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError as error:
        raise ImportError(f"{name} needs: pip install 'diffusion_t5x[llm]' ({error})") from error
    try:
        today = datetime.date.fromisoformat(date)
    except (TypeError, ValueError) as error:
        raise ValueError(f"ChatFormat.date = {date!r}; expected YYYY-MM-DD.") from error

    class Generation(jinja2.ext.Extension):
        """What the assistant says may stand between `generation` and `endgeneration`."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **kwargs: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **kwargs)  # Jinja's escapes HTML

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = today.strftime
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"{name}, line {error.lineno}: no Jinja template: {error}") from error
