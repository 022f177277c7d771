"""Preemption, hangs and full disks end a process with a code of its own, and harm nothing."""

import errno
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
import toy

from diffusion_t5x import train
from diffusion_t5x.checkpointing import integrity
from diffusion_t5x.checkpointing.checkpoints import (
    Checkpointer,
    RestoreCheckpointConfig,
    SaveCheckpointConfig,
    list_checkpoints,
)
from diffusion_t5x.commands.launch_local import free_port, process_argv, process_environment
from diffusion_t5x.data import datasets
from diffusion_t5x.evaluation import inference
from diffusion_t5x.runtime.guards import (
    DISK_FULL,
    HUNG,
    PREEMPTED,
    DiskFull,
    Watchdog,
    find_full_disk,
    stops_when_full,
)
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.train_state import TrainState

TESTS = pathlib.Path(toy.__file__).parent
FLAGS = [
    "--gin_file=models/tiny.gin", "--gin_file=objectives/autoregressive.gin",
    "--gin_file=runs/pretrain.gin", "--gin.MIXTURE_OR_TASK_NAME=toy_copy",
    "--gin.MIXTURE_OR_TASK_MODULE=register_toy", "--gin.vocabularies.get_vocabulary.name=bytes",
    "--gin.vocabularies.get_vocabulary.extra_ids=0", "--gin.VOCAB_SIZE=264",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 6, 'targets': 6}", "--gin.BATCH_SIZE=8",
    "--gin.config.TransformerConfig.num_layers=1",
    "--gin.trainer.train.train_eval_dataset_cfg=None",
]  # fmt: skip


