"""The process of the assertions: calls a program through a pipe, and compares what comes back.

Results arrive as data, so a result that overrides its comparison overrides nothing here. What
cannot be data is a `Proxy`, which is equal to no value of an assertion.
"""

from __future__ import annotations

import builtins
import os
import pickle
import types
from collections.abc import Iterator, Sequence
from typing import Any

from .values import BadMessage, Decoder, Reference
from .wire import Gone, Peer

_DUNDERS = ("__name__", "__doc__", "__qualname__")


class Proxy(Reference):
    """An object of the program: calls, attributes, items and iteration happen there.

    Comparison with a value of the assertion happens here. So does `in`, by iteration, and there is
    no arithmetic: the program is never asked to judge a value it does not own.
    """

    __slots__ = ()

    def _ask(self, operation: str, *args: Any) -> Any:
        return self._peer.request(operation, self, *args)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask("call", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in _DUNDERS:
            raise AttributeError(name)
        return self._ask("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        self._ask("delitem", key)

    def __len__(self) -> int:
        return self._ask("len")

    def __iter__(self) -> Iterator[Any]:
        number = self._ask("iter")
        while item := self._peer.request("next", number):
            yield item[0]

    def __next__(self) -> Any:
        for item in self:
            return item
        raise StopIteration

    def __str__(self) -> str:
        return self._ask("str")

    def __repr__(self) -> str:
        return self._ask("repr")

    def __bool__(self) -> bool:
        return self._ask("bool")

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: Any) -> bool:
        if isinstance(other, Proxy):  # both are the program's: it may say when they are equal
            return self._ask("equal", other)
        contents = self._ask("contents")
        return bool(contents) and contents[0] == other


class ExaminerPeer(Peer):
    """Asks the program; answers nothing but calls of functions that were passed to it."""

    def answer(self, operation: str, *args: Any) -> Any:
        if operation != "call" or len(args) != 3:
            raise BadMessage(operation)
        function, positional, named = args
        # Nothing but what the assertions passed: no type or function that the program thought of.
        if not any(function is value for value in self._lent):
            raise BadMessage(repr(function))
        return function(*positional, **named)

    def request(self, operation: str, *args: Any) -> Any:
        try:
            return super().request(operation, *args)
        except Gone:  # nothing that the assertions catch can make up for it
            os._exit(1)

    def lend(self, value: Any) -> tuple[bytes, tuple]:
        if hasattr(value, "__next__"):
            return b"I", tuple(value)
        if callable(value):
            return super().lend(value)
        return b"p", (pickle.dumps(value),)

    def borrow(self, tag: bytes, parts: list[Any]) -> Any:
        if tag != b"h":
            return super().borrow(tag, parts)
        return Proxy(self, *parts)


class Names(dict):
    """The global names of the assertions: their own, then the program's, then the built-in ones.

    A built-in name stays what it is though the program defines it too, or `abs` and `all` would be
    the program's to decide; except where the assertions use nothing else of the program, which
    then was asked for a function of that name.
    """

    def __init__(self, peer: ExaminerPeer, defined: Sequence[str], used: set[str]):
        super().__init__(__name__="tests", __builtins__=builtins)
        self._peer = peer
        shared = used.intersection(defined)
        builtin = {name for name in shared if hasattr(builtins, name)}
        self._shadowing = builtin if builtin == shared else set()

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name) and name not in self._shadowing:
            raise KeyError(name)
        return self._peer.request("get", name)


def _names(code: types.CodeType) -> set[str]:
    """The names that a piece of code and all code within it read."""
    inner = (_names(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*inner)


def examine(reader: int, writer: int, job: bytes, verdict: int) -> None:
    """Writes b'passed' to `verdict` if the program ran and no assertion raised; then ends.

    Args:
      reader: from the program.
      writer: to the program.
      job: `(program, tests)`, encoded.
      verdict: file descriptor.
    """
    try:
        peer = ExaminerPeer(reader, writer)
        program, tests = Decoder(peer, [], job).decode()
        codes = [compile(test, "<test>", "exec") for test in tests]
        defined = peer.request("load", program)
        names = Names(peer, defined, set().union(*map(_names, codes)))
        for code in codes:
            exec(code, names)
        os.write(verdict, b"passed")
    finally:
        os._exit(0)
