"""The interpreter that programs get, and the files that it reads while it runs."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import packaging.requirements

# Where packages are installed, which may hold the answers to a benchmark.
_PACKAGES = re.compile(r"(site|dist)-packages")
_OTHER_PYTHONS = re.compile(r"(python.*|site-packages|dist-packages)")
# Loads what the standard library and modules need, and tells the shared libraries.
_PROBE = """
import ctypes, importlib, json, os, sys
folder, modules, paths = json.loads(sys.argv[1])
sys.path += paths
for name in os.listdir(folder) if os.path.isdir(folder) else []:
    try: importlib.import_module(name.partition(".")[0])
    except Exception: pass
try: ctypes.CDLL("libgcc_s.so.1")
except OSError: pass
for name in modules: importlib.import_module(name)
with open("/proc/self/maps") as file:
    names = {line.split(maxsplit=5)[5].strip() for line in file if line.count("/")}
print(json.dumps(sorted(name for name in names if ".so" in name.rpartition("/")[2])))
"""


class Readable(NamedTuple):
    """A file or directory that may be read, but for entries with `hidden` names."""

    path: str
    hidden: tuple[str, ...] = ()

    def entries(self) -> list[str]:
        """Returns paths which together are all that may be read."""
        if not self.hidden:
            return [self.path]
        names = sorted(set(os.listdir(self.path)) - set(self.hidden))
        return [os.path.join(self.path, name) for name in names]


class Interpreter(NamedTuple):
    """An interpreter and what it reads.

    Attributes:
      executable: Its file.
      readable: What it reads, directories before those inside them.
      links: Symbolic links at the root, name -> target.
      modules: Files and directories of named modules, of what `readable` has.
    """

    executable: str
    readable: tuple[Readable, ...]
    links: tuple[tuple[str, str], ...]
    modules: tuple[str, ...]

    @property
    def folders(self) -> list[str]:
        """The directories of named modules, in which there may be others."""
        return sorted({os.path.dirname(path) for path in self.modules})


@functools.cache
def find_interpreter(modules: tuple[str, ...]) -> Interpreter:
    """Finds this interpreter's base, the files it needs, and those of installed `modules`.

    Raises:
      ValueError: if a module is not installed.
      OSError: if one cannot be imported by itself.
    """
    executable = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]
    standard = os.path.realpath(os.path.dirname(os.__file__))
    files = {path for module in modules for path in _files_of(module)}
    folders = sorted({os.path.dirname(path) for path in files})
    links = {
        name: os.readlink(f"/{name}")
        for name in ("lib", "lib64", "lib32")
        if os.path.islink(f"/{name}")
    }
    libraries = {
        os.path.dirname(path)
        for path in _shared_libraries(executable, standard, modules, tuple(folders))
        if not any(path.startswith(f"{folder}/") for folder in (*folders, standard))
    }
    libraries |= {path for path in (os.path.realpath("/lib64"),) if os.path.isdir(path)}
    found = {Readable(path, _names(path, _OTHER_PYTHONS)) for path in libraries}
    found.add(Readable(standard, _names(standard, _PACKAGES)))
    others = {executable, "/etc/ld.so.cache", "/usr/share/zoneinfo", "/etc/mime.types", *files}
    found |= {Readable(path) for path in others if os.path.exists(path)}
    return Interpreter(executable, tuple(sorted(found)), tuple(links.items()), tuple(sorted(files)))


def is_installed(module: str) -> bool:
    """Returns whether a module of this name, without dots, can be imported here."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _names(folder: str, pattern: re.Pattern[str]) -> tuple[str, ...]:
    return tuple(sorted(name for name in os.listdir(folder) if pattern.fullmatch(name)))


def _shared_libraries(
    executable: str, standard: str, modules: tuple[str, ...], folders: tuple[str, ...]
) -> list[str]:
    job = json.dumps([os.path.join(standard, "lib-dynload"), modules, folders])
    done = subprocess.run(
        [executable, "-I", "-S", "-c", _PROBE, job],
        env={"OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise OSError(f"{', '.join(modules) or executable} cannot be loaded by itself: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _files_of(module: str) -> Iterator[str]:
    """Yields files and directories of a module and of what its distribution requires.

    Raises:
      ValueError: if it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise ValueError(f"module {module!r} is not installed.")
    places = list(spec.submodule_search_locations or [str(spec.origin)])
    for place in places:
        yield os.path.realpath(place)
        # Shared libraries that a wheel brings.
        beside = os.path.realpath(os.path.join(os.path.dirname(place), f"{module}.libs"))
        if os.path.isdir(beside):
            yield beside
    for distribution in importlib.metadata.packages_distributions().get(module, []):
        for needed in _required(distribution, set()):
            yield from _top_level(needed)


def _required(name: str, seen: set[str]) -> set[str]:
    """Returns a distribution and those that it requires, as far as they are installed."""
    if name in seen:
        return seen
    try:
        requirements = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return seen
    seen.add(name)
    for text in requirements:
        requirement = packaging.requirements.Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            _required(requirement.name, seen)
    return seen


def _top_level(distribution: str) -> Iterator[str]:
    """Yields what a distribution has beside others: packages, modules, shared libraries."""
    found = importlib.metadata.distribution(distribution)
    names = {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}
    for name in sorted(names):
        path = os.path.realpath(str(found.locate_file(name)))
        if os.path.exists(path):
            yield path
