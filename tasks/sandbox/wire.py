"""Values over a pipe, as data: no object of one process ever becomes an object of the other.

A message is a length and one encoded value. Exact built-in values, and a few of the standard
library, are copied. Everything else stays where it is, and the other side gets its number.
"""

from __future__ import annotations

import builtins
import importlib
import os
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

MAX_MESSAGE = 2**26  # bytes
_MUTABLE = (list, dict, set, bytearray)
_PURE_MODULES = ("math", "cmath")
# Values of the standard library that are copied: how to make each again.
_VALUES: dict[str, Callable[[Any], tuple]] = {
    "decimal.Decimal": lambda v: (str(v),),
    "fractions.Fraction": lambda v: (v.numerator, v.denominator),
    "datetime.date": lambda v: (v.year, v.month, v.day),
    "datetime.timedelta": lambda v: (v.days, v.seconds, v.microseconds),
    "collections.Counter": lambda v: (dict(v),),
    "collections.OrderedDict": lambda v: (list(v.items()),),
    "collections.defaultdict": lambda v: (None, dict(v)),
    "collections.deque": lambda v: (list(v), v.maxlen),
    "array.array": lambda v: (v.typecode, v.tolist()),
}
# What an instance of a class derived from one of these is, apart from that class.
_BASES: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (int, int.__pos__),
    (float, float.__pos__),
    (complex, complex.__pos__),
    (str, str.__str__),
    (bytes, lambda v: bytes.__getitem__(v, slice(None))),
    (tuple, lambda v: tuple.__getitem__(v, slice(None))),
    (frozenset, lambda v: frozenset(frozenset.__iter__(v))),
)


class BadMessage(Exception):
    """The other side sent what no value is encoded as."""


class Gone(BaseException):
    """The other side has ended; no assertion may catch this as if it were a program's error."""


class Reference:
    """An object of the other side, by its number there."""

    __slots__ = ("_number", "_peer")

    def __init__(self, peer: Any, number: int):
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)


def contents(container: Any) -> Any:
    """The items of a mutable container, as a tuple or as bytes."""
    if isinstance(container, dict):
        return tuple(dict.items(container))
    return bytes(container) if isinstance(container, bytearray) else tuple(container)


def refill(container: Any, items: Any) -> None:
    """Gives a container of this side other items."""
    container.clear()
    if isinstance(container, set | dict):
        container.update(items)
    else:
        container.extend(items)


class Encoder:
    """Encodes one value.

    Mutable containers are numbered in the order of `table`, which both sides keep in step, so that
    one that occurs twice, or comes back, is the same one again.
    """

    def __init__(self, peer: Any, table: list[Any]):
        self._peer, self._table = peer, table
        self._numbers = {id(container): index for index, container in enumerate(table)}
        self.out = bytearray()

    def _sized(self, tag: bytes, data: bytes) -> None:
        self.out += tag + struct.pack("<I", len(data)) + data

    def _items(self, tag: bytes, values: Any) -> None:
        values = tuple(values)
        self.out += tag + struct.pack("<I", len(values))
        for value in values:
            self.encode(value)

    def encode(self, value: Any) -> None:
        """Appends `value` to `out`.

        Raises:
          TypeError: if it can neither be copied nor lent.
        """
        kind = type(value)
        if value is None or kind is bool or value is Ellipsis:
            self.out += {None: b"N", True: b"T", False: b"F", Ellipsis: b"E"}[value]
        elif kind is int:
            size = (value.bit_length() + 8) // 8
            self._sized(b"i", value.to_bytes(size, "little", signed=True))
        elif kind is float:
            self.out += b"f" + struct.pack("<d", value)
        elif kind is complex:
            self.out += b"c" + struct.pack("<dd", value.real, value.imag)
        elif kind is str:
            self._sized(b"s", value.encode("utf-8", "surrogatepass"))
        elif kind is bytes:
            self._sized(b"b", value)
        elif kind is tuple or kind is frozenset:
            self._items(b"t" if kind is tuple else b"z", value)
        elif kind is range:
            self._items(b"r", (value.start, value.stop, value.step))
        elif kind in _MUTABLE:
            self._container(kind, value)
        else:
            self._other(kind, value)

    def _container(self, kind: type, value: Any) -> None:
        if id(value) in self._numbers:
            self.out += b"x" + struct.pack("<I", self._numbers[id(value)])
            return
        self._numbers[id(value)] = len(self._table)
        self._table.append(value)
        if kind is bytearray:
            self._sized(b"B", bytes(value))
        elif kind is dict:
            self._items(b"d", (part for item in value.items() for part in item))
        else:
            self._items(b"l" if kind is list else b"S", value)

    def _other(self, kind: type, value: Any) -> None:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if isinstance(value, Reference):
            self.out += b"y" + struct.pack("<I", value._number)
        elif isinstance(value, types.ModuleType):
            self._items(b"m", (value.__name__,))
        elif (known := _global_name(value)) is not None:
            self._items(b"g", known)
        elif name in _VALUES and getattr(sys.modules.get(kind.__module__), kind.__name__) is kind:
            self._items(b"v", (name, _VALUES[name](value)))
        elif issubclass(kind, tuple) and hasattr(kind, "_fields"):
            self._items(b"n", (kind.__name__, tuple(kind._fields), tuple(value)))
        elif base := next((copy for base, copy in _BASES if issubclass(kind, base)), None):
            self.encode(base(value))
        else:
            tag, parts = self._peer.lend(value)
            self._items(tag, parts)


