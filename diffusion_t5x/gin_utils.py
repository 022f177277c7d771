"""Gin files, bindings of the command line, and the configuration file that a run writes."""

from __future__ import annotations

import inspect
import io
import os
import pathlib
import re
import tokenize
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from etils import epath

import gin
from diffusion_t5x import gin_values, moved, paths
from diffusion_t5x.names import did_you_mean, nearest
from diffusion_t5x.runtime.files import write_atomically
from gin import config_parser

_PACKAGE = pathlib.Path(__file__).resolve().parent


def config_dir() -> pathlib.Path:
    """Returns the directory of this project's gin files, in a checkout or an installed package.

    Raises:
      FileNotFoundError: if the installation lacks them.
    """
    package = pathlib.Path(__file__).resolve().parent
    for candidate in (package / "gin", package.parent / "gin"):
        if (candidate / "runs").is_dir():
            return candidate
    raise FileNotFoundError(f"no gin files beside {package}; reinstall diffusion_t5x.")


def _is_gin_value(text: str) -> bool:
    """Returns True if gin reads all of `text` as one value."""
    try:
        delegate = gin.config.ParserDelegate(skip_unknown=True)
        return len(list(config_parser.ConfigParser(f"_ = {text}", delegate))) == 1
    except (SyntaxError, ValueError, tokenize.TokenError):
        return False


def to_binding(assignment: str) -> str:
    """Converts `NAME=VALUE` to a gin binding; a VALUE that gin cannot read becomes a string.

    Both `--gin.MODEL_DIR="'/tmp/run'"`, as T5X needs it, and `--gin.MODEL_DIR=/tmp/run` work.

    Raises:
      ValueError: if the assignment has no '=' or no name.
    """
    name, value = split(assignment)
    read = value.strip()
    return f"{name} = {read if _is_gin_value(read) else repr(value)}"


def split(assignment: str) -> tuple[str, str]:
    """Returns name and value; in `NAME=VALUE` the blanks at the ends of VALUE belong to it.

    Raises:
      ValueError: if the assignment has no '=' or no name.
    """
    name, equals, value = assignment.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"gin binding {assignment!r}; expected NAME=VALUE.")
    return name.strip(), value if name == name.rstrip() else value.strip()


def parse_config(
    files: Sequence[str], assignments: Sequence[str], search_paths: Sequence[str] = ()
) -> None:
    """Parses gin files, then bindings; each later one overrides the earlier ones.

    Args:
      files: Gin files, relative to the working directory, to one of `search_paths`, or to
        `config_dir()`.
      assignments: Bindings, each `NAME=VALUE`.
      search_paths: Further directories to search.

    Raises:
      FileNotFoundError: if a file does not exist; the message lists the directories searched.
      ImportError: if a file imports a module that has moved; the message gives its new name.
      ValueError: if an assignment has no '=', sets a macro that no file sets or reads, names an
        unknown function or parameter, or if a required macro has no value; the message offers the
        nearest name.
    """
    search_paths = [paths.expand(place, "--gin_search_paths") for place in search_paths]
    found = [find(file, search_paths) for file in files]
    with _errors_with_hints(), _searching([*search_paths, str(config_dir())]):
        gin.parse_config_files_and_bindings(files, [], finalize_config=False)
    macros = macros_set()
    bindings = [to_binding(assignment) for assignment in assignments]
    with _errors_with_hints():
        for binding in bindings:
            _register_our_names(binding)
        gin.parse_config(bindings)
    _refuse_unknown_macros(assignments, macros | _macros_read())
    for path in found:
        _refuse_misspelt_macros(path)
    gin_values.settle(dict(map(_typed, assignments)))
    with _errors_with_hints():
        gin.finalize()


