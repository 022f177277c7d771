"""Being told to stop: SIGTERM ends training at a step that all processes agree on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils

from diffusion_t5x.runtime.exit_codes import PREEMPTED


class Preempted(SystemExit):
    """Training was told to stop, and saved everything first; the exit code says so."""

    def __init__(self):
        super().__init__(PREEMPTED)


@contextmanager
def stop_on_sigterm() -> Iterator[Callable[[int], bool]]:
    """Gives a function of the step that says whether to stop there; SIGTERM itself does no harm.

    Where several processes run, JAX has caught the signal, whichever of them got it, and names a
    step that all of them have yet to reach, so that they stop at the same one.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = []
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    except ValueError:  # not the main thread, which alone may catch signals
        yield lambda step: False
        return
    try:
        yield lambda step: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, before)