def _global_name(value: Any) -> tuple[str, str] | None:
    """Module and name of a built-in type or function, or of a function of mathematics."""
    if not isinstance(value, type | types.BuiltinFunctionType):
        return None
    module, name = value.__module__, value.__name__
    if module in ("builtins", *_PURE_MODULES):
        return (module, name) if getattr(sys.modules.get(module), name, None) is value else None
    return None


class Decoder:
    """Decodes one value; see `Encoder`."""

    def __init__(self, peer: Any, table: list[Any], data: bytes):
        self._peer, self._table, self._data, self._at = peer, table, data, 0

    def _take(self, size: int) -> bytes:
        if self._at + size > len(self._data):
            raise BadMessage("it ends too early")
        self._at += size
        return self._data[self._at - size : self._at]

    def _number(self) -> int:
        return struct.unpack("<I", self._take(4))[0]

    def _items(self) -> list[Any]:
        return [self.decode() for _ in range(self._number())]

    def decode(self) -> Any:
        """The next value.

        Raises:
          BadMessage: if there is none.
        """
        tag = self._take(1)
        match tag:
            case b"N" | b"T" | b"F" | b"E":
                return {b"N": None, b"T": True, b"F": False, b"E": Ellipsis}[tag]
            case b"i":
                return int.from_bytes(self._take(self._number()), "little", signed=True)
            case b"f":
                return struct.unpack("<d", self._take(8))[0]
            case b"c":
                return complex(*struct.unpack("<dd", self._take(16)))
            case b"s":
                return self._take(self._number()).decode("utf-8", "surrogatepass")
            case b"b":
                return self._take(self._number())
            case b"t":
                return tuple(self._items())
            case b"z":
                return frozenset(self._items())
            case b"r":
                return range(*self._items())
            case b"x":
                return self._table[self._number()]
            case b"l" | b"d" | b"S" | b"B":
                return self._container(tag)
            case b"y":
                return self._peer.lent(self._number())
        return self._other(tag, self._items())

    def _container(self, tag: bytes) -> Any:
        container: Any = {b"l": list, b"d": dict, b"S": set, b"B": bytearray}[tag]()
        self._table.append(container)
        if tag == b"B":
            container += self._take(self._number())
        elif tag == b"d":
            items = iter(self._items())
            container.update(zip(items, items, strict=True))
        else:
            refill(container, self._items())
        return container

    def _other(self, tag: bytes, parts: list[Any]) -> Any:
        match tag, parts:
            case b"m", [str(name)] if name.partition(".")[0] in sys.stdlib_module_names:
                return importlib.import_module(name)
            case b"g", [str(module), str(name)] if module in ("builtins", *_PURE_MODULES):
                value = getattr(importlib.import_module(module), name)
                # A function is called where it was named; types and mathematics do no harm.
                if self._peer.trusting or isinstance(value, type) or module in _PURE_MODULES:
                    return value
            case b"v", [str(name), tuple(args)] if name in _VALUES:
                module, _, name = name.rpartition(".")
                return getattr(importlib.import_module(module), name)(*args)
            case b"n", [str(name), tuple(fields), tuple(values)]:
                from collections import namedtuple

                return namedtuple(name, fields)(*values)
        return self._peer.borrow(tag, parts)


class Peer:
    """One end of the pipe: asks the other side, and answers it while it waits.

    Attributes:
      trusting: whether the other side may have things made here that are more than data.
    """

    trusting = False

    def __init__(self, reader: int, writer: int):
        self._reader, self._writer = reader, writer
        self._lent: list[Any] = []
        self._numbers: dict[int, int] = {}

    def answer(self, operation: str, *args: Any) -> Any:
        """Does what the other side asks for."""
        raise NotImplementedError

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
    return len(items) == len(others) and len(flat) == len(flat2) and all(
        one is other for one, other in zip(flat, flat2, strict=True)
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
