"""Several processes on this machine that form one run, as the hosts of a pod slice do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from diffusion_t5x.runtime.exit_codes import RESTARTABLE

GRACE_SECONDS = 60.0  # between asking processes to stop and stopping them


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def process_argv(command: Sequence[str], processes: int, index: int, port: int) -> list[str]:
    """The command line of one process.

    Args:
      command: what each process runs, `python -m diffusion_t5x.train ...`.
      processes: how many there are.
      index: which one this is.
      port: that the first listens on.
    """
    if processes == 1:
        return list(command)
    return [
        *command,
        f"--coordinator_address=localhost:{port}",
        f"--process_count={processes}",
        f"--process_index={index}",
    ]


def process_environment(devices: int | None) -> dict[str, str]:
    """This environment, with so many simulated CPU devices; None leaves the devices as they are."""
    environment = dict(os.environ)
    if devices is not None:
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
        environment["JAX_PLATFORMS"] = "cpu"
    return environment


def _copy_lines(source: IO[bytes], prefix: str) -> None:
    for line in source:
        sys.stdout.write(prefix + line.decode("utf-8", "replace"))
        sys.stdout.flush()


class Group:
    """The processes of one attempt; all end when one of them fails."""

    def __init__(self, commands: Sequence[Sequence[str]], environment: Mapping[str, str]):
        """Starts the processes, the output of each behind its index."""
        self.processes = [
            subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for command in commands
        ]
        self._readers = [
            threading.Thread(target=_copy_lines, args=(process.stdout, f"[{index}] "), daemon=True)
            for index, process in enumerate(self.processes)
        ]
        for reader in self._readers:
            reader.start()

    def signal(self, number: int) -> None:
        """Sends a signal to the processes that still run."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> int:
        """Waits for the end; the code of the first process that failed, or 0.

        A process that fails leaves the others waiting for it, so they are stopped: asked first,
        since they may still be saving, and killed after `GRACE_SECONDS`.
        """
        failed, deadline = 0, None
        while any(process.poll() is None for process in self.processes):
            codes = [process.poll() for process in self.processes]
            if deadline is None and any(codes):
                failed = next(code for code in codes if code)
                self.signal(signal.SIGTERM)
                deadline = time.monotonic() + GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
            time.sleep(0.05)
        for reader in self._readers:
            reader.join()
        return failed or next((p.returncode for p in self.processes if p.returncode), 0)


def run(command: Sequence[str], processes: int, devices: int | None, max_restarts: int) -> int:
    """Runs the command in so many processes, again each time that it was preempted or hung.

    SIGTERM and interrupts to this process are handed on, and then nothing is started again.

    Args:
      command: what each process runs.
      processes: how many.
      devices: simulated CPU devices of each; None for the devices that there are.
      max_restarts: restarts after preemption or a hang.

    Returns:
      An exit code: 0, or that of the first process that failed.
    """
    stopping = False
    group: Group | None = None

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        stopping = True
        if group is not None:
            group.signal(signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for attempt in range(max_restarts + 1):
            port = free_port()
            commands = [process_argv(command, processes, i, port) for i in range(processes)]
            group = Group(commands, process_environment(devices))
            if stopping:
                group.signal(signal.SIGTERM)
            code = group.wait()
            if code not in RESTARTABLE or stopping or attempt == max_restarts:
                return code
            print(
                f"{RESTARTABLE[code]}; restart {attempt + 1} of at most {max_restarts}", flush=True
            )
        raise AssertionError("the last attempt returns")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
