"""Gin: where its files are, how the command line sets them, and the record a run keeps."""

from __future__ import annotations

import difflib
import inspect
import os
import pathlib
import re
import tokenize
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import gin
from diffusion_t5x.runtime.files import write_atomically
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
      ValueError: if an assignment lacks its '=', a macro that is set here is read by nothing and
        known to no other file, a function or parameter is unknown, or a required macro has no
        value; the message offers the nearest name.
    """
    places = [*search_paths, str(config_dir())]
    for place in places:
        gin.add_config_file_search_path(place)
    found = [_find(file, places) for file in files]
    # Gin would also look for files inside Python packages, and fails with a TypeError where a
    # directory without __init__.py, such as runs/, has the first name of a path.
    readers = gin.config._FILE_READERS
    gin.config._FILE_READERS = [reader for reader in readers if reader[0] is open]
    try:
        with _nearest_names():
            gin.parse_config_files_and_bindings(files, [], finalize_config=False)
    finally:
        gin.config._FILE_READERS = readers
    macros = _macros_set()
    with _nearest_names():
        gin.parse_config([to_binding(a) for a in assignments])
    _refuse_unknown_macros(assignments, macros | _macros_read())
    for path in found:
        _refuse_misspelt_macros(path)
    with _nearest_names():
        gin.finalize()


def _find(file: str, places: Sequence[str]) -> str:
    """The path of a gin file, which is looked for where gin does.

    Raises:
      FileNotFoundError: naming the nearest of this project's files.
    """
    for place in ["", *places]:
        if os.path.exists(path := os.path.join(place, file)):
            return path
    known = [path.relative_to(config_dir()).as_posix() for path in config_dir().rglob("*.gin")]
    near = difflib.get_close_matches(file, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise FileNotFoundError(f"--gin_file={file} was not found in {', '.join(['.', *places])}{hint}")


@contextmanager
def _nearest_names() -> Iterator[None]:
    """Adds to gin's errors the nearest name, or what is to be done.

    Raises:
      ValueError: as gin does, with a message that says more.
    """
    try:
        yield
    except (AttributeError, NameError, ValueError) as error:
        raise ValueError(f"{error}{_hint(str(error))}") from error


def _hint(message: str) -> str:
    """What to do about an error of gin's, from its text; '' where nothing is known."""
    if match := re.match(r"(\w+)/\S+ set to `%gin.REQUIRED`", message):
        return f"\n{match[1]} is required; give --gin.{match[1]}=VALUE, or set it in a gin file."
    registered = gin.config._REGISTRY
    if match := re.search(r"'(\S+)' doesn't have a parameter named '(\w+)'", message):
        function = registered.get_match(match[1]).wrapped
        return _did_you_mean(match[2], list(inspect.signature(function).parameters))
    if match := re.search(r"No configurable matching '(\S+)'|resolve selector (\S+);", message):
        name = match[1] or match[2]
        dots = name.count(".") + 1
        return _did_you_mean(
            name, sorted({".".join(key.split(".")[-dots:]) for key, _ in registered.items()})
        )
    return ""


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"\nDid you mean {near[0]!r}?" if near else f"\nKnown: {', '.join(known)}."


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


def _refuse_misspelt_macros(path: str) -> None:
    """A file of one's own may set macros that nothing reads, but hardly ones that look like others.

    Raises:
      ValueError: naming the nearest macro that is read.
    """
    if pathlib.Path(path).resolve().is_relative_to(config_dir()):
        return
    text = pathlib.Path(path).read_text(encoding="utf-8")
    read = _macros_read()
    statements = config_parser.ConfigParser(text, gin.config.ParserDelegate(skip_unknown=True))
    for statement in statements:
        name = getattr(statement, "selector", ".")
        if "." in name or getattr(statement, "arg_name", None) or name in read:
            continue
        if near := difflib.get_close_matches(name, read, n=1, cutoff=0.8):
            raise ValueError(
                f"{path} sets {name!r}, which nothing reads; did you mean {near[0]!r}?"
            )


def write_config(directory: str) -> None:
    """Writes the whole configuration of this process to `directory`/config.gin, atomically."""
    write_atomically(pathlib.Path(directory) / "config.gin", gin.config_str())
