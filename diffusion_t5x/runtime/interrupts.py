"""What SIGTERM and Ctrl-C do while a command starts, trains and ends.

Before the training loop, and in all other commands, they end the process at once with a line and an
exit code: whatever is finished is in files. From its first step on the loop saves before it ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from diffusion_t5x.runtime.guards import INTERRUPTED, PREEMPTED, Interrupted, Preempted

_ENDS = {signal.SIGTERM: ("preempted", PREEMPTED), signal.SIGINT: ("interrupted", INTERRUPTED)}
# Seconds within which a second Ctrl-C counts as the first: some programs pass one on.
_SAME = 0.5

_handled: list[signal.Signals] = []  # in this process, by `end_on_signals`
_saves = threading.Event()  # a loop has begun that saves before it ends


@contextmanager
def end_on_signals() -> Iterator[None]:
    """Ends this process at SIGTERM or Ctrl-C, until `stop_on_signals` takes over.

    A thread does it: Python's own handlers wait for native code, and a compiler takes minutes.
    """
    if _handled or threading.current_thread() is not threading.main_thread():
        yield
        return
    _saves.clear()
    # What a shell or a supervisor ignores stays ignored.
    _handled.extend(n for n in _ENDS if signal.getsignal(n) is not signal.SIG_IGN)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True)
    thread.start()
    before_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *_: None) for number in _handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(before_fd)
        _handled.clear()
        os.close(writer)
        thread.join()
        os.close(reader)


def _watch(reader: int) -> None:
    first = float("inf")  # when the first Ctrl-C came
    while numbers := os.read(reader, 64):
        for number in numbers:
            again = number == signal.SIGINT and time.monotonic() - first > _SAME
            if number in _ENDS and (again or not _saves.is_set()):
                _end(signal.Signals(number))
            if number == signal.SIGINT:
                first = min(first, time.monotonic())


def _end(number: signal.Signals) -> None:
    word, code = _ENDS[number]
    what = "ended without saving" if _saves.is_set() else "nothing new to save"
    # What stages of `experiments` print goes to a file; whoever presses Ctrl-C is at the terminal.
    for stream in {sys.stdout, sys.__stdout__}:
        with suppress(Exception):
            text = f"{word}: {what}; the same command goes on from what is there."
            print(text, file=stream, flush=True)
    os._exit(code)


def _leave_to_parent() -> None:
    """Gives a forked process the handlers of a new one: its signals are not its parent's."""
    if _handled:
        signal.set_wakeup_fd(-1)
        for number in _handled:
            signal.signal(number, signal.SIG_DFL)
        _handled.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


class Stop:
    """Whether a training loop must end because of a signal.

    With several processes, JAX catches SIGTERM in whichever process gets it, and chooses a step
    that none of them has reached yet, so that all end at the same one.
    """

    def __init__(self, several: bool):
        self._several = several
        self._number: int | None = None

    def note(self, number: int, _: object = None) -> None:
        """Notes a signal, as its handler."""
        if number == self._number == signal.SIGINT and not _handled:  # as in a notebook
            raise KeyboardInterrupt
        self._number = number
        if number == signal.SIGINT:
            text = "interrupted: ends after this step, once it is saved; Ctrl-C again ends at once."
            with suppress(RuntimeError):  # in the middle of another line
                print(text, flush=True)
            if self._several:
                os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells the others

    def asked(self, step: int) -> bool:
        """Returns True where training must end, at this step."""
        if not self._several:
            return self._number is not None
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def ended(self, step: int) -> SystemExit:
        """Says that everything is saved; returns what to raise."""
        number = signal.Signals(self._number or signal.SIGTERM)
        print(f"{_ENDS[number][0]}: stopped at step {step}, and everything is saved.", flush=True)
        return Interrupted() if number == signal.SIGINT else Preempted()


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Catches SIGTERM and Ctrl-C for a loop that saves before it ends; yields what it asks.

    Signals that come afterwards, while the last checkpoint is written, change nothing; a second
    Ctrl-C ends the process at once.
    """
    import jax

    several = jax.process_count() > 1
    if several:
        _start_preemption_service()
    stop, before = Stop(several), {}
    _saves.set()
    with suppress(ValueError):  # only the main thread may catch signals
        for number in [signal.SIGINT] if several else list(_ENDS):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, stop.note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _start_preemption_service() -> None:
    """Starts JAX's service, off until now, since it takes SIGTERM while nothing asks for it."""
    import jax
    from jax._src import distributed

    if distributed.global_state.preemption_sync_manager is None:
        jax.config.update("jax_enable_preemption_service", True)
        distributed.global_state.initialize_preemption_sync_manager()
