"""Killed at random moments, every command ends as if it had not been; `chaos` does it at length."""

import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def results():
    """Of a process of its own: attempts are forks, and this one has computed too much to fork."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.tools.chaos", "--kills=2", "--seed=1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {line["command"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow  # tests of the loop, of evaluation and of inference each stop and resume one
@pytest.mark.parametrize("command", ["train", "eval", "infer"])
def test_what_was_killed_ends_with_the_same_bits_as_what_was_not(results, command):
    assert results[command]["same"]
    assert results[command]["kills"] == 2