@pytest.fixture
def register_toy(tmp_path, monkeypatch):
    """A module that registers the toy task."""
    (tmp_path / "register_toy.py").write_text("import toy\ntoy.register()\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_every_exit_code_means_one_thing():
    assert len({HUNG, PREEMPTED, DISK_FULL, 0, 1, 2}) == 6


@pytest.fixture
def ended(monkeypatch):
    """Is filled where a watchdog would end this process."""
    ends = []
    monkeypatch.setattr(
        Watchdog, "_end", lambda self: ends.append(self._awaited) or self._over.set()
    )
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


@pytest.mark.slow  # the loop suspends the watchdog, which test_signs_of_life... tests, in a run
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
import ctypes, threading, time
from diffusion_t5x.runtime.guards import Watchdog

def a_function_that_hangs():
    {hang}

with Watchdog({timeout}) as watchdog:
    watchdog.beat("step 7")
    print("ready", flush=True)
    a_function_that_hangs()
"""


def _start(timeout, hang="time.sleep(1000)"):
    return subprocess.Popen(
        [sys.executable, "-c", HANGS.format(timeout=timeout, hang=hang)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def test_a_hang_ends_with_its_own_code_and_the_message_names_step_and_stacks():
    process = _start(timeout=1)
    _, text = process.communicate(timeout=60)
    assert process.returncode == HUNG
    assert "process 0 of 1: step 7 has not come for 1 seconds" in text
    assert "in a_function_that_hangs" in text


def test_a_hang_in_native_code_that_holds_pythons_lock_ends_too():
    # Functions of a PyDLL are called without giving up the lock; the thread must have ticked once.
    process = _start(timeout=0.5, hang="time.sleep(0.3); ctypes.PyDLL(None).sleep(1000)")
    _, text = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "in a_function_that_hangs" in text


def test_time_for_which_a_whole_process_is_stopped_does_not_count():
    process = _start(timeout=4)
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
def test_where_one_of_two_processes_hangs_the_other_ends_and_names_the_place(
    tmp_path, register_toy
):
    run = tmp_path / "run"
    flags = [
        *FLAGS, "--gin.TRAIN_STEPS=100000", "--gin.EVAL_PERIOD=100000",
        "--gin.CHECKPOINT_PERIOD=5", f"--gin.MODEL_DIR={run}",
        "--gin.trainer.train.step_timeout_seconds=10",
        "--gin.checkpoints.SaveCheckpointConfig.keep=2",
    ]  # fmt: skip
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
        # JAX's own heartbeat notices a stopped process after 100 seconds, a hung one never.
        assert time.monotonic() - started < 60
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == HUNG, text[-3000:]
    assert "process 0 of 2: step " in text
    assert "has not come for 10 seconds" in text
    assert 'diffusion_t5x/training/loop.py", line' in text
    assert list(run.glob("checkpoint_*"))


def _raised_from(cause):
    try:
        raise ValueError("it failed") from cause
    except ValueError as error:
        return error


FULL = {
    "an error of the system": OSError(errno.ENOSPC, "whatever"),
    "a quota": OSError(errno.EDQUOT, "whatever"),
    "TensorFlow's": tf.errors.ResourceExhaustedError(None, None, "a/b; No space left on device"),
    "TensorStore's": ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']"),
    "one behind another": _raised_from(OSError(errno.ENOSPC, "whatever")),
}
OTHERS = {
    "memory": tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor"),
    "a file that is not there": FileNotFoundError(errno.ENOENT, "No such file"),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_a_full_disk_is_found_in_the_words_of_every_library(error, tmp_path, capsys):
    with pytest.raises(DiskFull) as stopped, stops_when_full(tmp_path / "not" / "there"):
        raise error
    assert stopped.value.code == DISK_FULL != PREEMPTED
    text = capsys.readouterr().err
    assert f"{tmp_path}/not/there cannot be written to" in text
    assert "bytes are free on the disk mounted at /" in text


@pytest.mark.parametrize("error", OTHERS.values(), ids=OTHERS)
def test_other_errors_pass_through(error, tmp_path):
    assert find_full_disk(error) is None
    with pytest.raises(type(error)), stops_when_full(tmp_path):
        raise error


@contextmanager
def _files_of_at_most(size):
    """The system refuses to write longer files, as it refuses to write to a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The state after six steps, and a run of the first two."""
    directory = tmp_path_factory.mktemp("straight")
    toy.run(directory / "run", 2)
    return toy.run(directory / "whole", 6), directory / "run"


@pytest.mark.parametrize(
    ("size", "file"),
    [
        (5_000, "checkpoint_4"),
        pytest.param(200_000, "shard-00000-of-00001", marks=pytest.mark.slow),
        pytest.param(1_000, "model-info.txt", marks=pytest.mark.slow),
    ],
    ids=["arrays", "data position", "description"],
)
def test_a_run_that_cannot_write_stops_and_resumes_once_it_can(tmp_path, straight, size, file):
    state, two_steps = straight
    run = pathlib.Path(shutil.copytree(two_steps, tmp_path / "run"))
    with pytest.raises(DiskFull) as stopped, stops_when_full(run), _files_of_at_most(size):
        toy.run(run, 40)
    assert "File too large" in stopped.value.message
    assert file in stopped.value.message
    assert [step for step, _ in list_checkpoints(str(run))] == [2]
    integrity.verify(run / "checkpoint_2", ("params", "optimizer", "dataset"))
    jax.tree.map(np.testing.assert_array_equal, state, toy.run(run, 6))


@pytest.mark.slow
def test_a_command_that_cannot_write_its_metrics_ends_with_the_code_and_names_the_directory(
    tmp_path, register_toy, capsys
):
    flags = ["--gin.TRAIN_STEPS=400", "--gin.trainer.train.log_period=1",
             "--gin.checkpoints.CheckpointConfig.save=None"]  # fmt: skip
    with pytest.raises(SystemExit) as stopped, _files_of_at_most(20_000):
        train.main([*FLAGS, *flags, f"--gin.MODEL_DIR={tmp_path / 'run'}"])
    assert stopped.value.code == DISK_FULL
    text = f"{tmp_path}/run cannot be written to: File too large"
    assert text in capsys.readouterr().err
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert 0 < len(lines) <= 20_000


@pytest.mark.slow  # what writes them is tested here for a run, and parts in test_inference
def test_predictions_that_cannot_be_written_stop_and_resume_once_they_can(tmp_path):
    run, output = tmp_path / "run", tmp_path / "output"
    toy.run(run, 1, save=SaveCheckpointConfig(period=1))

    def infer():
        [path] = inference.infer(
            model=toy.model(),
            restore_checkpoint_cfg=RestoreCheckpointConfig(str(run)),
            partitioner=PjitPartitioner(),
            dataset_cfg=toy.dataset_cfg("validation", batch_size=4),
            output_dir=str(output),
        )
        return len(pathlib.Path(path).read_text().splitlines())

    with pytest.raises(DiskFull) as stopped, stops_when_full(output), _files_of_at_most(200):
        infer()
    assert f"{output} cannot be written to: File too large" in stopped.value.message
    assert infer() == toy.NUM_EXAMPLES["validation"]


def test_what_fails_in_the_background_is_seen_while_other_processes_are_still_at_work(
    tmp_path, monkeypatch
):
    def fail(directory):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(integrity, "write_checksums", fail)
    checkpointer = Checkpointer(str(tmp_path), SaveCheckpointConfig(save_dataset=False))
    meeting = threading.Event()
    tracker = checkpointer._manager._save_progress_tracker
    monkeypatch.setattr(tracker, "set", lambda going: going or meeting.wait())
    checkpointer.save(TrainState(jnp.int32(1), {"a": jnp.zeros(3)}, None))
    deadline = time.monotonic() + 20
    with pytest.raises(OSError, match="No space left"):
        while time.monotonic() < deadline:
            checkpointer.check()
            time.sleep(0.01)
    with pytest.raises(OSError, match="No space left"):
        checkpointer.close()
    meeting.set()
    with pytest.raises(FileNotFoundError):
        list_checkpoints(str(tmp_path))


@pytest.mark.parametrize("name", ["checkpoint_1", "optimizer", "dataset"])
def test_a_directory_that_cannot_be_made_ends_a_save_at_once(tmp_path, monkeypatch, name):
    original = os.mkdir

    def mkdir(path, *args, **kwargs):
        if os.path.basename(path).startswith(f"{name}.orbax"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        original(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    checkpointer = Checkpointer(str(tmp_path), SaveCheckpointConfig())
    iterator = datasets.get_training_iterator(toy.dataset_cfg(), toy.model().FEATURE_CONVERTER_CLS)
    started = time.monotonic()
    arrays = {"a": jnp.zeros(3)}
    with pytest.raises(OSError, match=f"No space left on device.*{name}.orbax"):
        checkpointer.save(TrainState(jnp.int32(1), arrays, arrays), iterator)
    checkpointer.close()
    assert time.monotonic() - started < 10


def test_a_checkpoint_that_cannot_be_deleted_ends_the_run_with_the_reason(tmp_path, monkeypatch):
    config = SaveCheckpointConfig(save_dataset=False, keep=1)
    checkpointer = Checkpointer(str(tmp_path), config)

    def refuse(steps):
        if steps:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(checkpointer._manager._checkpoint_deleter, "delete_steps", refuse)
    deadline = time.monotonic() + 20
    checkpointer.save(TrainState(jnp.int32(1), {"a": jnp.zeros(3)}, None))
    checkpointer.save(TrainState(jnp.int32(2), {"a": jnp.zeros(3)}, None))
    with pytest.raises(PermissionError):
        while time.monotonic() < deadline:
            checkpointer.check()
            time.sleep(0.01)


def _may_mount():
    try:
        command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not _may_mount(), reason="no disk can be mounted here")
def test_a_disk_that_is_really_full_stops_a_run_within_steps_and_with_room_it_resumes(tmp_path):
    program = """
        import pathlib, sys
        sys.path.insert(0, {tests!r})
        import toy
        from diffusion_t5x.checkpointing.checkpoints import SaveCheckpointConfig
        from diffusion_t5x.runtime.guards import DiskFull, stops_when_full

        def attempt(name, steps, **kwargs):
            try:
                with stops_when_full({disk!r} + "/" + name):
                    return int(toy.run(pathlib.Path({disk!r}, name), steps, **kwargs).step)
            except DiskFull as stopped:
                return stopped

        disk = pathlib.Path({disk!r})
        (disk / "other_files").write_bytes(bytes(2_500_000))
        stopped = attempt("run", 60)
        saved = max(int(path.name.split("_")[1]) for path in (disk / "run").glob("checkpoint_?"))
        print("saved:", saved)
        (disk / "other_files").unlink()
        keep = SaveCheckpointConfig(period=2, keep=2)
        print("with room it ends at step:", attempt("run", 12, save=keep))
        with open(disk / "other_files", "wb", buffering=0) as file:
            try:
                while file.write(bytes(512)):
                    pass
            except OSError:
                pass
        print("no room for metrics:", attempt("other", 60, save=None).code)
        raise stopped
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    text = program.format(tests=os.path.dirname(toy.__file__), disk=str(disk))
    (tmp_path / "program.py").write_text(textwrap.dedent(text))
    shell = f"mount -t tmpfs -o size=5000k tmpfs {disk} && {sys.executable} {tmp_path}/program.py"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", shell],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == DISK_FULL, done.stderr[-3000:]
    saved = int(done.stdout.partition("saved: ")[2].split()[0])
    stopped = int(done.stderr.partition("training: ")[2].split("/")[0])
    assert (
        2 <= stopped - saved <= 6
    )  # the next is due after 2; its failure is looked for at every step
    assert "with room it ends at step: 12" in done.stdout
    assert f"no room for metrics: {DISK_FULL}" in done.stdout
    assert f"{disk}/run cannot be written to: No space left on device" in done.stderr
    assert f"the disk mounted at {disk}." in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not _may_mount(), reason="no disk can be mounted here")
