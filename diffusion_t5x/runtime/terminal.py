"""Output for people: tables, and the progress of long work as bars or plain lines."""

from __future__ import annotations

import contextlib
import datetime
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import rich.progress

SECONDS_BETWEEN_LINES = 10.0

_titles: list[str] = []  # of the work in progress, outermost first
_bars: rich.progress.Progress | None = None  # shared, so that bars inside one another stack


@contextlib.contextmanager
def titled(title: str) -> Iterator[None]:
    """Puts a title to all progress shown inside, whose bars disappear when they end."""
    _titles.append(title)
    try:
        yield
    finally:
        _titles.pop()


def _open_bars() -> rich.progress.Progress:
    """Returns the display that bars share; starts it for the first of them."""
    global _bars  # noqa: PLW0603
    if _bars is None:
        from rich import console, progress, text

        class Bars(progress.Progress):
            """Bars with the titles in a line above them."""

            def get_renderables(self) -> Iterator[Any]:
                if _titles:
                    yield text.Text(": ".join(_titles))
                yield self.make_tasks_table(self.tasks)

        _bars = Bars(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=20),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[fields]}"),
            console=console.Console(stderr=True),
            transient=bool(_titles),
        )
        _bars.start()
    return _bars


class Progress:
    """A count towards a total, if it is known, shown with its rate and the time left.

    A context manager. `unit` names what is counted, in the plural; the rate leaves out the first
    `initial` units. It is a bar where standard error is a terminal, else a line every
    `SECONDS_BETWEEN_LINES`; on processes other than the first it shows nothing.
    """

    def __init__(self, total: int | None, description: str, unit: str, initial: int = 0):
        import jax

        self._total, self._unit, self._done, self._initial = total, unit, initial, initial
        self._description, self._fields = ": ".join([*_titles, description]), ""
        self._started = self._last_line = time.monotonic()
        self._silent = jax.process_index() != 0
        self._bar: rich.progress.TaskID | None = None
        if sys.stderr.isatty() and not self._silent:
            self._bar = _open_bars().add_task(
                description, total=total, completed=initial, rate="", fields=""
            )

    def update(self, count: int = 1, **fields: float) -> None:
        """Counts `count` more units; `fields` are numbers to show beside them."""
        self._done += count
        if fields:
            self._fields = "  ".join(f"{name} {value:.4g}" for name, value in fields.items())
        if self._bar is not None and _bars is not None:
            rate = f"{self._rate():.3g} {self._unit}/s"
            _bars.update(self._bar, completed=self._done, rate=rate, fields=self._fields)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._line()

    def _rate(self) -> float:
        """Returns units per second."""
        return (self._done - self._initial) / max(time.monotonic() - self._started, 1e-9)

    def _line(self) -> None:
        if self._silent:
            return
        self._last_line = time.monotonic()
        rate, total, left = self._rate(), "", ""
        if self._total is not None:
            total = f"/{self._total}"
            if rate and self._done < self._total:
                seconds = round((self._total - self._done) / rate)
                left = f", {datetime.timedelta(seconds=seconds)} left"
        print(
            f"{self._description}: {self._done}{total} {self._unit}, "
            f"{rate:.3g} {self._unit}/s{left}  {self._fields}",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        global _bars  # noqa: PLW0603
        if self._bar is None or _bars is None:
            self._line()
        elif len(_bars.tasks) > 1:
            _bars.remove_task(self._bar)
        else:  # the display ends with the last bar
            _bars.stop()
            _bars = None


def format_value(value: Any) -> str:
    """Formats a number to four significant digits, integers whole, and None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return f"{value:,.0f}" if isinstance(value, (int, float)) else str(value)


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Formats a Markdown table."""
    lines = [list(header), ["---"] * len(header)]
    lines += [[format_value(value) for value in row] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    """Prints a table, as Markdown where standard output is no terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)  # names may hold brackets
    if not console.is_terminal:
        print(markdown(header, rows))  # rich would break its lines
        return
    table = Table(*header, title=title or None)
    for row in rows:
        table.add_row(*(format_value(value) for value in row))
    console.print(table)
