"""What hangs ends with its stacks and a code; what only takes long, or is stopped, does not."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import toy

from diffusion_t5x.commands.launch_local import free_port, process_argv, process_environment
from diffusion_t5x.runtime.exit_codes import DISK_FULL, HUNG, PREEMPTED
from diffusion_t5x.runtime.watchdog import Watchdog

TESTS = pathlib.Path(toy.__file__).parent


@pytest.fixture
def ended(monkeypatch):
    """Is filled where a watchdog would end this process."""
    ends = []
    monkeypatch.setattr(Watchdog, "_end", lambda self: ends.append(self._what) or self._over.set())
    return ends


def test_signs_of_life_and_suspension_keep_a_process_and_silence_ends_it(ended):
    with Watchdog(0.6) as watchdog:
        for step in range(8):
            watchdog.beat(f"step {step}")
            time.sleep(0.1)
        with watchdog.suspended():
            time.sleep(1.0)
        time.sleep(0.1)
        assert not ended
        time.sleep(1.5)
    assert ended == ["step 7"]


@pytest.mark.parametrize("timeout", [None, 0])
def test_without_a_limit_nothing_is_watched(ended, timeout):
    with Watchdog(timeout) as watchdog:
        watchdog.beat("step 1")
        assert not watchdog._thread.is_alive()


def test_a_negative_limit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="step_timeout_seconds = -1; expected seconds, or None"):
        toy.run(tmp_path, 1, step_timeout_seconds=-1)


def test_compilation_and_evaluations_take_what_they_take(ended, tmp_path, monkeypatch):
    from diffusion_t5x.training.train_step import Trainer

    original = Trainer.metric_shapes, Trainer.eval_metric_shapes

    def slowly(function):
        return lambda *args: time.sleep(2.0) or function(*args)

    monkeypatch.setattr(Trainer, "metric_shapes", slowly(original[0]))
    monkeypatch.setattr(Trainer, "eval_metric_shapes", slowly(original[1]))
    validation = {"train_eval_dataset_cfg": toy.dataset_cfg("validation"), "eval_period": 2}
    toy.run(tmp_path / "watched", 3, step_timeout_seconds=1.5, save=None, **validation)
    assert not ended


HANGS = """
import threading, time
from diffusion_t5x.runtime.watchdog import Watchdog

def a_function_that_hangs():
    time.sleep(1000)

with Watchdog({timeout}) as watchdog:
    watchdog.beat("step 7")
    print("ready", flush=True)
    a_function_that_hangs()
"""


def _start(program, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"}, **kwargs,
    )  # fmt: skip


def test_the_message_names_the_step_and_the_stacks_what_hung_and_the_code_is_its_own():
    process = _start(HANGS.format(timeout=1))
    _, text = process.communicate(timeout=60)
    assert process.returncode == HUNG
    assert len({HUNG, PREEMPTED, DISK_FULL, 0, 1}) == 5
    assert "process 0 of 1: step 7 has not come for 1 seconds" in text
    assert "in a_function_that_hangs" in text


def test_time_for_which_a_whole_process_was_stopped_does_not_count():
    process = _start(HANGS.format(timeout=4))
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(5)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.5)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_where_one_of_two_processes_hangs_the_other_ends_and_tells_where_it_was(tmp_path):
    run = tmp_path / "run"
    flags = [
        "--gin_file=models/tiny.gin", "--gin_file=objectives/diffusion.gin",
        "--gin_file=runs/pretrain.gin", "--gin.MIXTURE_OR_TASK_NAME=toy_copy",
        "--gin.MIXTURE_OR_TASK_MODULE=register_toy", "--gin.vocabularies.get_vocabulary.name=bytes",
        "--gin.vocabularies.get_vocabulary.extra_ids=0",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 6, 'targets': 6}", "--gin.BATCH_SIZE=8",
        "--gin.TRAIN_STEPS=100000", "--gin.EVAL_PERIOD=100000", "--gin.CHECKPOINT_PERIOD=5",
        "--gin.config.TransformerConfig.num_layers=1", f"--gin.MODEL_DIR={run}",
        "--gin.trainer.train.train_eval_dataset_cfg=None",
        "--gin.trainer.train.step_timeout_seconds=10",
        "--gin.checkpoints.SaveCheckpointConfig.keep=2",
    ]  # fmt: skip
    (tmp_path / "register_toy.py").write_text("import toy\ntoy.register()\n")
    port = free_port()
    environment = {
        **process_environment(1), "PYTHONPATH": f"{tmp_path}:{TESTS}:{TESTS.parents[1]}",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            process_argv([sys.executable, "-m", "diffusion_t5x.train", *flags], 2, index, port),
            env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        while not list(run.glob("checkpoint_?")):
            assert all(process.poll() is None for process in processes)
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGSTOP)
        started = time.monotonic()
        _, text = processes[0].communicate(timeout=80)
        # JAX's own heartbeat tells of a stopped process after 100 seconds, of a hung one never.
        assert time.monotonic() - started < 60
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == HUNG, text[-3000:]
    assert "process 0 of 2: step " in text
    assert "has not come for 10 seconds" in text
    assert 'diffusion_t5x/training/loop.py", line' in text
    assert list(run.glob("checkpoint_*"))
