"""Generated programs are judged by their assertions alone, and honest ones get what they need."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import pytest

from tasks import code_execution
from tasks.code_execution import Limits, SandboxError

ADD = "def add(a, b):\n    return a + b"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


def test_a_program_that_passes_its_assertions_succeeds():
    assert code_execution.run(ADD, TESTS)


@pytest.mark.parametrize(
    "program",
    [
        "",
        "def add(a, b):\n    return a - b",
        "def add(a, b:\n    return a + b",
        "def subtract(a, b):\n    return a - b",
        "raise SystemExit",
        ADD + "\ndef",
        ADD + "\nif True:",
        ADD + "\n'''",
        ADD + "\nimport sys; sys.exit(0)",
        ADD + "\nimport os; os._exit(0)",
        ADD + "\nimport os; os.kill(os.getpid(), 9)",
        "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b):\n    return 4",
        "print('0123456789abcdef' * 2)",
        "print('True'); print('OK'); import os; os._exit(0)",
        "\0",
        ADD + "\0",
        "# \ud800",
    ],
)
def test_nothing_but_the_end_of_the_assertions_is_success(program):
    assert not code_execution.run(program, TESTS)


def test_one_failing_assertion_among_passing_ones_is_failure():
    assert not code_execution.run(ADD, [*TESTS, "assert add(2, 2) == 5"])
    assert not code_execution.run(ADD, ["assert add(2, 2) == 5", *TESTS])


def test_what_a_program_prints_does_not_matter():
    chatty = "print('x' * 100_000)\nprint('é', end='')\n" + ADD + "\nprint('no line end', end='')"
    assert code_execution.run(chatty, TESTS)


def test_a_program_longer_than_any_argument_of_a_process_may_be_still_runs():
    assert code_execution.run(ADD + "\n" + "# long\n" * 50_000, TESTS)


def test_a_program_finds_neither_input_nor_its_own_text():
    nosy = (
        "import os, sys\n"
        "sys.stdin.seek(0) if sys.stdin.seekable() else None\n"
        "seen = sys.stdin.read() + ''.join(sys.orig_argv) + ''.join(map(str, globals().values()))\n"
    )
    assert code_execution.run(nosy, ["assert 'needle' + '' not in seen"])
    assert not code_execution.run("input()", [])


@pytest.mark.parametrize("program", ["while True:\n    pass", "import time\ntime.sleep(60)"])
def test_an_endless_program_is_killed_within_its_time(program):
    start = time.monotonic()
    assert not code_execution.run(ADD + "\n" + program, TESTS, wall_seconds=0.5)
    assert time.monotonic() - start < 3


def test_children_of_a_program_die_with_it(tmp_path):
    alive = tmp_path / "alive"
    program = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    time.sleep(1)\n"
        f"    open({str(alive)!r}, 'w').close()\n"
        "    os._exit(0)\n"
    )
    assert code_execution.run(program + ADD, TESTS)
    time.sleep(1.5)
    assert not alive.exists()


@pytest.mark.parametrize(
    "program",
    [
        "hoard = bytearray(2**30)",
        "hoard = []\nwhile True:\n    hoard.append(bytearray(2**24))",
        "import sys\nfor _ in range(64):\n    sys.stdout.write('x' * 2**16)\nsys.stdout.flush()",
        "open('big', 'wb').write(bytes(2**21))",
        "files = [open('/dev/null') for _ in range(40)]",
    ],
)
def test_a_program_beyond_its_limits_fails_at_once(program):
    start = time.monotonic()
    assert not code_execution.run(ADD + "\n" + program, TESTS)
    assert time.monotonic() - start < code_execution.Limits().wall_seconds


def test_the_environment_is_empty_and_the_directory_is_its_own(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "secret")
    program = (
        "import os, sys\nfound = os.listdir('.')\nopen('mine', 'w').close()\n"
        "environment, here, path = dict(os.environ), os.getcwd(), list(sys.path)\n"
    )
    tests = [
        # Python itself sets LC_CTYPE where there is no locale.
        "assert set(environment) <= {'LC_CTYPE'}",
        "assert found == []",
        f"assert here != {os.getcwd()!r}",
        f"assert {os.getcwd()!r} not in path and not any('tasks' in name for name in path)",
        # Modules that a program imports are, in an assertion, those of the assertion's process.
        "assert set(os.environ) <= {'LC_CTYPE'}",
    ]
    before = sorted(os.listdir())
    for _ in range(2):  # the second finds nothing of the first
        assert code_execution.run(program, tests)
    assert sorted(os.listdir()) == before


def test_many_programs_are_judged_in_their_order():
    jobs = [(f"x = {number}", [f"assert x == {number} and x % 3"]) for number in range(8)]
    assert code_execution.run_all(jobs) == [bool(number % 3) for number in range(8)]
    assert code_execution.run_all([]) == []


HONEST = {
    "the standard library": (
        "import array, bisect, collections, copy, dataclasses, datetime, decimal, enum, fractions\n"
        "import functools, hashlib, heapq, io, itertools, json, math, operator, random, re\n"
        "import statistics, string, sys, textwrap, typing, unicodedata, uuid, zoneinfo\n"
        "def f(): return hashlib.sha256(json.dumps([1]).encode()).hexdigest()[:4]",
        ["assert f() == '080a'", "assert math.floor(2.5) == 2", "assert sys.version_info >= (3,)"],
    ),
    "deep recursion": (
        "def depth(n): return 0 if n == 0 else 1 + depth(n - 1)",
        ["assert depth(900) == 900"],
    ),
    "threads and processes": (
        "import concurrent.futures, threading\n"
        "def f(xs):\n"
        "    with concurrent.futures.ThreadPoolExecutor(4) as pool:\n"
        "        return list(pool.map(lambda x: x * x, xs))\n",
        ["assert f(range(5)) == [0, 1, 4, 9, 16]"],
    ),
    "temporary files": (
        "import os, tempfile\n"
        "def f():\n"
        "    with tempfile.TemporaryDirectory() as d, open(d + '/x', 'w+') as file:\n"
        "        file.write('kept'); file.seek(0)\n"
        "        return file.read(), os.listdir(d)\n",
        ["assert f() == ('kept', ['x'])"],
    ),
    "a closed or replaced output": (
        "import io, sys\nprint('x')\nsys.stdout.close()\nsys.stdout = io.StringIO()\n"
        "def f():\n    print('y')\n    return sys.stdout.getvalue()",
        ["assert f() == 'y\\n'"],
    ),
    "every kind of value there and back": (
        "def same(x): return x",
        [
            f"assert same({value}) == {value} and type(same({value})) is type({value})"
            for value in (
                "None", "True", "...", "-1", "2**4000", "-2**63", "1.5", "float('inf')", "-0.0",
                "1 + 2j", "'é\\0'", "b'x'", "bytearray(b'y')", "(1, (2,))", "[1, [2]]",
                "{1: {2: 3}}", "{1, 2}", "frozenset({1})", "range(1, 9, 2)",
                "''", "()", "[]", "{}", "set()",
                "__import__('collections').Counter('aab')",
                "__import__('collections').deque([1], 2)",
                "__import__('collections').OrderedDict(b=1, a=2)",
                "__import__('fractions').Fraction(1, 3)", "__import__('decimal').Decimal('0.10')",
                "__import__('datetime').date(2020, 2, 29)",
                "__import__('array').array('i', [1, 2])",
            )
        ]
        + ["assert same(int) is int",
           "assert str(same(-0.0)) == '-0.0'", "assert same(1) is not True",
           "x = float('nan')", "assert same(x) != same(x)"],
    ),
    "arguments that are changed in place": (
        "def f(xs, d, s, b):\n    xs.sort(); d['new'] = xs; s.add(3); b.extend(b'z'); return xs\n"
        "def g(x): x.append(x[0])\n"
        "def same(a, b): return a is b",
        [
            "xs, d, s, b = [3, 1, 2], {}, {1}, bytearray(b'y')",
            "assert f(xs, d, s, b) is xs",
            "assert (xs, d, s, b) == ([1, 2, 3], {'new': [1, 2, 3]}, {1, 3}, b'yz')",
            "assert d['new'] is xs",
            "inner = [0]",
            "x = [inner, inner]",
            "g(x)",
            "assert len(x) == 3 and x[2] is inner",
            "assert same(x, x) and not same([], [])",
            "loop = []",
            "loop.append(loop)",
            "g(loop)",
            "assert loop[1] is loop",
        ],
    ),
    "classes, their objects and what derives from built-in ones": (
        "import collections, dataclasses, enum\n"
        "class Node:\n"
        "    def __init__(self, value): self.value, self.left = value, None\n"
        "    def total(self): return self.value + (self.left.total() if self.left else 0)\n"
        "class Stack(list):\n    def push(self, x): self.append(x)\n"
        "@dataclasses.dataclass\nclass Point:\n    x: int\n"
        "Pair = collections.namedtuple('Pair', 'a b')\n"
        "class Color(enum.Enum):\n    RED = 1\n"
        "class Level(enum.IntEnum):\n    LOW = 1\n"
        "def pair(): return Pair(1, 2)\n"
        "def red(): return Color.RED\n",
        [
            "root = Node(1)\nroot.left = Node(2)",
            "assert root.total() == 3 and root.left.value == 2 and root.left is not None",
            "s = Stack()",
            "s.push(5)",
            "assert s == [5] and len(s) == 1 and s[0] == 5 and list(s) == [5] and 5 in s",
            "s[0] = 6\nassert s == [6]\ndel s[0]\nassert not s",
            "assert Point(1) == Point(1) and Point(1) != Point(2) and Point(1) != 1",
            "assert pair() == (1, 2) and pair().b == 2",
            "assert red() == Color.RED and red().value == 1 and Level.LOW == 1",
            "assert str(Point(3)) == 'Point(x=3)'",
        ],
    ),
    "generators and iterators, both ways": (
        "def count():\n    n = 0\n    while True:\n        yield n\n        n += 1\n"
        "def total(xs): return sum(xs)",
        [
            "numbers = count()",
            "assert [next(numbers), next(numbers)] == [0, 1]",
            "assert total(x for x in (1, 2)) == 3 and total(map(int, '12')) == 3",
        ],
    ),
    "functions as arguments and as results": (
        "def compose(f, g): return lambda x: f(g(x))\n"
        "def apply(f, *args, **kwargs): return f(*args, **kwargs)",
        [
            "assert compose(lambda x: x + 1, lambda x: 2 * x)(3) == 7",
            "assert apply(sorted, [1, 3, 2], reverse=True) == [3, 2, 1]",
            "def raising(): raise KeyError('k')",
            "try:\n    apply(raising)\nexcept KeyError: pass\nelse: assert False",
        ],
    ),
    "errors that an assertion expects": (
        "class Special(ValueError): pass\ndef f(x):\n    if x < 0: raise Special('negative')\n"
        "    return 1 // x",
        [
            "try:\n    f(-1)\n    assert 0\nexcept ValueError as e:\n    assert 'neg' in str(e)",
            "try:\n    f(0)\n    assert False\nexcept ZeroDivisionError: pass",
        ],
    ),
    "a function that has a built-in one's name": (
        "def sum(a, b): return a + b", ["assert sum(10, 15) == 25", "assert sum(1, 2) == 3"],
    ),
    "HumanEval's form": (
        "from typing import List\nSCALE = 2\n\ndef twice(xs: List[int]) -> List[int]:\n"
        "    return [SCALE * x for x in xs]\n\nif __name__ == '__main__':\n    input()\n",
        [
            "\n\nMETADATA = {'author': 'x'}\n\n\ndef check(candidate):\n    import random\n"
            "    rng = random.Random(0)\n    for _ in range(20):\n"
            "        xs = [rng.randint(-9, 9) for _ in range(5)]\n"
            "        assert candidate(xs) == [SCALE * x for x in xs], 'message'\n",
            "check(twice)",
        ],
    ),
    "carriage returns and tabs": ("def f(): \r\n\treturn 1\r\n", ["x = f()\r\nassert x == 1\r\n"]),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_are_not_in_the_way_of_the_sandbox(name):
    program, tests = HONEST[name]
    assert code_execution.run(program, tests)
    # Each of these assertions is really made.
    assert not code_execution.run(program, [*tests, "assert False"])


def test_no_process_outlives_a_trainer_that_is_killed(tmp_path):
    tasks = str(pathlib.Path(code_execution.__file__).parent)
    script = textwrap.dedent(f"""
        import sys, tempfile, types
        tempfile.tempdir = {str(tmp_path)!r}
        package = types.ModuleType("tasks")
        package.__path__ = [{tasks!r}]
        sys.modules["tasks"] = package
        from tasks import code_execution
        assert code_execution.run("", [])
        print("ready", flush=True)
        code_execution.run("import time; time.sleep(99)", [], wall_seconds=99)
    """)
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout.readline() == "ready\n"
    children = f"/proc/{trainer.pid}/task/{trainer.pid}/children"
    until = time.monotonic() + 10
    while not (pids := pathlib.Path(children).read_text().split()) and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.3)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < until:
        time.sleep(0.01)
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert pids
    assert not [
        line for line in left.splitlines() if "sandbox" in line and f" {trainer.pid} " in line
    ]


@pytest.fixture
def _fresh():
    """What is found out once is found out again."""
    before = code_execution._limits
    code_execution._mode.cache_clear(), code_execution._warn.cache_clear()
    yield
    code_execution._limits = before
    code_execution._mode.cache_clear(), code_execution._warn.cache_clear()


def _only(*modes):
    """A `_run` under which only some protections work; programs then run under the best."""
    original = code_execution._run

    def run(mode, *args):
        if mode not in modes:
            raise SandboxError("refused here")
        return original(mode, *args)

    return run


@pytest.mark.usefixtures("_fresh")
def test_what_is_missing_is_said_once(monkeypatch):
    monkeypatch.setattr(code_execution, "_run", _only("landlock", "bare"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        code_execution.configure(allow_unprotected=True)
        assert code_execution.run(ADD, TESTS)
        assert not code_execution.run("", TESTS)
    [warning] = [str(w.message) for w in caught if "sandbox" in str(w.message)]
    assert warning.startswith("the sandbox for generated code lacks namespaces")
    assert "refused here" in warning


@pytest.mark.usefixtures("_fresh")
def test_where_nothing_protects_nothing_runs_unless_it_is_allowed(monkeypatch):
    monkeypatch.setattr(code_execution, "_run", _only("bare"))
    with pytest.raises(
        SandboxError, match=r"neither namespaces nor Landlock.*allow_unprotected=True"
    ):
        code_execution.run(ADD, TESTS)
    code_execution.configure(allow_unprotected=True)
    with pytest.warns(UserWarning, match="lacks namespaces and Landlock: the program may read"):
        assert code_execution.run_all([(ADD, TESTS), ("", TESTS)]) == [True, False]


@pytest.mark.usefixtures("_fresh")
def test_limits_are_configured_by_name_and_must_be_positive():
    slow = "import time\ntime.sleep(0.7)\n" + ADD
    assert code_execution.run(slow, TESTS)
    assert code_execution.configure(wall_seconds=0.4) == dataclasses.replace(
        Limits(), wall_seconds=0.4
    )
    assert not code_execution.run(slow, TESTS)
    assert code_execution.run(slow, TESTS, wall_seconds=5)
    with pytest.raises(ValueError, match="processes = 0; expected more than 0"):
        code_execution.configure(processes=0)
    with pytest.raises(TypeError, match="wall_second"):
        code_execution.configure(wall_second=3)
