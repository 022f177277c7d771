"""The pipe between a program and its assertions: each end asks, and answers while it waits."""

from __future__ import annotations

import abc
import builtins
import os
import struct
from typing import Any

from .values import BadMessage, Decoder, Encoder, contents, refill

MAX_MESSAGE = 2**26  # bytes


class Gone(BaseException):
    """The other side has ended; no assertion may catch this as if it were a program's error."""


class Peer(abc.ABC):
    """One end of the pipe: asks the other side, and answers it while it waits.

    Attributes:
      trusting: whether the other side may have things made here that are more than data.
    """

    trusting = False

    def __init__(self, reader: int, writer: int):
        self._reader, self._writer = reader, writer
        self._lent: list[Any] = []
        self._numbers: dict[int, int] = {}

    @abc.abstractmethod
    def answer(self, operation: str, *args: Any) -> Any:
        """Does what the other side asks for."""

    def lend(self, value: Any) -> tuple[bytes, tuple]:
        """The tag and parts that stand for a value which is not copied."""
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._lent)
            self._lent.append(value)
        return b"h", (self._numbers[id(value)],)

    def lent(self, number: int) -> Any:
        """The value that was lent under a number."""
        return self._lent[number]

    def borrow(self, tag: bytes, parts: list[Any]) -> Any:
        """What stands here for a value of the other side."""
        raise BadMessage(f"tag {tag!r}")

    def request(self, operation: str, *args: Any) -> Any:
        """Has the other side do something, and returns what it gives back.

        Arguments that it changed are changed here too.

        Raises:
          Gone: if it has ended.
          BadMessage: if it answers nonsense.
          Exception: the built-in exception nearest to the one that was raised there.
        """
        table: list[Any] = []
        self._send(b"?", (operation, *args), table)
        while True:
            kind, data = self._receive()
            if kind == b"?":
                self._serve(data)
                continue
            changed, value = Decoder(self, table, data).decode()
            for number, items in changed:
                refill(table[number], items)
            if kind == b"=":
                return value
            name, message = value
            error = getattr(builtins, name, None)
            if not (isinstance(error, type) and issubclass(error, Exception)):
                error = RuntimeError
            raise _made(error, message)

    def serve_forever(self) -> None:
        """Answers until the other side is gone.

        Raises:
          Gone: then.
        """
        while True:
            kind, data = self._receive()
            if kind != b"?":
                raise BadMessage("an answer to no question")
            self._serve(data)

    def _serve(self, data: bytes) -> None:
        table: list[Any] = []
        try:
            before = []
            operation, *args = Decoder(self, table, data).decode()
            before = [contents(container) for container in table]
            kind, value = b"=", self.answer(operation, *args)
        except Gone:
            raise
        except BaseException as error:
            kind, value = b"!", _described(error)
        changed = tuple(
            (number, contents(table[number]))
            for number, items in enumerate(before)
            if not _same(contents(table[number]), items)
        )
        try:
            self._send(kind, (changed, value), table)
        except Exception as error:
            self._send(b"!", ((), _described(error)), [])

    def _send(self, kind: bytes, value: Any, table: list[Any]) -> None:
        encoder = Encoder(self, table)
        encoder.encode(value)
        if len(encoder.out) > MAX_MESSAGE:
            raise ValueError(f"a message of {len(encoder.out)} bytes; at most {MAX_MESSAGE}")
        data = memoryview(kind + struct.pack("<I", len(encoder.out)) + encoder.out)
        try:
            while data:
                data = data[os.write(self._writer, data) :]
        except OSError as error:
            raise Gone from error

    def _receive(self) -> tuple[bytes, bytes]:
        head = self._read(5)
        size = struct.unpack("<I", head[1:])[0]
        if size > MAX_MESSAGE or head[:1] not in (b"?", b"=", b"!"):
            raise BadMessage("no message starts like this")
        return head[:1], self._read(size)

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = os.read(self._reader, min(size - len(data), 2**20))
            if not part:
                raise Gone
            data += part
        return bytes(data)


def _same(items: Any, others: Any) -> bool:
    """Whether a container holds the very objects it held; equality is not asked of them."""
    if isinstance(items, bytes):
        return items == others
    flat = [part for item in items for part in (item if isinstance(item, tuple) else (item,))]
    flat2 = [part for item in others for part in (item if isinstance(item, tuple) else (item,))]
    return (
        len(items) == len(others)
        and len(flat) == len(flat2)
        and all(one is other for one, other in zip(flat, flat2, strict=True))
    )


def _described(error: BaseException) -> tuple[str, str]:
    """The nearest built-in class of an exception, and its message."""
    names = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
    try:
        return names[0], str(error)
    except Exception:
        return names[0], ""


def _made(error: type[Exception], message: str) -> Exception:
    try:
        return error(message)
    except TypeError:  # UnicodeDecodeError wants five arguments
        return RuntimeError(f"{error.__name__}: {message}")
