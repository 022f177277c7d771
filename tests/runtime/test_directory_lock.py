"""Of two processes that write to one directory the second is refused; a dead one holds nothing."""

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from diffusion_t5x.runtime import directory_lock
from diffusion_t5x.runtime.directory_lock import FILE, InUseError, hold

HOLDER = """
    import os, subprocess, sys, time
    from diffusion_t5x.runtime import directory_lock
    with directory_lock.hold(sys.argv[1], "MODEL_DIR"):
        child = os.fork() or time.sleep(100)  # a child must not keep the lock
        other = subprocess.Popen(["sleep", "100"])
        print(child, other.pid, flush=True)
        time.sleep(100)
"""


def _start_holder(directory):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(directory)], stdout=subprocess.PIPE,
        text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    return process, [int(number) for number in process.stdout.readline().split()]


def test_the_second_is_refused_with_host_process_and_time_and_a_killed_one_leaves_nothing(tmp_path):
    run = tmp_path / "deep" / "run"
    process, children = _start_holder(run)
    try:
        words = (
            f"MODEL_DIR = '{run}' is being written to by another process \\(host "
            f"{re.escape(socket.gethostname())}, process {process.pid}, since 20"
        )
        for refused in (hold, lambda *args: directory_lock.check(*args) or hold(*args)):
            with pytest.raises(InUseError, match=words), refused(str(run), "MODEL_DIR"):
                pytest.fail("has the lock")
        process.kill()
        process.wait()
        for child in children:
            os.kill(child, 0)  # both still live
        with hold(str(run), "MODEL_DIR"):
            assert json.loads((run / FILE).read_text())["process"] == os.getpid()
        with hold(str(run), "MODEL_DIR"):
            pass
    finally:
        process.kill()
        for child in children:
            os.kill(child, 9)


def test_a_look_at_the_lock_writes_nothing(tmp_path):
    directory_lock.check(str(tmp_path / "run"), "MODEL_DIR")
    assert not list(tmp_path.iterdir())
    with hold(str(tmp_path), "MODEL_DIR"), pytest.raises(InUseError):
        directory_lock.check(str(tmp_path), "MODEL_DIR")
    directory_lock.check(str(tmp_path), "MODEL_DIR")


def test_where_the_system_knows_no_locks_a_line_says_so(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold(str(tmp_path), "MODEL_DIR"):
        assert f"{tmp_path}/.lock cannot be locked (No locks available)" in capsys.readouterr().out


def test_a_directory_that_cannot_be_written_to_is_an_error_of_the_system(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError), hold(str(tmp_path / "file" / "run"), "MODEL_DIR"):
        pass


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A directory that counts as one in a bucket, with short times."""
    monkeypatch.setattr(directory_lock.paths, "is_remote", lambda path: True)
    monkeypatch.setattr(directory_lock, "RENEWAL_SECONDS", 0.2)
    return tmp_path


def _lease(directory, **values):
    lease = {"host": "elsewhere", "process": 7, "since": "2026-01-01", "token": "a", **values}
    (directory / FILE).write_text(json.dumps(lease))


def test_a_lease_that_is_renewed_is_respected_and_its_end_frees_the_bucket(bucket):
    with hold(str(bucket), "MODEL_DIR"):
        words = f"host {re.escape(socket.gethostname())}, process {os.getpid()}, since"
        with pytest.raises(InUseError, match=words), hold(str(bucket), "MODEL_DIR"):
            pytest.fail("has the lease")
    assert not (bucket / FILE).exists()


def test_a_lease_that_nobody_renews_is_taken_after_a_while(bucket, capsys):
    _lease(bucket)
    started = time.monotonic()
    with hold(str(bucket), "MODEL_DIR"):
        assert time.monotonic() - started > 0.4
    assert "host elsewhere, process 7, since 2026-01-01: waits 0.5 s" in capsys.readouterr().out
    _lease(bucket, host=socket.gethostname(), process=2**22 + 1)  # greater than any
    started = time.monotonic()
    with hold(str(bucket), "MODEL_DIR"):
        assert time.monotonic() - started < 0.3


def test_of_two_that_start_together_in_a_bucket_the_one_that_was_overwritten_is_refused(
    bucket, monkeypatch
):
    monkeypatch.setattr(time, "sleep", lambda seconds: _lease(bucket))
    words = "host elsewhere, process 7, since 2026-01-01"
    with pytest.raises(InUseError, match=words), hold(str(bucket), "MODEL_DIR"):
        pytest.fail("has the lease")
    assert json.loads((bucket / FILE).read_text())["token"] == "a"
