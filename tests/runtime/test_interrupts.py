"""SIGTERM and Ctrl-C end a command with a line and a code, at once or once everything is saved."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from diffusion_t5x.runtime.guards import INTERRUPTED, PREEMPTED

WAYS = [(signal.SIGTERM, PREEMPTED, "preempted"), (signal.SIGINT, INTERRUPTED, "interrupted")]


def _start(text, **kwargs):
    """Starts a program, and returns when it has printed 'ready'."""
    head = (
        "import ctypes, os, signal, subprocess, sys, time\n"
        "from diffusion_t5x.runtime import interrupts\n"
        "import jax; jax.process_count = lambda: 1\n"
    )
    if "stop_on" not in text:
        head = head.replace("import jax; jax.process_count = lambda: 1\n", "")
    process = subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(text)], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        bufsize=0,  # else what is read with the first line is lost for `communicate`
        **kwargs,
    )  # fmt: skip
    assert process.stdout.readline() == b"ready\n", process.stdout.read()
    return process


def _end(process):
    try:
        output, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    return process.returncode, output.decode()


# A read that begins again after a signal, as native code that takes minutes: no handler of
# Python's can run meanwhile.
NATIVE = """
    libc, (reader, _) = ctypes.CDLL(None), os.pipe()
    with interrupts.end_on_signals():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.siginterrupt(number, False)
        print("ready", flush=True)
        libc.read(reader, ctypes.create_string_buffer(1), 1)
"""
PYTHON = """
    with interrupts.end_on_signals():
        print("ready", flush=True)
        try:
            while True:
                time.sleep(0.01)
        except BaseException as error:
            print("caught", error)
"""


@pytest.mark.parametrize("program", [NATIVE, PYTHON], ids=["native", "python"])
@pytest.mark.parametrize(("number", "code", "word"), WAYS)
def test_a_start_is_ended_at_once_with_a_line_also_in_native_code(program, number, code, word):
    process = _start(program)
    process.send_signal(number)
    line = f"{word}: nothing new to save; the same command goes on from what is there.\n"
    assert _end(process) == (code, line)


REDIRECTED = PYTHON.replace("    with", "    sys.stdout = open(os.devnull, 'w')\n    with", 1)


def test_the_line_is_at_the_terminal_though_output_goes_to_a_file():
    process = _start(REDIRECTED.replace('"ready"', '"ready", file=sys.__stdout__'))
    process.send_signal(signal.SIGINT)
    line = "interrupted: nothing new to save; the same command goes on from what is there.\n"
    assert _end(process) == (INTERRUPTED, line)


LOOP = """
    with interrupts.end_on_signals():
        with interrupts.stop_on_signals() as stop:
            for step in range(1, 1000):
                if step == 2:
                    print("ready", flush=True)
                time.sleep(0.05)
                if stop.asked(step):
                    break
        time.sleep({saving})  # the last checkpoint is being written
        print("saved", step < 999)
        raise stop.ended(step)
"""


@pytest.mark.parametrize(("number", "code", "word"), WAYS)
def test_a_loop_ends_itself_and_a_signal_while_it_saves_changes_nothing(number, code, word):
    process = _start(LOOP.format(saving=1))
    process.send_signal(number)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    code_found, output = _end(process)
    assert code_found == code
    assert "saved True" in output
    assert f"{word}: stopped at step " in output and "Traceback" not in output


def test_a_second_ctrl_c_ends_at_once_and_one_that_is_passed_on_twice_counts_once():
    process = _start(LOOP.format(saving=100))
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, output = _end(process)
    assert code == INTERRUPTED
    assert "ends after this step" in output and "interrupted: ended without saving" in output


def test_what_a_shell_ignores_stays_ignored():
    process = _start(PYTHON, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert _end(process)[0] == PREEMPTED


def test_a_forked_process_is_ended_alone_and_handlers_are_as_before_afterwards():
    process = _start(
        """
        before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
        with interrupts.end_on_signals():
            child = os.fork()
            if not child:
                time.sleep(100)
            time.sleep(0.2)
            os.kill(child, signal.SIGTERM)
            print("ready", flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            time.sleep(0.3)
        assert before == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
        assert signal.set_wakeup_fd(-1) == -1
        """
    )
    assert _end(process) == (0, f"{-signal.SIGTERM}\n")
