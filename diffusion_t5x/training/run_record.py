"""What must stay the same in a run's directory, recorded there and compared when it goes on."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from diffusion_t5x.data import vocabularies
from diffusion_t5x.runtime.files import write_atomically

FILE = "run.json"
# How something is computed, or regularised, but not what: these may change as a run goes on.
FREE = frozenset(
    {
        "dropout_rate",
        "dtype",
        "remat",
        "attention_block_logits",
        "attention_kernel",
        "block_logits",
        "parent",
        "name",
    }
)
# Settings by which people know these.
SETTINGS = {"mixture": "MIXTURE_OR_TASK_NAME", "vocabulary": "VOCABULARY"}


class OtherRunError(ValueError):
    """MODEL_DIR holds the checkpoints of a run of something else; the message says what differs."""


def describe(model: Any, mixture: str) -> dict[str, str]:
    """Network, objective, vocabulary and data of a run, each setting by a dotted name.

    Args:
      model: of `models.Model`'s kind, its parts dataclasses.
      mixture: name of the task or mixture that is trained on.
    """
    return {
        **dict(_fields("network", model.module)),
        **dict(_fields("objective", model.objective)),
        "vocabulary": vocabularies.fingerprint(model.output_vocabulary),
        "mixture": mixture,
    }


def _fields(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """The class of a dataclass and, field by field, all that is in it."""
    if not dataclasses.is_dataclass(value):
        yield name, str(value)
        return
    yield name, type(value).__name__
    for field in dataclasses.fields(value):
        if field.name not in FREE:
            yield from _fields(f"{name}.{field.name}", getattr(value, field.name))


def check(model_dir: str, ours: Mapping[str, str]) -> None:
    """Checks that the run whose checkpoints lie in `model_dir` is this one.

    Settings that only one of the two knows, because one was written by another version, are not
    compared; nor is a directory that has no record.

    Args:
      model_dir: directory of the run.
      ours: what `describe` says of this run.

    Raises:
      OtherRunError: naming each setting that differs.
    """
    path = pathlib.Path(model_dir) / FILE
    if not path.exists():
        return
    theirs = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        f"  {SETTINGS.get(name, name)}: {theirs[name]} there, {ours[name]} here"
        for name in theirs.keys() & ours.keys()
        if theirs[name] != ours[name]
    ]
    if lines:
        raise OtherRunError(
            f"MODEL_DIR = {model_dir!r} holds checkpoints of another run, which differs in:\n"
            + "\n".join(sorted(lines))
            + "\nSet MODEL_DIR to another directory; to start from those parameters, set "
            f"INITIAL_CHECKPOINT_PATH = {model_dir!r} beside it."
        )


def write(model_dir: str, ours: Mapping[str, str]) -> None:
    """Writes the record, from one process."""
    if jax.process_index() == 0:
        text = json.dumps(dict(ours), indent=2) + "\n"
        write_atomically(pathlib.Path(model_dir) / FILE, text)
