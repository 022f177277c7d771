"""What is in a GGUF file before its weights: metadata, and the place of each tensor."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO


@dataclasses.dataclass(frozen=True)
class Placed:
    """A tensor of a GGUF file: its quantisation, shape as in NumPy, and place in bytes."""

    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class Header:
    """The metadata and the tensors of a GGUF file, by their names in it."""

    path: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Placed]

    def get(self, key: str, otherwise: Any = None) -> Any:
        """Returns the value of a key of the architecture, e.g. 'block_count' of 'llama.…'."""
        return self.metadata.get(f"{self.architecture}.{key}", otherwise)

    def require(self, key: str) -> Any:
        """Returns the value of a key of the architecture.

        Raises:
          ValueError: if there is none.
        """
        if (value := self.get(key)) is None:
            raise ValueError(f"{self.path}: its metadata lack {self.architecture}.{key}.")
        return value

    @property
    def architecture(self) -> str:
        """The name of the network's family, e.g. 'llama'."""
        return str(self.metadata.get("general.architecture", ""))


def import_gguf() -> Any:
    """Returns the package `gguf`.

    Raises:
      ImportError: if it is not installed; the message has pip's command.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"GGUF needs: pip install 'diffusion_t5x[llm]' ({error})") from error
    return gguf


def read_header(path: str | os.PathLike[str]) -> Header:
    """Reads the header of a file on this machine, once for as long as the file is the same.

    Raises:
      ValueError: if it is no GGUF file, damaged, shorter than its tensors need, or one of several.
    """
    stat = os.stat(path)
    return _read(os.fspath(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read(path: str, size: int, _: int) -> Header:
    with open(path, "rb") as file:
        if (start := file.read(4)) != b"GGUF":
            raise ValueError(f"{path} begins with {start!r}; expected a GGUF file, b'GGUF'.")
        try:
            metadata, tensors = _parse(_Stream(file, size), size)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} is no GGUF file that can be read: {error}") from error
    if (parts := metadata.get("split.count", 1)) > 1:
        raise ValueError(
            f"{path} is one of {parts} parts; merge them with llama.cpp's `gguf-split --merge`."
        )
    return Header(path, metadata, tensors)


class _Stream:
    """The values of a header, one after the other; GGUF's own reader takes a minute for some."""

    # By the numbers of GGUF's types; 8 is a text, 9 a list.
    KINDS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
    TEXT, LIST = 8, 9

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size

    def place(self) -> int:
        """Returns how many bytes are read."""
        return self._file.tell()

    def values(self, kind: str, count: int) -> tuple[Any, ...]:
        """Reads `count` numbers of a kind of `struct`."""
        return struct.unpack(f"<{count}{kind}", self._bytes(count * struct.calcsize(f"<{kind}")))

    def number(self, kind: str) -> Any:
        """Reads a number of a kind of `struct`."""
        return self.values(kind, 1)[0]

    def text(self) -> str:
        """Reads a text."""
        return self._bytes(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """Reads a value of one of GGUF's types."""
        if kind == self.TEXT:
            return self.text()
        if kind == self.LIST:
            inner, count = self.number("I"), self.number("Q")
            if inner in self.KINDS:
                return list(self.values(self.KINDS[inner], count))
            return [self.value(inner) for _ in range(count)]
        return self.number(self.KINDS[kind])

    def _bytes(self, count: int) -> bytes:
        if count > self._size - self.place():
            raise ValueError(f"its {self._size:,} bytes end within the header; is it whole?")
        return self._file.read(count)


def _parse(stream: _Stream, size: int) -> tuple[dict[str, Any], dict[str, Placed]]:
    """Reads what follows the first four bytes.

    Raises:
      ValueError: if the header, or a tensor, is not there as a whole.
      KeyError: if a number stands for no type.
    """
    gguf = import_gguf()
    if (version := stream.number("I")) not in (2, 3):
        raise ValueError(f"its version is {version}; expected 2 or 3, little-endian")
    tensor_count, metadata_count = stream.values("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        name = stream.text()
        metadata[name] = stream.value(stream.number("I"))
    found: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(tensor_count):
        name, dims = stream.text(), stream.values("Q", stream.number("I"))
        found.append((name, dims[::-1], stream.number("I"), stream.number("Q")))
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    start = -(-stream.place() // alignment) * alignment
    tensors: dict[str, Placed] = {}
    for name, shape, number, offset in found:
        kind = gguf.GGMLQuantizationType(number)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        length = math.prod(shape) // block * block_bytes
        end = start + offset + length
        if name in tensors:
            raise ValueError(f"it has the tensor {name!r} twice")
        if shape[-1:] and shape[-1] % block:
            raise ValueError(f"{name!r} {shape} of {kind.name} has no whole blocks of {block}")
        if end > size:
            raise ValueError(
                f"{name!r} {shape} of {kind.name} ends at byte {end:,}, but the file has {size:,}; "
                "is it whole?"
            )
        tensors[name] = Placed(kind, shape, start + offset, length)
    return metadata, tensors
