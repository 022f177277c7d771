"""A full disk, a real one where there may be one, stops a run clearly and harms nothing."""

import errno
import os
import pathlib
import resource
import shutil
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

from diffusion_t5x.checkpointing import integrity
from diffusion_t5x.checkpointing.checkpoints import (
    Checkpointer,
    RestoreCheckpointConfig,
    SaveCheckpointConfig,
    list_checkpoints,
)
from diffusion_t5x.commands import launch_local
from diffusion_t5x.evaluation import evaluation, inference
from diffusion_t5x.runtime.disk_space import DiskFull, find_full_disk, stops_when_full
from diffusion_t5x.runtime.exit_codes import DISK_FULL, PREEMPTED
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.train_state import TrainState


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
def test_a_full_disk_is_known_in_whatever_form_it_is_told_of(error, tmp_path, capsys):
    with pytest.raises(DiskFull) as stopped, stops_when_full(tmp_path / "not" / "there"):
        raise error
    assert stopped.value.code == DISK_FULL != PREEMPTED
    text = capsys.readouterr().err
    assert f"{tmp_path}/not/there cannot be written to" in text
    assert "bytes are free on the disk mounted at /" in text


@pytest.mark.parametrize("error", OTHERS.values(), ids=OTHERS)
def test_other_errors_are_let_through(error, tmp_path):
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
    [(200_000, "shard-00000-of-00001"), (5_000, "checkpoint_4"), (1_000, "model-info.txt")],
    ids=["data position", "arrays", "what a run says of itself"],
)
def test_a_run_that_cannot_write_stops_and_goes_on_once_it_can(tmp_path, straight, size, file):
    state, two_steps = straight
    run = pathlib.Path(shutil.copytree(two_steps, tmp_path / "run"))
    with pytest.raises(DiskFull) as stopped, _files_of_at_most(size):
        toy.run(run, 40)
    assert "File too large" in stopped.value.message
    assert file in stopped.value.message
    assert [step for step, _ in list_checkpoints(str(run))] == [2]
    integrity.verify(run / "checkpoint_2", ("params", "optimizer", "dataset"))
    jax.tree.map(np.testing.assert_array_equal, state, toy.run(run, 6))


def test_metrics_that_cannot_be_written_stop_the_run(tmp_path):
    with pytest.raises(DiskFull, match="74"), _files_of_at_most(2_000):
        toy.run(tmp_path, 200, save=None)
    lines = (tmp_path / "metrics.jsonl").read_bytes()
    assert 0 < len(lines) <= 2_000


def _evaluate(output, cfg, shared):
    results = evaluation.evaluate(**shared, dataset_cfg=cfg, output_dir=str(output))
    return [row["metrics"]["examples"] for row in results["rows"]]


def _infer(output, cfg, shared):
    [path] = inference.infer(**shared, dataset_cfg=cfg, output_dir=str(output))
    return [len(pathlib.Path(path).read_text().splitlines())]


@pytest.mark.parametrize("command", [_evaluate, _infer])
def test_results_that_cannot_be_written_stop_and_go_on_once_they_can(tmp_path, command):
    run, output = tmp_path / "run", tmp_path / "output"
    toy.run(run, 1, save=SaveCheckpointConfig(period=1))
    shared = {
        "model": toy.model(),
        "restore_checkpoint_cfg": RestoreCheckpointConfig(str(run)),
        "partitioner": PjitPartitioner(),
    }
    cfg = toy.dataset_cfg("validation", batch_size=4)
    with pytest.raises(DiskFull) as stopped, _files_of_at_most(200):
        command(output, cfg, shared)
    assert f"{output} cannot be written to: File too large" in stopped.value.message
    assert command(output, cfg, shared) == [toy.NUM_EXAMPLES["validation"]]


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


def _may_mount():
    try:
        command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not _may_mount(), reason="no disk can be mounted here")
def test_a_disk_that_is_really_full_stops_a_run_within_steps_and_with_room_it_goes_on(tmp_path):
    program = """
        import pathlib, sys
        sys.path.insert(0, {tests!r})
        import toy
        from diffusion_t5x.checkpointing.checkpoints import SaveCheckpointConfig
        from diffusion_t5x.runtime.disk_space import DiskFull

        def attempt(name, steps, **kwargs):
            try:
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
    assert 2 <= stopped - saved <= 6  # the next is due after 2; its end is looked for at every step
    assert "with room it ends at step: 12" in done.stdout
    assert f"no room for metrics: {DISK_FULL}" in done.stdout
    assert f"{disk}/run cannot be written to: No space left on device" in done.stderr
    assert f"the disk mounted at {disk}." in done.stderr


TWO_PROCESSES = """
import pathlib, sys
sys.path.insert(0, {tests!r})
import jax
jax.distributed.initialize("localhost:{port}", 2, int(sys.argv[1]))
import toy
toy.run(pathlib.Path({disk!r}, "run"), 60)
"""


@pytest.mark.slow
@pytest.mark.skipif(not _may_mount(), reason="no disk can be mounted here")
def test_of_several_processes_none_waits_for_one_that_the_full_disk_stopped(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "program.py").write_text(
        TWO_PROCESSES.format(
            tests=os.path.dirname(toy.__file__), port=launch_local.free_port(), disk=str(disk)
        )
    )
    run = f"{sys.executable} {tmp_path}/program.py"
    mount = f"mount -t tmpfs -o size=4000k tmpfs {disk}"
    shell = f"{mount} && ({run} 1 & {run} 0; echo code $?; wait; ls {disk}/run)"
    started = time.monotonic()
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", shell],
        env={**launch_local.process_environment(1), "PYTHONPATH": os.getcwd()},
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    # Orbax's own meeting of all processes takes 20 minutes when one of them does not come.
    assert time.monotonic() - started < 300
    assert f"{disk}/run cannot be written to: No space left on device" in done.stderr
    code, *left = done.stdout.partition("code ")[2].split()
    assert int(code) != 0
    assert {"checkpoint_2", "checkpoint_4"} <= set(left)
