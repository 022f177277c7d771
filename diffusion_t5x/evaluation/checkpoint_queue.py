"""The checkpoints of an evaluation, while a run goes on that saves others and deletes them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from diffusion_t5x.checkpointing.checkpoints import RestoreCheckpointConfig, select_checkpoints
from diffusion_t5x.checkpointing.reading import CheckpointMismatchError

# Deleting a large checkpoint takes a while, during which it looks damaged.
DELETION_SECONDS = 5.0
_MESSAGE_BYTES = 8192

Checkpoint = tuple[int, str]  # step and path


def until_empty(
    config: RestoreCheckpointConfig, selected: Sequence[Checkpoint], evaluated: Callable[[], bool]
) -> Iterator[Checkpoint]:
    """Yields selected checkpoints in the order of their steps, and those that appear meanwhile.

    Of a run whose latest checkpoint is asked for, another is yielded only if that one vanished.
    All processes get the same ones.

    Args:
      config: What asks for checkpoints.
      selected: What `select_checkpoints(config)` returned at first.
      evaluated: Returns whether any checkpoint that was yielded could be evaluated.
    """
    todo, seen = set(selected), set[Checkpoint]()
    while True:
        if config.mode == "all" or (seen and not evaluated()):
            with suppress(FileNotFoundError):  # the run has none left
                todo |= set(select_checkpoints(config))
        step, path = _agreed(min(todo - seen, default=(-1, "")))
        if not path:
            return
        seen.add((step, path))
        yield step, path


def _agreed(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the first process's choice, since others may have listed the run at another time."""
    if jax.process_count() == 1:
        return checkpoint
    text = json.dumps(checkpoint).ljust(_MESSAGE_BYTES).encode()
    message = multihost_utils.broadcast_one_to_all(np.frombuffer(text, np.uint8))
    step, path = json.loads(np.asarray(message, np.uint8).tobytes())
    return step, path


def restore_or_none(restore: Callable[[str], Any], path: str) -> Any | None:
    """Returns what `restore` does, or None if the run deletes the checkpoint."""
    try:
        return restore(path)
    except FileNotFoundError:
        return None
    except CheckpointMismatchError:
        raise
    except Exception:  # a file of it may be gone already, at any point of reading
        deadline = time.monotonic() + DELETION_SECONDS
        while epath.Path(path).exists():
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        return None