def test_a_disk_without_room_for_one_more_file_ends_a_save_wherever_that_is(tmp_path):
    program = """
        import pathlib, subprocess, sys, threading
        sys.path.insert(0, {tests!r})
        import jax.numpy as jnp
        import toy
        from diffusion_t5x.checkpointing.checkpoints import Checkpointer, SaveCheckpointConfig
        from diffusion_t5x.data import datasets
        from diffusion_t5x.runtime.guards import DiskFull, stops_when_full
        from diffusion_t5x.runtime.train_state import TrainState

        iterator = datasets.get_training_iterator(
            toy.dataset_cfg(), toy.model().FEATURE_CONVERTER_CLS
        )
        next(iterator)

        def save(directory, stopped):
            arrays = {{"a": jnp.zeros(3)}}
            try:
                with stops_when_full(directory):
                    checkpointer = Checkpointer(directory, SaveCheckpointConfig())
                    for step in range(9):
                        checkpointer.save(TrainState(jnp.int32(step), arrays, arrays), iterator)
                    checkpointer.close()
            except DiskFull as error:
                stopped.append(error)

        for files in range(3, 60, 3):
            disk = pathlib.Path({disk!r}, str(files))
            disk.mkdir()
            options = "-onr_inodes=" + str(files)
            subprocess.run(["mount", "-ttmpfs", options, "tmpfs", disk], check=True)
            stopped = []
            thread = threading.Thread(target=save, args=(str(disk), stopped), daemon=True)
            thread.start()
            thread.join(20)
            assert stopped, f"room for {{files}} files"
        print("all ended")
    """
    text = program.format(tests=os.path.dirname(toy.__file__), disk=str(tmp_path))
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", textwrap.dedent(text)],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert "all ended" in done.stdout, done.stderr[-3000:]


