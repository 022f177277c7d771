"""Several processes on this machine that form one run, as the hosts of a TPU slice do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent import futures
from typing import IO, cast

from diffusion_t5x.runtime.guards import INTERRUPTED, PREEMPTED, RESTARTABLE

GRACE_SECONDS = 60.0  # between SIGTERM and SIGKILL


def free_port() -> int:
    """Returns a port of this machine that is not in use."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def process_argv(command: Sequence[str], processes: int, index: int, port: int) -> list[str]:
    """Returns the command line of process `index`, of those that find each other at `port`."""
    if processes == 1:
        return list(command)
    return [
        *command,
        f"--coordinator_address=localhost:{port}",
        f"--process_count={processes}",
        f"--process_index={index}",
    ]


def process_environment(devices: int | None) -> dict[str, str]:
    """Returns this environment, with `devices` simulated CPU devices unless that is None."""
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


def _signal(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _first_failure(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    code = next((code for process in processes if (code := process.poll())), 0)
    # In its first tenth of a second, a command does not yet catch the signal.
    return PREEMPTED if code == -signal.SIGTERM else code


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits for all processes, and returns the exit code of the first that failed, or 0.

    The others would wait for a process that failed. They get SIGTERM, since they may still be
    saving, and SIGKILL after `GRACE_SECONDS`.
    """
    failed, deadline = 0, float("inf")
    while any(process.poll() is None for process in processes):
        failed = failed or _first_failure(processes)
        if failed and deadline == float("inf"):
            _signal(processes, signal.SIGTERM)
            deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            _signal(processes, signal.SIGKILL)
        time.sleep(0.05)
    return failed or _first_failure(processes)


def run(command: Sequence[str], processes: int, devices: int | None, max_restarts: int) -> int:
    """Runs a command in several processes, and restarts them after preemption or a hang.

    The output of each process is printed behind its index. SIGTERM and SIGINT end the processes,
    which are then not restarted; a second one ends them at once.

    Args:
      command: The command line common to all processes, `python -m diffusion_t5x.train ...`.
      processes: Their number.
      devices: Simulated CPU devices per process; None keeps the real devices.
      max_restarts: The maximum number of restarts.

    Returns:
      The exit code of the first process that failed, or 0; `INTERRUPTED` after SIGINT.
    """
    running: list[subprocess.Popen[bytes]] = []
    stopping = 0  # the signal

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        _signal(running, signal.SIGKILL if stopping else signal.SIGTERM)
        stopping = number

    def attempt() -> int:
        port, environment = free_port(), process_environment(devices)
        running.clear()
        with futures.ThreadPoolExecutor(processes) as readers:
            for index in range(processes):
                process = subprocess.Popen(
                    process_argv(command, processes, index, port),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                running.append(process)
                readers.submit(_copy_lines, cast(IO[bytes], process.stdout), f"[{index}] ")
            if stopping:  # a signal may have come before the last process was in the list
                _signal(running, signal.SIGTERM)
            return _wait(running)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = attempt()
        for restart in range(1, max_restarts + 1):
            if code not in RESTARTABLE or stopping:
                break
            print(f"{RESTARTABLE[code]}; restart {restart} of at most {max_restarts}", flush=True)
            code = attempt()
        return INTERRUPTED if code and stopping == signal.SIGINT else code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
