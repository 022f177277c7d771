"""What is in a GGUF file before its weights: metadata, and the place of each tensor."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from typing import Any


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
    gguf = import_gguf()
    tensors: dict[str, Placed] = {}

    class Reader(gguf.GGUFReader):  # type: ignore[name-defined, misc]
        # GGUF's own would not say what is missing, nor where.

        def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **kwargs: Any) -> Any:
            if offset + int(count) * gguf.gguf_reader.np.dtype(dtype).itemsize > size:
                raise ValueError(f"{size:,} bytes end within the header; is it whole?")
            return super()._get(offset, dtype, count, *args, **kwargs)

        def _build_tensors(self, start_offs: int, fields: Any) -> None:
            for field in fields:
                _, _, _, dims, kind, offset = field.parts
                name, kind = field.name, gguf.GGMLQuantizationType(int(kind[0]))
                shape = tuple(int(dim) for dim in reversed(dims))
                block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
                begin, count = start_offs + int(offset[0]), math.prod(shape)
                length = count // block * block_bytes
                if name in tensors:
                    raise ValueError(f"it has the tensor {name!r} twice")
                if shape[-1:] and shape[-1] % block:
                    raise ValueError(f"{name!r} {shape} of {kind.name} has no whole blocks")
                if begin + length > size:
                    raise ValueError(
                        f"{name!r} {shape} of {kind.name} ends at byte {begin + length:,}, but the "
                        f"file has {size:,}; is it whole?"
                    )
                tensors[name] = Placed(kind, shape, begin, length)

    try:
        reader = Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(f"{path} is no GGUF file that can be read: {error}") from error
    if (parts := metadata.get("split.count", 1)) > 1:
        raise ValueError(
            f"{path} is one of {parts} parts; merge them with llama.cpp's `gguf-split --merge`."
        )
    return Header(path, metadata, tensors)
