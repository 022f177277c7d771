"""Models as Hugging Face's directories (safetensors, `config.json`), and as GGUF files.

Tensors are read one at a time, by the names that the family has in Hugging Face's files.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from diffusion_t5x import paths
from diffusion_t5x.interop.stored_arrays import StoredArray
from diffusion_t5x.names import nearest
from diffusion_t5x.runtime import files

INDEX, WEIGHTS, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
MAX_SHARD_BYTES = 5 * 10**9
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BOOL": np.dtype(bool),
    **{f"{kind[0].upper()}{bits}": np.dtype(f"{kind}{bits}")
       for kind, sizes in (("float", (16, 32, 64)), ("int", (8, 16, 32, 64)),
                           ("uint", (8, 16, 32, 64))) for bits in sizes},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model's files, opened and checked, whose tensors are read on demand.

    Attributes:
      path: The directory or file.
      config: What `config.json` says, or would say.
      arrays: The tensors by Hugging Face's names.
    """

    path: str
    config: Mapping[str, Any]
    arrays: Mapping[str, StoredArray]

    def names(self) -> list[str]:
        """Returns the names of all tensors."""
        return list(self.arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self._array(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Returns the type that `read` gives."""
        return self._array(name).dtype

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor; nothing of it is kept."""
        return self._array(name).read()

    def _array(self, name: str) -> StoredArray:
        if name not in self.arrays:
            near = nearest(name, self.names())
            raise ValueError(f"{self.path} lacks the tensor {name!r}; the nearest is {near!r}.")
        return self.arrays[name]


def open_model(text: str | os.PathLike[str], setting: str) -> ModelFiles:
    """Opens a directory of safetensors, one such file, or a GGUF file, on this machine.

    Headers are read and checked, no weights.

    Args:
      text: The path, as users name it.
      setting: The name of the setting, for errors.

    Raises:
      ValueError: if there is no such model, it is in a bucket, or its files contradict themselves.
    """
    path = paths.as_path(text, setting)
    problem = f"{setting} = {str(path)!r}"
    if paths.is_remote(path):
        raise ValueError(f"{problem} is in a bucket; expected a path on this machine: copy it.")
    if not path.exists():
        raise ValueError(f"{problem} does not exist; expected a directory or a .gguf file.")
    if path.is_dir():
        found = sorted(file.name for file in path.iterdir() if file.is_file())
        return _open_directory(path, _shards(path, found, problem))
    if path.name.endswith(".safetensors"):
        return _open_directory(path.parent, [path.name])
    from diffusion_t5x.interop import gguf_files

    config, arrays = gguf_files.read_model(path)
    return ModelFiles(str(path), config, arrays)


def _shards(path: epath.Path, found: Sequence[str], problem: str) -> list[str]:
    """Returns the names of the files that hold a directory's tensors."""
    if INDEX in found:
        return sorted(set(_weight_map(path / INDEX).values()))
    if WEIGHTS in found:
        return [WEIGHTS]
    if shards := [name for name in found if name.endswith(".safetensors")]:
        return shards
    hints = {
        ".gguf": "name the .gguf file itself",
        ".bin": "pytorch_model.bin is not read: save it with safe_serialization=True",
    }
    hint = next(
        (h for end, h in hints.items() for f in found if f.endswith(end)), f"it has {found}"
    )
    raise ValueError(f"{problem} has no *.safetensors; {hint}.")


def _weight_map(path: epath.Path) -> dict[str, str]:
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not found or not all(map(_is_name, found.values())):
        raise ValueError(f"{path}: expected 'weight_map', {{tensor: name of a file beside it}}.")
    return found


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value == os.path.basename(value) != ""


def read_json(path: epath.Path) -> dict[str, Any]:
    """Returns the object of a JSON file.

    Raises:
      ValueError: if there is no such file, or it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing.") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def _open_directory(path: epath.Path, shards: Sequence[str]) -> ModelFiles:
    config = read_json(path / CONFIG)
    if (quantised := config.get("quantization_config")) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(
            f"{path / CONFIG}: the weights are quantised ({method}); expected plain ones, or a "
            "GGUF file, which is dequantised."
        )
    arrays: dict[str, StoredArray] = {}
    places: dict[str, str] = {}
    for shard in shards:
        if not (path / shard).exists():
            index = f", which {path / INDEX} names," if (path / INDEX).exists() else ""
            raise ValueError(f"{path / shard}{index} is missing; is the download complete?")
        for name, array in _read_header(path / shard).items():
            if name in arrays:
                raise ValueError(f"{path}: {name!r} is in {places[name]} and in {shard}.")
            arrays[name], places[name] = array, shard
    if (path / INDEX).exists():
        wanted = _weight_map(path / INDEX)
        for name in sorted(wanted.keys() ^ places.keys()):
            held, said = places.get(name, "no file"), wanted.get(name, "no file")
            raise ValueError(f"{path / INDEX} has {name!r} in {said}, but it is in {held}.")
    return ModelFiles(str(path), config, arrays)


def _read_header(path: epath.Path) -> dict[str, StoredArray]:
    """Returns the tensors of a safetensors file, after comparing its header with its size."""
    size = path.stat().length
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= size - 8:
            raise ValueError(
                f"{path} is no safetensors file, or not whole: it has {size:,} bytes, and begins "
                f"with {start!r}; expected the length of a header that it contains."
            )
        content = file.read(length)
    try:
        header = json.loads(content, object_pairs_hook=_once)
        header.pop("__metadata__", None)
        entries = {
            name: (one["dtype"], tuple(map(int, one["shape"])), *map(int, one["data_offsets"]))
            for name, one in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file: its header: {error}") from error
    arrays = {}
    for name, (kind, shape, begin, end) in entries.items():
        if kind not in DTYPES:
            raise ValueError(f"{path}: {name!r} has the type {kind}; expected one of {[*DTYPES]}.")
        if end - begin != math.prod(shape) * DTYPES[kind].itemsize:
            raise ValueError(
                f"{path}: {name!r} {shape} of {kind} takes {end - begin:,} bytes; expected "
                f"{math.prod(shape) * DTYPES[kind].itemsize:,}."
            )
        if begin < 0 or end > size - 8 - length:
            raise ValueError(
                f"{path}: {name!r} ends at byte {8 + length + end:,}, but the file has {size:,}; "
                "is the download complete?"
            )
        read = functools.partial(_read_tensor, os.fspath(path), name)
        arrays[name] = StoredArray(name, shape, DTYPES[kind], read)
    return arrays


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in found if names.count(n) > 1)!r} is there twice")
    return found


def _read_tensor(path: str, name: str) -> np.ndarray:
    """Reads a tensor and closes the file, which is mapped into memory as long as it is open."""
    safetensors = _import_safetensors()
    try:
        with safetensors.safe_open(path, "np") as file:
            return file.get_tensor(name)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: {name!r} cannot be read: {error}") from error


def _import_safetensors() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(f"needs: pip install 'diffusion_t5x[llm]' ({error})") from error
    return safetensors


def check_destination(directory: epath.Path) -> None:
    """Raises FileExistsError if a directory to write a model into has something in it."""
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty; expected a new directory.")


def write_model(
    directory: epath.Path,
    arrays: Mapping[str, StoredArray],
    config: Mapping[str, Any],
    other_files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    config_name: str = CONFIG,
) -> None:
    """Writes safetensors of at most `max_shard_bytes`, their index and `config.json`.

    Tensors are read one at a time. On this machine the directory appears when all is written; in a
    bucket `config.json`, without which nothing is read, comes last.

    Args:
      config_name: Another name for the file of `config`, where the directory is not a family's.
      other_files: Name and content of further files, such as the tokenizer's.

    Raises:
      FileExistsError: if the directory has something in it.
      ValueError: if a tensor is of a type that the format does not have, or larger than a file may
        be.
    """
    check_destination(directory)
    shards = _divide(arrays, max_shard_bytes)
    remote = paths.is_remote(directory)
    target = directory if remote else directory.with_name(f"{directory.name}.tmp")
    if not remote:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [WEIGHTS]
    for name, shard in zip(names, shards, strict=True):
        with files.writing(target / name) as file:
            file.writelines(_encode(shard))
    texts: dict[str, bytes] = dict(other_files or {})
    if len(shards) > 1:
        where = {
            tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        total = sum(_bytes(array) for array in arrays.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        texts[INDEX] = _json(index)
    for name, content in [*texts.items(), (config_name, _json(config))]:
        files.write_atomically(target / name, content)
    if not remote:
        if directory.exists():
            directory.rmdir()
        target.rename(directory)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _bytes(array: StoredArray) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def _divide(
    arrays: Mapping[str, StoredArray], max_shard_bytes: int
) -> list[dict[str, StoredArray]]:
    """Divides tensors, in their order, into shards; inside, wide types come first: aligned."""
    shards: list[dict[str, StoredArray]] = [{}]
    room = max_shard_bytes
    for name, array in arrays.items():
        if array.dtype not in DTYPES.values():
            raise ValueError(f"{name!r} is {array.dtype}, which safetensors do not have.")
        if (size := _bytes(array)) > max_shard_bytes:
            raise ValueError(
                f"max_shard_bytes = {max_shard_bytes:,}, but {name!r} alone has {size:,} bytes."
            )
        if size > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = array
        room -= size
    return [
        dict(sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize)) for shard in shards
    ]


def _encode(shard: Mapping[str, StoredArray]) -> Iterator[bytes | memoryview]:
    """Yields the parts of a safetensors file: the library wants all tensors at once."""
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in shard.items():
        begin, end = end, end + _bytes(array)
        header[name] = {
            "dtype": kinds[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name, array in shard.items():
        values = array.read()
        if values.shape != array.shape or values.dtype != array.dtype:
            raise ValueError(
                f"{name!r} is {values.dtype} {values.shape}; expected {array.dtype} {array.shape}."
            )
        yield np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
