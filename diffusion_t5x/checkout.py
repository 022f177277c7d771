"""Makes the folder `tasks/` of a checkout the package `diffusion_t5x.tasks`, as it is installed.

In a checkout it can also be imported as `tasks`, whose modules are the same objects. A project's
own package `tasks` takes precedence, and an installed package has no such second name.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import pathlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader
from types import ModuleType

NAME = "diffusion_t5x.tasks"
_PACKAGE = pathlib.Path(__file__).resolve().parent
_FOLDER = _PACKAGE.parent / "tasks"


class TasksFinder:
    """A finder for `sys.meta_path` of the tasks of a checkout, under both names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == NAME:
            places = [str(_FOLDER)]
            return importlib.util.spec_from_file_location(
                fullname, _FOLDER / "__init__.py", submodule_search_locations=places
            )
        ours = sys.modules.get(NAME)
        if fullname.startswith("tasks.") and ours is not None and sys.modules["tasks"] is ours:
            return importlib.machinery.ModuleSpec(fullname, _SecondName())
        return None


class _SecondName(Loader):
    """A loader of a module that is imported already, or is now, under its own name."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"{NAME}.{spec.name.partition('.')[2]}")
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # which the import has replaced


def install() -> None:
    """Puts the finder first in a checkout; an installed package needs none."""
    if not (_PACKAGE / "tasks").exists() and (_FOLDER / "features.py").exists():
        sys.meta_path.insert(0, TasksFinder())
