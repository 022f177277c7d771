"""Generated programs are judged by their assertions alone, and cannot harm who judges them."""

import os
import time

import pytest

from tasks import code_execution

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
    program = "import os, sys\nfound = os.listdir('.')\nopen('mine', 'w').close()\n"
    tests = [
        # Python itself sets LC_CTYPE where there is no locale.
        "assert set(os.environ) <= {'LC_CTYPE'}",
        "assert found == []",
        f"assert os.getcwd() != {os.getcwd()!r}",
        f"assert {os.getcwd()!r} not in sys.path",
    ]
    before = sorted(os.listdir())
    for _ in range(2):  # the second finds nothing of the first
        assert code_execution.run(program, tests)
    assert sorted(os.listdir()) == before


def test_many_programs_are_judged_in_their_order():
    jobs = [(f"x = {number}", [f"assert x == {number} and x % 3"]) for number in range(8)]
    assert code_execution.run_all(jobs) == [bool(number % 3) for number in range(8)]
    assert code_execution.run_all([]) == []
