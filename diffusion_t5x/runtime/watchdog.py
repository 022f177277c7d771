"""Ends a process whose steps no longer come, with what each of its threads was doing."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from diffusion_t5x.runtime.exit_codes import HUNG

_TICK_SECONDS = 1.0


class Watchdog:
    """A thread that ends this process when it is not told of progress for too long.

    Where one process of a run hangs, the others wait for it in a collective, in compiled code that
    cannot be interrupted, so the thread ends the process itself. The time for which the whole
    process was stopped, as by a shell, does not count.
    """

    def __init__(self, timeout_seconds: float | None):
        """Watches nothing yet.

        Args:
          timeout_seconds: the longest time between two signs of life; None or 0 for no limit.

        Raises:
          ValueError: if it is negative.
        """
        if timeout_seconds is not None and timeout_seconds < 0:
            raise ValueError(
                f"step_timeout_seconds = {timeout_seconds}; expected seconds, or None for no limit."
            )
        self._timeout = timeout_seconds or None
        self._left = timeout_seconds or 0.0
        self._what = "the first step"
        self._suspended = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, what: str) -> None:
        """Tells of progress, and of what is waited for next, such as 'step 3'."""
        self._what, self._left = what, self._timeout or 0.0

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """For work that may take any time, such as an evaluation."""
        self._suspended = True
        try:
            yield
        finally:
            self.beat(self._what)
            self._suspended = False

    def _watch(self) -> None:
        assert self._timeout is not None
        tick = min(_TICK_SECONDS, self._timeout / 4)
        before = time.monotonic()
        while not self._over.wait(tick):
            now = time.monotonic()
            if not self._suspended:
                self._left -= min(now - before, 2 * tick)
                if self._left <= 0:
                    self._end()
            before = now

    def _end(self) -> None:
        # Neither Python's streams nor its exit: either may wait for the thread that hangs.
        message = (
            f"\nprocess {jax.process_index()} of {jax.process_count()}: {self._what} has not come "
            f"for {self._timeout:g} seconds (trainer.train.step_timeout_seconds); this process, "
            "another one or the network hangs. This process ends with exit code "
            f"{HUNG}; its threads were here:\n"
        )
        os.write(2, message.encode())
        faulthandler.dump_traceback(2)
        os._exit(HUNG)

    def __enter__(self) -> Watchdog:
        if self._timeout is not None:
            self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._over.set()
        if self._timeout is not None:
            self._thread.join()
