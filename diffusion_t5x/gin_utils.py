"""Gin: where its files are, how the command line sets them, and the record a run keeps."""

from __future__ import annotations

import difflib
import os
import pathlib
import tokenize
from collections.abc import Sequence

import gin
from diffusion_t5x.metric_logs import write_atomically
from gin import config_parser


def config_dir() -> pathlib.Path:
    """The directory of this project's gin files, in a checkout or an installed package.

    Raises:
      FileNotFoundError: if the installation lacks them.
    """
    package = pathlib.Path(__file__).resolve().parent
    for candidate in (package / "gin", package.parent / "gin"):
        if (candidate / "runs").is_dir():
            return candidate
    raise FileNotFoundError(f"no gin files beside {package}; reinstall diffusion_t5x.")


def _is_gin_value(text: str) -> bool:
    """Whether gin reads the whole of `text` as one value."""
    try:
        delegate = gin.config.ParserDelegate(skip_unknown=True)
        return len(list(config_parser.ConfigParser(f"_ = {text}", delegate))) == 1
    except (SyntaxError, ValueError, tokenize.TokenError):
        return False


def to_binding(assignment: str) -> str:
    """`NAME=VALUE` as a gin binding; a VALUE that gin cannot read is taken as a string.

    So both `--gin.MODEL_DIR="'/tmp/run'"`, as for T5X, and `--gin.MODEL_DIR=/tmp/run` work.

    Raises:
      ValueError: if there is no '=' in it.
    """
    name, equals, value = assignment.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"gin binding {assignment!r}; expected NAME=VALUE.")
    value = value.strip()
    if not value.startswith(("@", "%")) and not _is_gin_value(value):
        value = repr(value)
    return f"{name.strip()} = {value}"


def parse_config(
    files: Sequence[str], assignments: Sequence[str], search_paths: Sequence[str] = ()
) -> None:
    """Parses gin files, then bindings, each later one overriding the earlier.

    Args:
      files: gin files, found from the working directory, `search_paths` or `config_dir()`.
      assignments: `NAME=VALUE` each.
      search_paths: further directories to look in.

    Raises:
      FileNotFoundError: if a file is nowhere; the message lists where it was looked for.
      ValueError: if an assignment lacks its '=', or sets a macro that no file sets or reads.
    """
    places = [*search_paths, str(config_dir())]
    for place in places:
        gin.add_config_file_search_path(place)
    for file in files:
        if not any(os.path.exists(os.path.join(place, file)) for place in ["", *places]):
            raise FileNotFoundError(
                f"--gin_file={file} was not found in {', '.join(['.', *places])}."
            )
    # Gin would also look for files inside Python packages, and fails with a TypeError where a
    # directory without __init__.py, such as runs/, has the first name of a path.
    readers = gin.config._FILE_READERS
    gin.config._FILE_READERS = [reader for reader in readers if reader[0] is open]
    try:
        gin.parse_config_files_and_bindings(files, [], finalize_config=False)
    finally:
        gin.config._FILE_READERS = readers
    macros = _macros_set()
    gin.parse_config([to_binding(a) for a in assignments])
    _refuse_unknown_macros(assignments, macros | _macros_read())
    gin.finalize()


def _macros_set() -> set[str]:
    """Names of the macros that have a value."""
    return {scope for scope, selector in gin.config._CONFIG if selector == "gin.macro"}


def _macros_read() -> set[str]:
    """Names of the macros that some value refers to."""
    keys = (reference.config_key for reference in gin.config.iterate_references(gin.config._CONFIG))
    return {scope for scope, selector in keys if selector == "gin.macro"}


def _refuse_unknown_macros(assignments: Sequence[str], known: set[str]) -> None:
    """Gin takes a macro of any name, so that a slip of the pen would change nothing, silently.

    Raises:
      ValueError: naming the nearest macro.
    """
    for assignment in assignments:
        name = assignment.partition("=")[0].strip()
        if "." in name or name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"--gin.{assignment}: no gin file given sets or reads {name!r}; {hint}"
            f"Known: {', '.join(sorted(known))}."
        )


def write_config(directory: str) -> None:
    """Writes the whole configuration of this process to `directory`/config.gin, atomically."""
    write_atomically(pathlib.Path(directory) / "config.gin", gin.config_str())
