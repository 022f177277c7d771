"""Launching: what is printed is what would run, and processes here form one run that goes on."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
import toy

from diffusion_t5x import launch
from diffusion_t5x.checkpointing.checkpoints import list_checkpoints
from diffusion_t5x.commands import launch_local
from diffusion_t5x.runtime.guards import DISK_FULL, HUNG, INTERRUPTED, PREEMPTED
from diffusion_t5x.training.metric_logs import read_metrics

FLAGS = ["--gin_file=models/xl.gin", "--gin.TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 8}"]


def _printed(capsys, *argv):
    assert launch.main([*argv, "train", *FLAGS]) == 0
    return capsys.readouterr().out


def test_local_processes_are_given_one_coordinator_and_an_index_each(capsys):
    lines = _printed(capsys, "local", "--processes=3", "--print_only").splitlines()
    for index, line in enumerate(lines):
        words = shlex.split(line)
        assert words[:5] == [sys.executable, "-m", "diffusion_t5x.train", *FLAGS]
        assert words[6:] == ["--process_count=3", f"--process_index={index}"]
    assert len({shlex.split(line)[5] for line in lines}) == 1 and len(lines) == 3


def test_gcloud_is_told_to_run_the_command_on_all_workers_until_it_is_not_preempted(capsys):
    text = _printed(capsys, "tpu-vm", "--name=t", "--zone=z", "--project=p", "--print_only")
    words = shlex.split(text)
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "t"]
    assert {"--zone=z", "--project=p", "--worker=all"} <= set(words)
    [shell] = [word for word in words if word.startswith("--command=")]
    assert shlex.join(["python", "-m", "diffusion_t5x.train", *FLAGS, "--distributed"]) in shell
    assert f"-eq {PREEMPTED}" in shell


def test_the_shell_loop_of_the_workers_restarts_what_is_preempted_and_nothing_else(tmp_path):
    count = tmp_path / "count"
    for code, attempts in ((PREEMPTED, 4), (HUNG, 4), (0, 1), (3, 1), (DISK_FULL, 1)):
        count.write_text("")
        line = launch._restarting(f"sh -c 'echo >> {count}; exit {code}'", 3)
        assert subprocess.run(["bash", "-c", line], check=False).returncode == code
        assert len(count.read_text().splitlines()) == attempts


def test_xpk_makes_a_workload_that_restarts_after_preemption(capsys):
    text = _printed(capsys, "xpk", "--cluster=c", "--workload=w", "--tpu_type=v5p-128",
                    "--num_slices=2", "--image=i", "--print_only")  # fmt: skip
    words = shlex.split(text)
    assert words[:3] == ["xpk", "workload", "create"]
    assert {
        "--cluster=c", "--workload=w", "--tpu-type=v5p-128", "--num-slices=2", "--docker-image=i",
        f"--restart-on-exit-codes={PREEMPTED},{HUNG}",
    } <= set(words)  # fmt: skip
    command = shlex.join(["python", "-m", "diffusion_t5x.train", *FLAGS, "--distributed"])
    assert f"--command={command}" in words


@pytest.mark.parametrize(
    ("code", "requeued"), [(PREEMPTED, True), (HUNG, True), (DISK_FULL, False), (0, False)]
)
def test_slurm_gets_a_script_that_puts_a_job_back_that_may_go_on(capsys, tmp_path, code, requeued):
    text = _printed(capsys, "slurm", "--nodes=4", "--sbatch=--gpus-per-node=8", "--print_only")
    name, _, script = text.partition("\n")
    assert name == "sbatch"
    assert "#SBATCH --nodes=4\n" in script
    assert "#SBATCH --gpus-per-node=8\n" in script
    # Run with stand-ins for Slurm's commands.
    for program, body in {
        "srun": f"exit {code}",
        "scontrol": f'echo "$@" > {tmp_path}/log',
    }.items():
        path = tmp_path / program
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash"], input=script, text=True, env=environment, check=False)
    assert done.returncode == code
    assert (tmp_path / "log").exists() == requeued
    assert not requeued or (tmp_path / "log").read_text() == "requeue 7\n"


def test_a_missing_tool_and_settings_out_of_range_are_refused(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit, match="gcloud is not installed here"):
        launch.main(["tpu-vm", "--name=t", "--zone=z", "train"])
    with pytest.raises(SystemExit, match="--processes=0"):
        launch.main(["local", "--processes=0", "train"])


def _script(tmp_path, text):
    path = tmp_path / "program.py"
    path.write_text(text)
    return [sys.executable, str(path)]


def test_one_process_that_fails_ends_the_others_and_gives_its_code(tmp_path):
    command = _script(
        tmp_path,
        "import sys, time\nsys.exit(3) if '--process_index=1' in sys.argv else time.sleep(100)\n",
    )
    started = time.monotonic()
    assert launch_local.run(command, 3, None, 5) == 3
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(("code", "word"), [(PREEMPTED, "preempted"), (HUNG, "hung")])
def test_a_run_that_may_go_on_is_started_again_as_often_as_allowed(tmp_path, capfd, code, word):
    command = _script(
        tmp_path,
        f"import pathlib\nlog = pathlib.Path({str(tmp_path / 'log')!r})\n"
        f"log.write_text((log.read_text() if log.exists() else '') + 'x')\n"
        f"raise SystemExit({code} if len(log.read_text()) < 3 else 0)\n",
    )
    assert launch_local.run(command, 1, None, 1) == code
    assert (tmp_path / "log").read_text() == "xx"
    assert launch_local.run(command, 1, None, 1) == 0
    assert f"{word}; restart 1 of at most 1" in capfd.readouterr().out


def test_a_process_that_sigterm_ended_before_it_could_catch_it_is_started_again(tmp_path, capfd):
    command = _script(
        tmp_path,
        f"import os, pathlib, signal\nlog = pathlib.Path({str(tmp_path / 'log')!r})\n"
        "first = not log.exists()\nlog.write_text('')\n"
        "if first:\n    os.kill(os.getpid(), signal.SIGTERM)\n",
    )
    assert launch_local.run(command, 1, None, 1) == 0
    assert "preempted; restart 1 of at most 1" in capfd.readouterr().out


@pytest.mark.parametrize(("times", "saved"), [(1, True), (2, False)])
def test_ctrl_c_ends_the_processes_without_a_restart_and_a_second_one_at_once(
    tmp_path, times, saved
):
    """The processes save for three seconds after SIGTERM."""
    command = _script(
        tmp_path,
        "import pathlib, signal, time\n"
        "def save(*_):\n    time.sleep(3)\n"
        f"    pathlib.Path({str(tmp_path / 'saved')!r}).write_text('')\n"
        f"    raise SystemExit({PREEMPTED})\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).write_text('')\ntime.sleep(100)\n",
    )

    def interrupt():
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert launch_local.run(command, 1, None, 5) == INTERRUPTED
    thread.join()
    assert (tmp_path / "saved").exists() == saved


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_sigterm_on_one_of_two_processes_saves_one_step_on_both_and_a_restart_goes_on(
    tmp_path, restarts
):
    run = tmp_path / "run"
    steps = 200
    flags = [
        "--gin_file=models/tiny.gin", "--gin_file=objectives/diffusion.gin",
        "--gin_file=runs/pretrain.gin", "--gin.MIXTURE_OR_TASK_NAME=toy_copy",
        "--gin.MIXTURE_OR_TASK_MODULE=register_toy", "--gin.vocabularies.get_vocabulary.name=bytes",
        "--gin.vocabularies.get_vocabulary.extra_ids=0",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 6, 'targets': 6}", "--gin.BATCH_SIZE=8",
        f"--gin.TRAIN_STEPS={steps}", "--gin.EVAL_PERIOD=1000", "--gin.CHECKPOINT_PERIOD=5",
        "--gin.config.TransformerConfig.num_layers=1", f"--gin.MODEL_DIR={run}",
        "--gin.trainer.train.train_eval_dataset_cfg=None", "--gin.trainer.train.log_period=5",
    ]  # fmt: skip
    tests = os.path.dirname(toy.__file__)
    (tmp_path / "register_toy.py").write_text("import toy\ntoy.register()\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "diffusion_t5x.launch", "local", "--processes=2", "--devices=2",
         f"--max_restarts={restarts}", "train", *flags],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{tests}:{os.getcwd()}"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        while not list(run.glob("checkpoint_?")):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.1)
        children = subprocess.run(
            ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        os.kill(int(children.stdout.split()[1]), signal.SIGTERM)
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == (0 if restarts else PREEMPTED), output
    stopped = [line for line in output.splitlines() if "everything is saved" in line]
    assert {line[4:] for line in stopped} == {stopped[0][4:]} and len(stopped) == 2
    newest = list_checkpoints(str(run))[-1][0]
    logged = [line["step"] for line in read_metrics(str(run)) if line["split"] == "train"]
    assert len(logged) == len(set(logged)) and logged[-1] == newest
    assert (newest == steps) == bool(restarts)
    assert ("preempted; restart 1" in output) == bool(restarts)
