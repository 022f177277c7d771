"""Errors for misspelt names, which offer the nearest known name and list all of them."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from diffusion_t5x import moved


def nearest(name: str, known: Collection[str], cutoff: float = 0.5) -> str | None:
    """Returns the known name that most resembles `name`, or None if none does.

    Args:
      name: The unknown name.
      known: All known names.
      cutoff: The least similarity, from 0 to 1, as `difflib` measures it.
    """
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=cutoff)
    return near[0] if near else None


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Returns "did you mean 'near'? Known: a, b." for a name that is not among `known`.

    The question is left out if no known name is near.

    Args:
      name: The unknown name.
      known: All known names.
    """
    near = nearest(name, known)
    question = "" if near is None else f"did you mean {near!r}? "
    return f"{question}Known: {', '.join(known)}."


def check_known(name: str, known: Collection[str], setting: str) -> None:
    """Refuses a name that is not among `known`.

    Args:
      name: The value of the setting.
      known: All values that the setting may have.
      setting: The name of the setting that the user typed, such as 'remat' or 'objective'.

    Raises:
      ValueError: naming the setting, its value, the nearest known name and all of them, or what
        replaces the value.
    """
    if name in known:
        return
    if replacement := moved.VALUES.get((setting, name)):
        raise ValueError(f"{setting} {name!r} is gone; {replacement} replaces it.")
    raise ValueError(f"{setting} = {name!r} is unknown; {did_you_mean(name, known)}")
