"""Paths that users name: on this machine, or in a bucket of Google's (gs://) or Amazon's (s3://).

All are `epath.Path`s. Buckets are read and written through fsspec's gcsfs and s3fs, and arrays
through TensorStore. An object store has no directories to create or rename, and no appending: an
object is written as a whole, and appears when it is complete.
"""

from __future__ import annotations

import os
import pathlib
import posixpath
import re
import tempfile
import threading
import urllib.parse
import uuid
from collections.abc import Callable
from typing import Any

import fsspec
from etils import epath
from etils.epath import gpath

# Otherwise etils would use TensorFlow's file systems, and TensorFlow's wheel has none for buckets.
os.environ.setdefault("EPATH_USE_TF", "false")
gpath._is_tf_installed.cache_clear()  # importing SeqIO asks it
if host := os.environ.get("STORAGE_EMULATOR_HOST"):  # gcsfs reads this; TensorStore has its own
    os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", host)
    # Else gcsfs asks Google itself for the kind of a bucket.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

# The library that reads each kind of bucket, which is also the name of an extra of this package.
LIBRARIES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# Other processes write to the same buckets.
for _protocol in ("gs", "gcs", "s3"):
    fsspec.config.conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)
_EXPECTED = "expected a path on this machine, file:///PATH, gs://BUCKET/PATH or s3://BUCKET/PATH"
# Libraries and tools take these for patterns, or for the version of an object.
_SPECIAL = "*?[]#"
SECONDS = 20.0  # that a bucket may take to answer, once its library is loaded


class StorageError(OSError):
    """A bucket cannot be read or written; the message names setting, path and cause."""


def as_path(text: str | os.PathLike[str], setting: str, *, pattern: bool = False) -> epath.Path:
    """Returns the path that a user's text names; local ones become absolute, and `~` the home.

    Args:
      text: A path on this machine, or one that begins with file://, gs:// or s3://.
      setting: The name of the setting, for errors.
      pattern: True if the text may be a glob.

    Raises:
      ValueError: if the text is empty, has another scheme, or cannot be the name of an object.
    """
    if not isinstance(text, str | os.PathLike):
        raise ValueError(f"{setting} = {text!r}; {_EXPECTED}.")
    name = os.fspath(text)
    if not name.strip():
        raise ValueError(f"{setting} = {name!r} is empty; {_EXPECTED}. Is a shell variable unset?")
    problem = f"{setting} = {name!r}"
    if not name.isprintable():
        raise ValueError(f"{problem} has a character that cannot be printed; {_EXPECTED}.")
    scheme, separator, rest = name.partition("://")
    if not separator:
        if re.match(r"(?i)(gs|s3|file):", name):
            raise ValueError(f"{problem} lacks the two slashes of a scheme; {_EXPECTED}.")
        return _local(name, problem)
    if scheme == "file":
        host, slash, rest = rest.partition("/")
        if not slash or host not in ("", "localhost"):
            raise ValueError(f"{problem} names another host; {_EXPECTED}.")
        return _local(urllib.parse.unquote(f"/{rest}"), problem)
    if scheme not in LIBRARIES:
        raise ValueError(f"{problem} has the unknown scheme {scheme!r}; {_EXPECTED}.")
    return _remote(scheme, rest, problem, pattern)


def _local(name: str, problem: str) -> epath.Path:
    try:
        path = pathlib.Path(name).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{problem}: {error} A name that begins with ~ is ./~NAME.") from error
    if ".." in path.parts:
        path = path.parent.resolve() / path.name if path.name != ".." else path.resolve()
    return epath.Path(path)