TWO_PROCESSES = """
import pathlib, sys
sys.path.insert(0, {tests!r})
import jax
jax.distributed.initialize("localhost:{port}", 2, int(sys.argv[1]))
import toy
from diffusion_t5x.runtime.guards import stops_when_full
with stops_when_full({disk!r} + "/run"):
    toy.run(pathlib.Path({disk!r}, "run"), 60)
"""


@pytest.mark.slow
@pytest.mark.skipif(not _may_mount(), reason="no disk can be mounted here")
def test_of_several_processes_none_waits_for_one_that_the_full_disk_stopped(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "program.py").write_text(
        TWO_PROCESSES.format(tests=os.path.dirname(toy.__file__), port=free_port(), disk=str(disk))
    )
    run = f"{sys.executable} {tmp_path}/program.py"
    mount = f"mount -t tmpfs -o size=4000k tmpfs {disk}"
    shell = f"{mount} && ({run} 1 & {run} 0; echo code $?; wait; ls {disk}/run)"
    started = time.monotonic()
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", shell],
        env={**process_environment(1), "PYTHONPATH": os.getcwd()},
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    # Orbax's own meeting of all processes takes 20 minutes when one of them does not come.
    assert time.monotonic() - started < 300
    assert f"{disk}/run cannot be written to: No space left on device" in done.stderr
    code, *left = done.stdout.partition("code ")[2].split()
    assert int(code) != 0
    assert {"checkpoint_2", "checkpoint_4"} <= set(left)
