"""Progress of long work: a bar on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import rich.progress

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts towards a total and shows how far it is, how fast, and how long it will take.

    Use it as a context manager. On processes other than the first it shows nothing.
    """

    def __init__(self, total: int | None, description: str, unit: str, initial: int = 0):
        """Starts showing progress.

        Args:
          total: units in all; None if not known.
          description: what is being done.
          unit: what is counted, in the plural.
          initial: units done before.
        """
        self._total, self._description, self._unit = total, description, unit
        self._done = self._initial = initial
        self._started = self._last_line = time.monotonic()
        self._fields = ""
        self._bar: rich.progress.Progress | None = None
        import jax

        self._silent = jax.process_index() != 0
        if sys.stderr.isatty() and not self._silent:
            self._start_bar()

    def _start_bar(self) -> None:
        from rich import console, progress

        self._bar = bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[fields]}"),
            console=console.Console(stderr=True),
        )
        self._task = bar.add_task(
            self._description, total=self._total, completed=self._initial, rate="", fields=""
        )
        bar.start()

    def update(self, count: int = 1, **fields: float) -> None:
        """Counts `count` more units; `fields` are numbers to show beside them."""
        self._done += count
        if fields:
            self._fields = "  ".join(f"{name} {value:.4g}" for name, value in fields.items())
        if self._bar is not None:
            self._bar.update(
                self._task, completed=self._done, rate=self._rate(), fields=self._fields
            )
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._line()

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        return f"{(self._done - self._initial) / seconds:.3g} {self._unit}/s"

    def _line(self) -> None:
        if self._silent:
            return
        self._last_line = time.monotonic()
        total = "" if self._total is None else f"/{self._total}"
        print(
            f"{self._description}: {self._done}{total} {self._unit}, "
            f"{self._rate()}  {self._fields}",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        """Shows the last count."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        else:
            self._line()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()
