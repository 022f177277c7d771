"""Verdicts on programs, found ahead of the metric that needs them and kept until it has run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tasks import code_execution

Targets = Sequence[Mapping[str, Any]]
Programs = Sequence[str | Sequence[str]]

_known: dict[str, bool] = {}


def as_lists(predictions: Programs) -> list[list[str]]:
    """Per problem a list of programs, where one alone may stand for itself."""
    return [[text] if isinstance(text, str) else list(text) for text in predictions]


def _limits() -> str:
    return json.dumps(dataclasses.asdict(code_execution.configure()), sort_keys=True)


def _keys(targets: Targets, samples: Sequence[Sequence[str]]) -> list[list[str]]:
    """What tells a program, its assertions and its limits from others."""
    limits = _limits()

    def key(program: str, tests: Sequence[str]) -> str:
        text = json.dumps([program, list(tests), limits])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    return [
        [key(program, target["tests"]) for program in programs]
        for target, programs in zip(targets, samples, strict=True)
    ]


def judge(targets: Targets, predictions: Programs) -> dict[str, Any]:
    """Runs the programs that have no verdict yet, each text once.

    Args:
      targets: per problem `{'tests': assertions, ...}`.
      predictions: per problem one program or several.

    Returns:
      A JSON value: 'passed', per problem a bool for each program, and the 'limits' they ran under.
    """
    samples = as_lists(predictions)
    keys = _keys(targets, samples)
    jobs = {
        key: (program, target["tests"])
        for target, programs, row in zip(targets, samples, keys, strict=True)
        for program, key in zip(programs, row, strict=True)
        if key not in _known
    }
    _known.update(zip(jobs, code_execution.run_all(list(jobs.values())), strict=True))
    return {"limits": _limits(), "passed": [[_known[key] for key in row] for row in keys]}


def remember(targets: Targets, predictions: Programs, judged: Mapping[str, Any]) -> None:
    """Takes back what `judge` returned for the same programs, if limits were the same."""
    if judged["limits"] == _limits():
        for row, passed in zip(
            _keys(targets, as_lists(predictions)), judged["passed"], strict=True
        ):
            _known.update(zip(row, passed, strict=True))


def forget() -> None:
    """Forgets all verdicts."""
    _known.clear()
