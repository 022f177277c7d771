"""Errors for misspelt names: what was given, the nearest known name, and all of them."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Returns "did you mean 'near'? Known: a, b." for a name that is not among `known`.

    The question is left out where no known name is near.

    Args:
      name: the unknown name.
      known: all names that would do.
    """
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    question = f"did you mean {near[0]!r}? " if near else ""
    return f"{question}Known: {', '.join(known)}."


def check_known(name: str, known: Collection[str], setting: str) -> None:
    """Refuses a name that is not among `known`.

    Args:
      name: the value of the setting.
      known: all values that it may have.
      setting: what the user typed it for, such as 'remat' or 'objective'.

    Raises:
      ValueError: naming the setting, its value, the nearest known name and all of them.
    """
    if name not in known:
        raise ValueError(f"{setting} = {name!r} is unknown; {did_you_mean(name, known)}")