def _remote(scheme: str, rest: str, problem: str, pattern: bool) -> epath.Path:
    bucket, _, key = rest.partition("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
        raise ValueError(f"{problem} has no valid bucket {bucket!r}; {_EXPECTED}.")
    special = sorted(set(key) & set(_SPECIAL)) if not pattern else []
    if special:
        raise ValueError(
            f"{problem} has {' '.join(special)}, which tools of buckets take for patterns or "
            "versions; choose another name."
        )
    key = posixpath.normpath(f"./{key}")
    if key.split("/")[0] == "..":
        raise ValueError(f"{problem} leads out of its bucket; {_EXPECTED}.")
    return epath.Path(f"{scheme}://{bucket}") / key


def glob(pattern: str, setting: str) -> list[str]:
    """Returns the objects of a bucket that match a pattern, or the one of that very name.

    Raises:
      StorageError: as `readable` does.
    """
    directory = re.split(r"/[^/]*[*?[]", pattern)[0]
    readable(directory, setting)
    files = file_system(pattern)
    if files.isfile(pattern):
        return [pattern]
    found = files.glob(pattern, detail=True)
    scheme = split(pattern)[0]
    return [f"{scheme}://{name}" for name, info in found.items() if info["type"] == "file"]


def version(path: str) -> list[Any]:
    """Returns size and version of an object; another content has another version."""
    info = file_system(path).info(path)
    keys = ("etag", "ETag", "md5Hash", "generation", "mtime", "LastModified")
    return [info["size"], next(str(info[key]) for key in keys if info.get(key))]


def expand(text: str, setting: str, *, pattern: bool = False) -> str:
    """Returns a local path or pattern without `~` as it is, and others as `as_path` reads them."""
    plain = text.strip() and "://" not in text and not text.startswith("~")
    return text if plain else str(as_path(text, setting, pattern=pattern))


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is in a bucket."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in LIBRARIES))


def split(path: str | os.PathLike[str]) -> tuple[str, str, str]:
    """Returns scheme, bucket and key of a path in a bucket; the key has no slash at its ends."""
    scheme, _, rest = os.fspath(path).partition("://")
    bucket, _, key = rest.partition("/")
    return scheme, bucket, key.strip("/")


def file_system(path: str | os.PathLike[str]) -> Any:
    """Returns fsspec's file system of a path in a bucket.

    Raises:
      ImportError: as `_load_library` does.
    """
    return _load_library(path)()


def _load_library(path: str | os.PathLike[str]) -> type[fsspec.AbstractFileSystem]:
    """Imports the library that reads a bucket.

    Raises:
      ImportError: if it is not installed; the message has pip's command.
    """
    scheme = split(path)[0]
    try:
        return fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        library, extra = LIBRARIES[scheme]
        raise ImportError(
            f"{scheme}:// needs {library}: pip install 'diffusion_t5x[{extra}]' ({error})"
        ) from error


def kvstore(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns TensorStore's spec of an absolute path, without a slash at its end."""
    if not is_remote(path):
        return {"driver": "file", "path": os.fspath(path)}
    scheme, bucket, key = split(path)
    driver = "gcs" if scheme == "gs" else scheme
    spec: dict[str, Any] = {"driver": driver, "bucket": bucket, "path": key}
    if scheme == "s3" and "AWS_ACCESS_KEY_ID" in os.environ:
        spec["aws_credentials"] = {"type": "environment"}  # nor are files looked for, and missed
    if scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
        spec |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_REGION", "us-east-1")}
    return spec


def readable(text: str | os.PathLike[str], setting: str) -> epath.Path:
    """Returns `as_path`, after a look into its bucket, if it has one; it need not exist.

    Raises:
      ValueError: as `as_path` does.
      StorageError: if there is no such bucket, no permission, or no answer.
    """

    path = as_path(text, setting)

    def look() -> None:
        files, (scheme, bucket, _) = file_system(path), split(path)
        try:
            files.info(str(path))
        except FileNotFoundError:
            files.info(f"{scheme}://{bucket}")

    if is_remote(path):
        _within_seconds(look, path, f"{setting} = {str(path)!r} cannot be read")
    return path


def writable(text: str | os.PathLike[str], setting: str) -> epath.Path:
    """Returns the directory `as_path`, after a try to write to it; it need not exist.

    In a bucket an object is written, and removed; on this machine a file without a name.

    Raises:
      ValueError: as `as_path` does.
      StorageError: if it is no directory, or there is no such bucket, permission or answer.
    """
    path = as_path(text, setting)
    problem = f"{setting} = {str(path)!r} cannot be written to"
    if is_remote(path):

        def write() -> None:
            files, name = file_system(path), f"{path}/.write_probe-{uuid.uuid4().hex}"
            files.pipe_file(name, b"written and removed to see whether it can be\n")
            files.rm_file(name)

        _within_seconds(write, path, problem)
        return path
    directory = path
    while not os.path.lexists(directory):
        directory = directory.parent
    if not directory.is_dir():
        raise StorageError(f"{problem}: {directory} is not a directory.")
    try:
        tempfile.TemporaryFile(dir=directory).close()  # which has no name
    except OSError as error:
        raise StorageError(f"{problem}: {error.strerror} ({directory}).") from error
    return path


def _within_seconds(work: Callable[[], None], path: epath.Path, problem: str) -> None:
    """Does `work` in a thread that is left behind if a library tries again for minutes."""
    try:
        _load_library(path)  # which may itself take seconds on a busy machine
    except ImportError as error:
        raise StorageError(f"{problem}: {error}.") from error
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS)
    bucket = split(path)[1]
    if thread.is_alive():
        cause = f"no answer within {SECONDS:g} seconds. Check network and credentials"
    elif not failures:
        return
    elif isinstance(failures[0], FileNotFoundError):
        cause = f"there is no bucket {bucket!r}, or it is not yours"
    else:
        words = f"{type(failures[0]).__name__}: {str(failures[0]).strip()[:500]}"
        cause = f"{words}. Check credentials and the permissions on the bucket {bucket!r}"
    raise StorageError(f"{problem}: {cause}.") from (failures[0] if failures else None)
