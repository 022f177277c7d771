"""Values as bytes: no object of one process ever becomes an object of another.

Exact built-in values, and a few of the standard library, are copied. Everything else stays where it
is, and the other side gets its number.
"""

from __future__ import annotations

import importlib
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

_MUTABLE = (list, dict, set, bytearray)
_PURE_MODULES = ("math", "cmath")
# The types that are the same on both sides; another one, such as `type`, could make classes.
_PLAIN_TYPES = (
    int, float, complex, bool, str, bytes, bytearray, list, tuple, dict, set, frozenset, range,
)  # fmt: skip
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


class Reference:
    """An object of the other side, by its number there."""

    __slots__ = ("_number", "_peer")
    _number: int
    _peer: Any

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
        elif (known := _global_name(value, not self._peer.trusting)) is not None:
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


def _global_name(value: Any, trusted: bool) -> tuple[str, str] | None:
    """Module and name of what both sides have: plain types, mathematics, and built-in names.

    Args:
      value: perhaps one of them.
      trusted: whether the other side takes built-in names; else it takes no more than it must.
    """
    if not isinstance(value, type | types.BuiltinFunctionType):
        return None
    module, name = value.__module__, value.__name__
    if module not in ("builtins", *_PURE_MODULES):
        return None
    if module == "builtins" and not trusted and not any(value is kind for kind in _PLAIN_TYPES):
        return None
    return (module, name) if getattr(sys.modules.get(module), name, None) is value else None


_CONSTANTS = {b"N": None, b"T": True, b"F": False, b"E": Ellipsis}
_SIZED: dict[bytes, Callable[[bytes], Any]] = {
    b"i": lambda data: int.from_bytes(data, "little", signed=True),
    b"s": lambda data: data.decode("utf-8", "surrogatepass"),
    b"b": bytes,
}
_SEVERAL: dict[bytes, Callable[[list[Any]], Any]] = {
    b"t": tuple,
    b"z": frozenset,
    b"r": lambda parts: range(*parts),
}


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
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        if tag in _SIZED:
            return _SIZED[tag](self._take(self._number()))
        if tag in _SEVERAL:
            return _SEVERAL[tag](self._items())
        if tag in (b"f", b"c"):
            parts = struct.unpack(
                "<d" if tag == b"f" else "<dd", self._take(8 if tag == b"f" else 16)
            )
            return parts[0] if tag == b"f" else complex(*parts)
        return self._mutable(tag) if tag in b"xyldSB" else self._other(tag, self._items())

    def _mutable(self, tag: bytes) -> Any:
        if tag == b"x":
            return self._table[self._number()]
        if tag == b"y":
            return self._peer.lent(self._number())
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
                plain = module in _PURE_MODULES or any(value is kind for kind in _PLAIN_TYPES)
                if self._peer.trusting or plain:
                    return value
            case b"v", [str(name), tuple(args)] if name in _VALUES:
                module, _, name = name.rpartition(".")
                return getattr(importlib.import_module(module), name)(*args)
            case b"n", [str(name), tuple(fields), tuple(values)]:
                from collections import namedtuple

                return namedtuple(name, fields)(*values)
        return self._peer.borrow(tag, parts)
