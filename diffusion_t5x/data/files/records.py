"""The cache of checked records: in the order of users' files, and dealt into shards for shuffling.

A directory of the cache has files of TensorFlow's record format and `summary.json`: what was
counted, and the size and checksum of each file. It appears whole or not at all. What is damaged is
named and made again. Files are parsed and shards are sorted by as many processes as there are
cores; the result does not depend on how many. Like `lines`, this module imports no TensorFlow.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import functools
import hashlib
import json
import os
import pathlib
import shutil
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from diffusion_t5x.data.embedded import file_cache
from diffusion_t5x.data.files.lines import Batch
from diffusion_t5x.data.files.readers import Reader, Record, Refusal, parse

# Raise it whenever the records of the same file change.
FORMAT_VERSION = 2
REASONS_SHOWN = 3
# Fewer records are shuffled by SeqIO's buffer alone.
SHUFFLED_BY_SEQIO = 1000
RECORDS_PER_SHARD, BYTES_PER_SHARD = 64, 64 * 2**20  # at least, and about
USUAL_SHARDS, MOST_SHARDS = 256, 1024
# Below, one process is faster than starting others.
PARALLEL_BYTES = 8 * 2**20
BUFFER_BYTES = 64 * 2**20
# Up to this size checksums are compared at each start; beyond it sizes alone.
VERIFIED_BYTES = 64 * 2**20
SECONDS_BETWEEN_LINES = 10.0


class Checked(NamedTuple):
    """The outcome of reading corresponding files."""

    path: str  # of their records, in their order
    records: int
    refused: int
    refusals: list[str]  # the first few, with file, line and reason
    bytes: int
    key: str  # of what the records depend on


def check_files(
    reader: Reader,
    files: tuple[str, ...],
    versions: Sequence[Sequence[Any]],
    split: str | None = None,
    progress: Progress | None = None,
) -> Checked:
    """Reads corresponding files once, and keeps their good records, or one split's, in the cache.

    Args:
      versions: Name, size and time of change of each file.
      progress: Shows how much is read.

    Raises:
      ValueError: if a file cannot be read as a whole; see `readers`.
    """
    size = sum(version[1] for version in versions)
    progress = progress or Progress(size)

    def make(directory: pathlib.Path) -> dict[str, Any]:
        kept = refused = 0
        refusals: list[str] = []
        with open(directory / "records.tfrecord", "wb") as out:
            jobs = ((reader, batch, split) for batch in reader.batches(files))
            for parsed in _each(_parse, jobs, parallel=size >= PARALLEL_BYTES):
                out.write(parsed.frames)
                kept, refused = kept + parsed.records, refused + parsed.refused
                refusals += parsed.refusals[: REASONS_SHOWN - len(refusals)]
                progress.show(" and ".join(files), parsed.read, kept + refused)
        return {"records": kept, "refused": refused, "refusals": refusals}

    key = json.dumps([FORMAT_VERSION, repr(reader), split, versions])
    directory, found = _cached(key, make, " and ".join(files))
    progress.finish(size)
    [(name, (length, _))] = found["files"].items()
    path = str(directory / name)
    return Checked(path, found["records"], found["refused"], found["refusals"], length, key)


def shard_names(parts: Sequence[Checked]) -> list[str]:
    """Returns the names of the shards that `deal` makes; a single one if there is none to make."""
    records, size = sum(part.records for part in parts), sum(part.bytes for part in parts)
    if records <= SHUFFLED_BY_SEQIO:
        return ["00000-of-00001.tfrecord"]
    wanted = max(min(USUAL_SHARDS, records // RECORDS_PER_SHARD), size // BYTES_PER_SHARD)
    count = 2 ** (min(wanted, MOST_SHARDS).bit_length() - 1)
    return [f"{shard:05}-of-{count:05}.tfrecord" for shard in range(count)]


def deal(parts: Sequence[Checked], name: str) -> list[str]:
    """Deals records into shards, once, and returns the paths of the shards.

    Of as many consecutive records as there are shards each shard gets one, by a hash of their
    place, and it keeps its records in the order of another. So the beginning of every shard spans
    all files, in their proportions, and so does any other part of it.
    """
    names = shard_names(parts)

    def make(directory: pathlib.Path) -> dict[str, Any]:
        started = time.monotonic()
        buffers: list[list[bytes]] = [[] for _ in names]
        size = 0

        def flush() -> None:
            for shard, buffer in zip(names, buffers, strict=True):
                with open(directory / shard, "ab") as file:
                    file.writelines(buffer)
                buffer.clear()

        frames = (frame for part in parts for frame in _frames(part.path))
        for frame, shard in zip(frames, _shards(len(names)), strict=False):
            buffers[shard].append(frame)
            size += len(frame)
            if size >= BUFFER_BYTES:
                flush()
                size = 0
        flush()
        parallel = sum(part.bytes for part in parts) >= PARALLEL_BYTES
        jobs = ((str(directory / shard), number) for number, shard in enumerate(names))
        for _ in _each(_sort, jobs, parallel):
            pass
        records = sum(part.records for part in parts)
        seconds = time.monotonic() - started
        print(f"{name}: dealt {records:,} records into {len(names)} shards, {seconds:.1f} s")
        return {}

    key = json.dumps([FORMAT_VERSION, "dealt", [part.key for part in parts]])
    directory, _ = _cached(key, make, f"the shards of {name}")
    return [str(directory / shard) for shard in names]


class Progress:
    """A line about the files that are read, every `SECONDS_BETWEEN_LINES`, with the time left."""

    def __init__(self, total: int):
        self._total, self._before, self._worked = total, 0, 0
        self._started = self._shown = time.monotonic()

    def show(self, name: str, read: int, records: int) -> None:
        """Counts bytes read and records of the present files."""
        if time.monotonic() - self._shown < SECONDS_BETWEEN_LINES:
            return
        self._shown = time.monotonic()
        done, seconds = self._worked + read, self._shown - self._started
        left = (self._total - self._before - read) * seconds / max(done, 1)
        print(
            f"checking {name}: {records:,} records, {(self._before + read) / self._total:.0%} of "
            f"all bytes, {done / seconds / 1e6:.3g} MB/s, "
            f"{datetime.timedelta(seconds=round(left))} left",
            file=sys.stderr,
            flush=True,
        )

    def finish(self, size: int) -> None:
        """Counts files as done, whether they were read or known."""
        self._before += size
        self._worked += size


def _cached(
    key: str, make: Callable[[pathlib.Path], dict[str, Any]], name: str
) -> tuple[pathlib.Path, Mapping[str, Any]]:
    """Returns a directory of the cache and its summary; `make` fills it unless it is whole."""
    digest = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
    directory = file_cache.cache_dir() / "local_files" / digest
    if os.path.lexists(directory):
        try:
            return directory, _verified(directory)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{directory}, the records of {name}, is damaged ({error}); it is made again.")
            if directory.is_dir() and not directory.is_symlink():
                shutil.rmtree(directory)
            else:
                directory.unlink()
    _remove_leftovers(directory.parent)
    temporary = directory.with_name(f"{digest}.{socket.gethostname()}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        content = make(temporary)
        content["files"] = {
            file.name: [file.stat().st_size, file_cache.checksum(file)]
            for file in sorted(temporary.iterdir())
        }
        text = json.dumps(content, sort_keys=True)
        summary = {"content": content, "checksum": zlib.crc32(text.encode())}
        (temporary / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        with contextlib.suppress(OSError):  # another process was first, with the same
            os.rename(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory, _verified(directory)


def _verified(directory: pathlib.Path) -> Mapping[str, Any]:
    """Returns the summary of a directory; an error says what is wrong with it or its files."""
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    content: Mapping[str, Any] = summary["content"]
    if zlib.crc32(json.dumps(content, sort_keys=True).encode()) != summary["checksum"]:
        raise ValueError("summary.json has another checksum")
    total = sum(size for size, _ in content["files"].values())
    for name, (size, checksum) in content["files"].items():
        if (found := (directory / name).stat().st_size) != size:
            raise ValueError(f"{name} has {found:,} bytes, expected {size:,}")
        if total <= VERIFIED_BYTES and file_cache.checksum(directory / name) != checksum:
            raise ValueError(f"{name} has another checksum")
    return content


def _remove_leftovers(parent: pathlib.Path) -> None:
    """Removes what processes of this machine left that were killed."""
    for path in parent.glob(f"*.{socket.gethostname()}.*.tmp"):
        pid = int(path.name.split(".")[-2])
        try:
            if pid != os.getpid():
                os.kill(pid, 0)
                continue
        except ProcessLookupError:
            pass
        except PermissionError:  # another user's process
            continue
        shutil.rmtree(path, ignore_errors=True)


def _each(function: Callable[..., Any], jobs: Iterable[tuple], parallel: bool) -> Iterator[Any]:
    """Yields `function(*job)` for each job, in order, by all cores if `parallel`."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not parallel or not workers or workers == 1:
        yield from (function(*job) for job in jobs)
        return
    import loky  # whose processes do not import the main module, as those of Python itself do

    pool = loky.get_reusable_executor(
        max_workers=workers, timeout=30, initializer=_end_with, initargs=(os.getpid(),)
    )
    waiting: collections.deque[Any] = collections.deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(function, *job))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _end_with(parent: int) -> None:
    """Ends this process when its parent has ended, by whatever signal."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Parsed(NamedTuple):
    frames: bytes
    records: int
    refused: int
    refusals: list[str]
    read: int


def _parse(reader: Reader, batch: Batch, split: str | None) -> _Parsed:
    frames, refused, refusals = [], 0, []
    for item in parse(reader, batch, split):
        if isinstance(item, Refusal):
            refused += 1
            if refused <= REASONS_SHOWN:
                refusals.append(str(item))
        else:
            frames.append(_frame(encode(item)))
    return _Parsed(b"".join(frames), len(frames), refused, refusals, batch.read)


@functools.lru_cache(2**15)
def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def _field(tag: bytes, value: bytes) -> bytes:
    """Encodes a field of bytes in the wire format of protocol buffers."""
    return tag + _varint(len(value)) + value


@functools.lru_cache
def _name(name: str) -> bytes:
    return _field(b"\x0a", name.encode())


def encode(record: Record) -> bytes:
    """Serialises a record as a `tf.train.Example`."""
    entries = []
    for name, value in record.items():
        texts = [value] if isinstance(value, str) else value
        values = b"".join(_field(b"\x0a", text.encode()) for text in texts)
        feature = _field(b"\x0a", values)  # the first of its kinds: bytes
        entries.append(_field(b"\x0a", _name(name) + _field(b"\x12", feature)))
    return _field(b"\x0a", b"".join(entries))


def _masked(data: bytes) -> int:
    checksum = google_crc32c.value(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


@functools.lru_cache(2**15)
def _head(size: int) -> bytes:
    length = struct.pack("<Q", size)
    return length + struct.pack("<I", _masked(length))


def _frame(data: bytes) -> bytes:
    """Frames a record as TensorFlow's record files do: length, data, and a checksum of each."""
    return _head(len(data)) + data + struct.pack("<I", _masked(data))


def _frames(path: str) -> Iterator[bytes]:
    """Yields the framed records of a file."""
    with open(path, "rb") as file:
        while head := file.read(12):
            yield head + file.read(struct.unpack_from("<Q", head)[0] + 4)


def _hash(numbers: np.ndarray) -> np.ndarray:
    """Hashes uint64 numbers (splitmix64), equally on all machines and by all versions."""
    x = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _shards(count: int) -> Iterator[int]:
    """Yields without end the shard of each record: each block of `count` is a permutation."""
    start, blocks = 1, max(1, 2**16 // count)
    while True:
        numbers = np.arange(start, start + blocks * count, dtype=np.uint64).reshape(blocks, count)
        yield from np.argsort(_hash(numbers), axis=1).ravel().tolist()
        start += blocks * count


def _sort(path: str, shard: int) -> None:
    """Puts the records of a shard into the order of a hash of their places."""
    frames = list(_frames(path))
    places = np.arange(len(frames), dtype=np.uint64) + (np.uint64(shard + 1) << np.uint64(40))
    with open(path, "wb") as file:
        file.writelines(frames[place] for place in np.argsort(_hash(places)).tolist())