def _typed(assignment: str) -> tuple[gin_values.Key, str]:
    """Returns the key that an assignment binds, and the value as it was typed."""
    name, value = split(assignment)
    scope, selector, parameter = config_parser.parse_binding_key(name)
    if not parameter:
        return (f"{scope}/{selector}" if scope else selector, gin_values.MACRO, "value"), value
    key = gin.config.ParsedBindingKey.parse((scope, selector, parameter))
    return (key.scope, key.complete_selector, key.arg_name), value


def _register_our_names(binding: str) -> None:
    """Registers the functions of ours that a binding names, as if a file had imported them.

    A name is that of a module and what is in it, such as `optimizers.adamw`.
    """
    name, _, value = binding.partition(" = ")
    parameter = re.fullmatch(r"(?:[\w.-]+/)*(\w+(?:\.\w+)+)\.\w+", name)
    references = [] if value[0] in "'\"" else re.findall(r"@(?:\w+/)*(\w+(?:\.\w+)+)", value)
    for selector in [*([parameter[1]] if parameter else []), *references]:
        if selector in moved.GIN_NAMES or gin.config._REGISTRY.matching_selectors(selector):
            continue  # An old name is refused by its new one.
        head = selector.partition(".")[0]
        files = [*_PACKAGE.rglob(f"{head}.py"), *_PACKAGE.rglob(f"{head}/__init__.py")]
        for file in sorted(files, key=lambda file: len(file.parts))[:1]:
            path = file.parent if file.stem == "__init__" else file.with_suffix("")
            package = ".".join(path.relative_to(_PACKAGE.parent).parent.parts)
            gin.parse_config(
                f"from __gin__ import dynamic_registration\nfrom {package} import {head}\n"
                f"registered = @{selector}\n"
            )
            del gin.config._CONFIG["registered", gin_values.MACRO]


def find(file: str, search_paths: Sequence[str]) -> str:
    """Returns the path of a gin file, searching where gin does.

    Raises:
      FileNotFoundError: naming the file's new name, or the nearest of this project's files.
    """
    file = paths.expand(file, "--gin_file")
    paths.readable(file, "--gin_file")
    places = ["", *search_paths, str(config_dir())]
    for place in places if not paths.is_remote(file) else [""]:
        if epath.Path(path := os.path.join(place, file)).exists():
            return path
    raise FileNotFoundError(
        f"--gin_file={file} was not found in {', '.join(place or '.' for place in places)}; "
        f"{_file_hint(file)}"
    )


def _file_hint(file: str) -> str:
    if new := moved.GIN_FILES.get(file):
        return f"it is now {new}."
    known = [path.relative_to(config_dir()).as_posix() for path in config_dir().rglob("*.gin")]
    return did_you_mean(file, sorted(known))


def _open_elsewhere(name: str) -> IO[str]:
    return io.StringIO(paths.as_path(name, "gin file").read_text())


def _is_elsewhere(name: str) -> bool:
    """Returns whether a name is that of a file in a bucket, or begins with file:// or ~."""
    there = name.startswith(("~", "file://")) or paths.is_remote(name)
    return there and paths.as_path(name, "gin file").exists()


@contextmanager
def _searching(places: Sequence[str]) -> Iterator[None]:
    """Has gin search for files in `places`, also in buckets, and not inside Python packages.

    The latter fails with a TypeError if a directory without `__init__.py`, such as `runs/`, has
    the first name of a path. Gin has one list of readers per process. A nested call restores the
    lists of the outer one; parsing in two threads at once is unsafe, as gin's configuration is also
    one per process.
    """
    readers, prefixes = gin.config._FILE_READERS, gin.config._LOCATION_PREFIXES
    gin.config._FILE_READERS = [reader for reader in readers if reader[0] is open]
    gin.config._FILE_READERS.append((_open_elsewhere, _is_elsewhere))
    gin.config._LOCATION_PREFIXES = [*prefixes, *places]
    try:
        yield
    finally:
        gin.config._FILE_READERS, gin.config._LOCATION_PREFIXES = readers, prefixes


