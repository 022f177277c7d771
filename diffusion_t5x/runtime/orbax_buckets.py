"""Makes Orbax treat s3:// as it treats gs://, and both as the object stores that they are.

Orbax writes the arrays of a checkpoint in place there, and marks one that is complete by a file,
since a directory of a bucket cannot be renamed at once. It does so for gs:// alone, asks Google's
API for the kind of a bucket, which few accounts may, and cuts keys as if they were URLs. Here the
few functions of Orbax that know gs:// are replaced; fsspec does the rest.
"""

from __future__ import annotations

import json
import os

from etils import epath
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from diffusion_t5x import paths

# The file that marks a complete checkpoint in a bucket, and Orbax's own description of one.
COMMIT = "commit_success.txt"
_METADATA = "_CHECKPOINT_METADATA"


def rmtree(path: epath.Path, *, missing_ok: bool = False) -> None:
    """Deletes a directory of a bucket, what makes it complete first: what is left is nothing."""
    path = epath.Path(path)
    for name in (_METADATA, COMMIT):
        (path / name).unlink(missing_ok=True)
    path.rmtree(missing_ok=missing_ok)


def _normalized(path: str) -> str:
    return path.rstrip("/") if paths.is_remote(path) else os.path.normpath(path)


gcs_utils._GCS_PATH_PREFIX = tuple(f"{scheme}://" for scheme in paths.LIBRARIES)
gcs_utils.get_kvstore_for_gcs = paths.kvstore
gcs_utils.is_hierarchical_namespace_enabled = lambda path: False
gcs_utils.rmtree = rmtree
tensorstore_utils._use_gcs_driver = paths.is_remote
tensorstore_utils._normalize_path = _normalized


def is_complete(directory: epath.Path) -> bool:
    """Returns whether a checkpoint of ours, or an item of one, was written to its end.

    On this machine its name says so. In a bucket it has a mark, unless it was copied there: then
    its description, the last file but the mark, has the time at which it was complete.
    """
    if not paths.is_remote(directory) or (directory / COMMIT).exists():
        return True
    try:
        described = json.loads((directory / _METADATA).read_text())
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(described, dict) and bool(described.get("commit_timestamp_nsecs"))


def mark_complete(directory: epath.Path) -> None:
    """Marks a checkpoint that was copied into a bucket, so that Orbax knows it."""
    if paths.is_remote(directory) and not (directory / COMMIT).exists():
        (directory / COMMIT).write_text("copied from elsewhere\n")


def move(source: epath.Path, target: epath.Path) -> epath.Path:
    """Renames a directory; in a bucket it is copied before anything of it is deleted."""
    if not paths.is_remote(source):
        return source.rename(target)
    paths.file_system(source).copy(f"{source}/", f"{target}/", recursive=True)
    rmtree(source)
    return target
