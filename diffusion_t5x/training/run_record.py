"""The record of what must not change in a run's directory, compared when the run resumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath

from diffusion_t5x.data import vocabularies
from diffusion_t5x.interfaces import Model
from diffusion_t5x.runtime import resumable

FILE = "run.json"
# Settings that may change when a run resumes: they change speed, memory or regularisation alone, or
# the layout of checkpoints, which are read in either.
FREE = frozenset(
    {
        "dropout_rate",
        "dtype",
        "remat",
        "attention_block_logits",
        "attention_kernel",
        "scan_layers",
        "block_logits",
        "parent",
        "name",
    }
)
# The names under which users set these.
SETTINGS = {"mixture": "MIXTURE_OR_TASK_NAME", "vocabulary": "VOCABULARY"}


class OtherRunError(ValueError):
    """MODEL_DIR holds checkpoints of a different run; the message lists the differences."""


def describe(model: Model, mixture: str) -> dict[str, str]:
    """Describes the network, objective, vocabulary and data of a run.

    Each setting is text, by a dotted name such as 'network.config.num_layers'.
    """
    return {
        **dict(_fields("network", model.module)),
        **dict(_fields("objective", model.objective)),
        "vocabulary": vocabularies.fingerprint(model.output_vocabulary),
        "mixture": mixture,
    }


def _fields(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yields the class of a dataclass and, recursively, its fields."""
    if not dataclasses.is_dataclass(value):
        yield name, str(value)
        return
    yield name, type(value).__name__
    for field in dataclasses.fields(value):
        if field.name not in FREE:
            yield from _fields(f"{name}.{field.name}", getattr(value, field.name))


def read(model_dir: str) -> dict[str, Any]:
    """Returns the record of a directory, empty if it has none.

    Raises:
      OtherRunError: If the record is damaged.
    """
    path = epath.Path(model_dir) / FILE
    if not path.exists():
        return {}
    if (record := resumable.read_object(path, lambda path: None)) is None:
        raise OtherRunError(
            f"{path} is damaged: it says which settings the checkpoints beside it belong to, and "
            "cannot be compared with yours. If yours are the same, delete it; it is written again."
        )
    return record


def check(model_dir: str, ours: Mapping[str, str]) -> None:
    """Checks that a directory's checkpoints, if it has a record of them, belong to this run.

    Settings that only one of the records has, which another version wrote, are not compared.

    Raises:
      OtherRunError: If a setting differs, or the record is damaged.
    """
    theirs = read(model_dir)
    if not theirs and jax.process_index() == 0:
        print(
            f"{epath.Path(model_dir) / FILE} is missing: the settings of its checkpoints cannot be "
            "compared with yours."
        )
    lines = [
        f"  {SETTINGS.get(name, name)}: {theirs[name]} there, {ours[name]} here"
        for name in sorted(theirs.keys() & ours.keys())
        if theirs[name] != ours[name]
    ]
    if lines:
        raise OtherRunError(
            f"MODEL_DIR = {model_dir!r} holds checkpoints of a different run:\n"
            + "\n".join(lines)
            + "\nSet another MODEL_DIR; to start from these parameters, set "
            f"INITIAL_CHECKPOINT_PATH = {model_dir!r} as well."
        )


def write(model_dir: str, ours: Mapping[str, str], first_step: int) -> None:
    """Writes the description of a run, and the step it started at, on the first process."""
    path = epath.Path(model_dir) / FILE
    resumable.save_object(path, {**ours, "first_step": first_step}, indent=2)