@contextmanager
def _errors_with_hints() -> Iterator[None]:
    """Adds the nearest name, or what to do, to gin's errors.

    Raises:
      FileNotFoundError: if an included file does not exist.
      ValueError: for gin's other errors.
    """
    try:
        yield
    except OSError as error:
        missing = re.match(r"Unable to open file: (\S+)\. Searched", str(error))
        if not missing:
            raise
        raise FileNotFoundError(f"{error}\n{missing[1]}: {_file_hint(missing[1])}") from error
    except (AttributeError, NameError, ValueError) as error:
        # gin puts the whole configuration after this.
        if unset := re.match(r"No bindings specified for '(\S+)/gin.macro'", str(error)):
            raise ValueError(
                f"%{unset[1]} is read, but nothing sets it; give the gin file that does, or "
                f"""--gin.{unset[1]}=VALUE. For a text that begins with %: "'%{unset[1]}'"."""
            ) from error
        raise ValueError(f"{error}{_hint(str(error))}") from error


def _hint(message: str) -> str:
    """Returns what to do about one of gin's errors, judging by its text; '' if nothing is known."""
    if match := re.match(r"(\w+)/\S+ set to `%gin.REQUIRED`", message):
        return f"\n{match[1]} is required; give --gin.{match[1]}=VALUE, or set it in a gin file."
    registered = gin.config._REGISTRY
    if match := re.search(r"'(\S+)' doesn't have a parameter named '(\w+)'", message):
        function = registered.get_match(match[1]).wrapped
        known = list(inspect.signature(function).parameters)
        return f"\n{match[2]!r}: {did_you_mean(match[2], known)}"
    if match := re.search(
        r"No configurable matching (?:reference )?'@?(?:\w+/)*([^\s'()]+)|resolve selector (\S+);",
        message,
    ):
        name = match[1] or match[2]
        if new := moved.GIN_NAMES.get(name):
            return f"\n{name} is now {new}."
        dots = name.count(".") + 1
        known = sorted({".".join(key.split(".")[-dots:]) for key, _ in registered.items()})
        return f"\n{name!r}: {did_you_mean(name, known)}"
    return ""


def macros_set() -> set[str]:
    """Returns the names of the macros that the files and bindings parsed last set."""
    return {scope for scope, selector in gin.config._CONFIG if selector == gin_values.MACRO}


def _macros_read() -> set[str]:
    """Returns the names of the macros that some value refers to."""
    keys = (reference.config_key for reference in gin.config.iterate_references(gin.config._CONFIG))
    return {scope for scope, selector in keys if selector == "gin.macro"}


def _refuse_unknown_macros(assignments: Sequence[str], known: set[str]) -> None:
    """Refuses assignments to unknown macros, which gin would accept and nothing would read.

    Raises:
      ValueError: naming the nearest macro.
    """
    for assignment in assignments:
        name = assignment.partition("=")[0].strip()
        if "." not in name and name not in known:
            raise ValueError(
                f"--gin.{assignment}: no gin file given sets or reads {name!r}; "
                f"{did_you_mean(name, sorted(known))}"
            )


def _refuse_misspelt_macros(path: str) -> None:
    """Refuses macros of a user's file that nothing reads and that resemble one that is read.

    Raises:
      ValueError: naming the nearest macro that is read.
    """
    if pathlib.Path(path).resolve().is_relative_to(config_dir()):
        return
    text = epath.Path(path).read_text()
    read = _macros_read()
    statements = config_parser.ConfigParser(text, gin.config.ParserDelegate(skip_unknown=True))
    for statement in statements:
        name = getattr(statement, "selector", ".")
        if "." in name or getattr(statement, "arg_name", None) or name in read:
            continue
        if near := nearest(name, read, cutoff=0.8):
            raise ValueError(f"{path} sets {name!r}, which nothing reads; did you mean {near!r}?")


def write_config(directory: str) -> None:
    """Writes the whole configuration of this process to `directory`/config.gin, atomically."""
    write_atomically(epath.Path(directory) / "config.gin", gin.config_str())
