"""The process of a generated program: runs its text, then answers calls of what it defined.

It is told arguments and gives back results. It is never told an assertion, nor what it expects.
"""

from __future__ import annotations

import os
import pickle
import sys
import types
from typing import Any

from .values import Reference
from .wire import Peer


class Callback(Reference):
    """A function that an assertion passed as an argument; it runs where it was written."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._peer.request("call", self, args, kwargs)


class ProgramPeer(Peer):
    """Holds the program's names and objects."""

    trusting = True

    def __init__(self, reader: int, writer: int):
        super().__init__(reader, writer)
        # As an imported module: a block under `if __name__ == "__main__":` does not run.
        self._module = types.ModuleType("program")
        sys.modules["program"] = self._module

    def answer(self, operation: str, *args: Any) -> Any:
        return getattr(self, f"_do_{operation}")(*args)

    def borrow(self, tag: bytes, parts: list[Any]) -> Any:
        match tag:
            case b"h":
                return Callback(self, *parts)
            case b"I":
                return iter(parts)
            case b"p":
                return pickle.loads(parts[0])
        return super().borrow(tag, parts)

    def _do_load(self, text: str) -> tuple[str, ...]:
        exec(compile(text, "<program>", "exec"), self._module.__dict__)
        return tuple(name for name in self._module.__dict__ if not name.startswith("__"))

    def _do_get(self, name: str) -> Any:
        return self._module.__dict__[name]

    def _do_call(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return function(*args, **kwargs)

    def _do_getattr(self, value: Any, name: str) -> Any:
        return getattr(value, name)

    def _do_setattr(self, value: Any, name: str, new: Any) -> None:
        setattr(value, name, new)

    def _do_getitem(self, value: Any, key: Any) -> Any:
        return value[key]

    def _do_setitem(self, value: Any, key: Any, new: Any) -> None:
        value[key] = new

    def _do_delitem(self, value: Any, key: Any) -> None:
        del value[key]

    def _do_len(self, value: Any) -> int:
        return len(value)

    def _do_iter(self, value: Any) -> Any:
        return self.lend(iter(value))[1][0]

    def _do_next(self, number: int) -> tuple:
        """The next item, in a tuple; an empty one at the end."""
        try:
            return (next(self.lent(number)),)
        except StopIteration:
            return ()

    def _do_str(self, value: Any) -> str:
        return str(value)

    def _do_repr(self, value: Any) -> str:
        return repr(value)

    def _do_bool(self, value: Any) -> bool:
        return bool(value)

    def _do_equal(self, value: Any, other: Any) -> bool:
        return bool(value == other)

    def _do_contents(self, value: Any) -> tuple:
        """What a container of a derived class holds, as the container it derives from."""
        if isinstance(value, list):
            return (list(list.__iter__(value)),)
        if isinstance(value, dict):
            return (dict(dict.items(value)),)
        if isinstance(value, set):
            return (set(set.__iter__(value)),)
        return ()


def serve(reader: int, writer: int) -> None:
    """Runs until the examiner is gone."""
    try:
        ProgramPeer(reader, writer).serve_forever()
    finally:
        os._exit(0)
