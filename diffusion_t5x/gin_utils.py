"""Gin: where its files are, how the command line sets them, and the record a run keeps."""

from __future__ import annotations

import logging
import os
import pathlib
from collections.abc import Sequence

import gin


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
    if not value.startswith(("@", "%")):
        try:
            gin.config.parse_value(value)
        except (SyntaxError, ValueError):
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
    """
    places = [*search_paths, str(config_dir())]
    for place in places:
        gin.add_config_file_search_path(place)
    for file in files:
        if not any(os.path.exists(os.path.join(place, file)) for place in ["", *places]):
            raise FileNotFoundError(
                f"--gin_file={file} was not found in {', '.join(['.', *places])}."
            )
    # Gin logs an error for each place where a file is not; it raises if it is nowhere.
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        gin.parse_config_files_and_bindings(files, [to_binding(a) for a in assignments])
    finally:
        logging.disable(level)


def write_config(directory: str) -> None:
    """Writes the whole configuration of this process to `directory`/config.gin, atomically."""
    path = pathlib.Path(directory) / "config.gin"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".gin.tmp")
    temporary.write_text(gin.config_str(), encoding="utf-8")
    os.replace(temporary, path)
