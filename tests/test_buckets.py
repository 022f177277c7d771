"""Runs in buckets, on real servers of object stores: the same bits as on this machine's disk."""

import functools
import http.server
import json
import os
import socket
import threading
import time

import buckets
import fsspec
import jax
import numpy as np
import pytest
import toy
from etils import epath

from diffusion_t5x import gin_utils, paths
from diffusion_t5x.checkpointing import checkpoints, conversion, reading
from diffusion_t5x.checkpointing.checkpoints import (
    RestoreCheckpointConfig,
    SaveCheckpointConfig,
    list_checkpoints,
)
from diffusion_t5x.data import datasets
from diffusion_t5x.data.files import local_files
from diffusion_t5x.data.vocabularies import fingerprint, get_vocabulary
from diffusion_t5x.evaluation import evaluation, inference, sampling
from diffusion_t5x.experiments import __main__ as experiments
from diffusion_t5x.runtime import orbax_buckets
from diffusion_t5x.runtime.files import write_atomically
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.training.metric_logs import read_metrics

GS, S3 = f"gs://{buckets.BUCKET}", f"s3://{buckets.BUCKET}"
both = pytest.mark.parametrize("bucket", [GS, pytest.param(S3, marks=pytest.mark.slow)])
STEPS = 6
model = functools.partial(toy.model, "autoregressive", dropout_rate=0.1)


@pytest.fixture(scope="module", autouse=True)
def _servers():
    # These servers share the cores with other tests.
    with pytest.MonkeyPatch.context() as patch, buckets.serving_here():
        patch.setattr(paths, "SECONDS", 120.0)
        yield


@pytest.fixture(autouse=True)
def _nothing_on_this_machine(tmp_path, monkeypatch):
    """No path of a bucket is taken for one on this machine."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not {"gs:", "s3:", "file:", "~"} & set(os.listdir(tmp_path))


def _train(model_dir, steps=STEPS, **kwargs):
    kwargs = {"save": SaveCheckpointConfig(period=2, keep=2), **kwargs}
    return toy.run(model_dir, steps, model(), **kwargs)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """An undisturbed run on this machine: its directory and its last state."""
    directory = tmp_path_factory.mktemp("local")
    return directory, _train(directory)


@pytest.fixture(scope="module")
def run_dir(local):
    """The same run, copied into the bucket without any mark of Orbax's."""
    fsspec.filesystem("gs").put(f"{local[0]}/", f"{GS}/copied/", recursive=True)
    return f"{GS}/copied"


def _same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def _objects(path):
    """The objects of a bucket below a path, by name, and their bytes."""
    found = fsspec.filesystem(path[:2]).find(path, detail=True)
    start = len(path.partition("://")[2]) + 1
    return {name[start:]: info["size"] for name, info in found.items()}


def _logged(directory):
    clocks = {"seconds", "steps_per_second", "examples_per_second"}
    lines = read_metrics(str(directory))
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


def _killed_at(step, monkeypatch):
    """Ends training before the batch of a step, as a kill would: nothing more is written."""
    drawn = []
    original = datasets.DatasetIterator.__next__

    def draw(self):
        drawn.append(1)
        if len(drawn) == step:
            monkeypatch.setattr("diffusion_t5x.training.metric_logs.MetricLog.flush", lambda _: 0)
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(datasets.DatasetIterator, "__next__", draw)


@pytest.mark.slow
@pytest.mark.parametrize("bucket", [GS, S3])
def test_a_run_that_was_killed_ends_as_one_on_this_machine(bucket, local, monkeypatch):
    directory, state = local
    run = f"{bucket}/my run, 100% ü"
    with monkeypatch.context() as patch:
        _killed_at(6, patch)
        with pytest.raises(KeyboardInterrupt):
            _train(run)
    assert [step for step, _ in list_checkpoints(run)] == [2, 4]
    # What a kill in the middle of saving leaves: arrays, and no mark.
    unfinished = epath.Path(run) / "checkpoint_6"
    (unfinished / "params" / "d" / "1").write_bytes(b"half")
    assert [step for step, _ in list_checkpoints(run)] == [2, 4]
    _same(state, _train(run))
    assert list_checkpoints(run) == [(step, f"{run}/checkpoint_{step}") for step in (4, 6)]
    assert not (unfinished / "params" / "d" / "1").exists()
    assert _logged(run) == _logged(directory)
    objects = _objects(run)
    assert {"run.json", "model-info.txt", "metrics.jsonl"} <= objects.keys()
    assert all(f"checkpoint_{step}/params/manifest.ocdbt" in objects for step in (4, 6))
    assert not [name for name in objects if name.startswith("checkpoint_2/")]
    assert any(name.startswith("train/events") and size for name, size in objects.items())


@both
def test_a_damaged_checkpoint_is_set_aside_and_made_again(bucket, local, capsys):
    run = f"{bucket}/damaged"
    fsspec.filesystem(bucket[:2]).put(f"{local[0]}/", f"{run}/", recursive=True)
    epath.Path(run, ".lock").unlink()  # of this process, which lives
    [file] = epath.Path(run, "checkpoint_6", "params", "d").iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    _same(local[1], _train(run))
    assert "has the CRC-32" in capsys.readouterr().out
    names = {name.split("/")[0] for name in _objects(run)}
    assert {"checkpoint_4", "checkpoint_6", "checkpoint_6.damaged"} <= names
    assert _objects(f"{run}/checkpoint_6.damaged").keys() >= {"params/manifest.ocdbt"}


def test_a_move_that_was_killed_leaves_no_half_checkpoint(run_dir, monkeypatch):
    source, target = epath.Path(GS, "moved", "checkpoint_6"), epath.Path(GS, "moved", "aside")
    fsspec.filesystem("gs").copy(f"{run_dir}/checkpoint_6/", f"{source}/", recursive=True)
    orbax_buckets.mark_complete(source)
    assert orbax_buckets.is_complete(source)
    whole = _objects(str(source))
    with monkeypatch.context() as patch:
        patch.setattr(type(source), "rmtree", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            orbax_buckets.move(source, target)
    assert _objects(str(target)) == whole
    assert not orbax_buckets.is_complete(source)
    assert source.exists()
    orbax_buckets.rmtree(source)
    assert not source.exists()


def _evaluate(run_dir, output_dir, **kwargs):
    return evaluation.evaluate(
        model=model(),
        dataset_cfg=toy.dataset_cfg("validation", batch_size=4),
        restore_checkpoint_cfg=RestoreCheckpointConfig(run_dir, "all"),
        partitioner=PjitPartitioner(),
        output_dir=str(output_dir),
        best_metric="exact_match",
        **kwargs,
    )


@pytest.mark.slow
@both
def test_evaluations_are_those_of_this_machine_and_are_not_repeated(
    bucket, local, run_dir, tmp_path, monkeypatch
):
    here = _evaluate(str(local[0]), tmp_path)
    there = _evaluate(run_dir, f"{bucket}/eval/")
    files = [f"{toy.TASK}/predictions-{step}.jsonl" for step in (4, 6)]
    for name in files:
        assert (tmp_path / name).read_bytes() == epath.Path(bucket, "eval", name).read_bytes()
    assert there["best"] == here["best"]
    assert _objects(f"{bucket}/eval").keys() == {
        *files, "results.json", "results.md",
        *(f"checkpoint_{step}/{toy.TASK}.json" for step in (4, 6)),
    }  # fmt: skip
    monkeypatch.setattr(evaluation.InferenceEvaluator, "_evaluate", lambda *args: 1 / 0)
    assert _evaluate(run_dir, f"{bucket}/eval") == there


def _infer(run_dir, output_dir):
    [path] = inference.infer(
        model=model(),
        dataset_cfg=toy.dataset_cfg("validation", batch_size=2),
        restore_checkpoint_cfg=RestoreCheckpointConfig(run_dir),
        partitioner=PjitPartitioner(),
        output_dir=str(output_dir),
        checkpoint_period=2,
    )
    return epath.Path(path)


@pytest.mark.slow
@both
def test_inference_resumes_from_its_parts(bucket, local, run_dir, tmp_path, monkeypatch):
    expected = _infer(str(local[0]), tmp_path).read_bytes()
    original, calls = inference.Predictor.__call__, []

    def predict(self, params, batch, index):
        calls.append(index)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, params, batch, index)

    monkeypatch.setattr(inference.Predictor, "__call__", predict)
    with pytest.raises(KeyboardInterrupt):
        _infer(run_dir, f"{bucket}/infer")
    assert [name for name in _objects(f"{bucket}/infer") if "part-000000" in name]
    found = _infer(run_dir, f"{bucket}/infer")
    assert calls == [0, 1, 2, 3, 2, 3, 4, 5]
    assert found.read_bytes() == expected
    assert _infer(run_dir, f"{bucket}/infer").read_bytes() == expected
    assert len(calls) == 8
    assert not [name for name in _objects(f"{bucket}/infer") if ".parts" in name]


def test_a_checkpoint_of_a_bucket_is_sampled_from_and_begun_from(local, run_dir, tmp_path):
    texts = [
        sampling.sample(
            model=model(),
            restore_checkpoint_cfg=RestoreCheckpointConfig(directory),
            partitioner=PjitPartitioner(),
            inputs=("v001",),
            task_feature_lengths=toy.LENGTHS,
        )
        for directory in (str(local[0]), f"{run_dir}/checkpoint_6/")
    ]
    assert texts[0] == texts[1]
    begun = _train(
        tmp_path / "begun", 7, restore=RestoreCheckpointConfig(f"{run_dir}/checkpoint_6"),
        learning_rate=0.0,
    )  # fmt: skip
    _same(begun.params, local[1].params)


@both
@pytest.mark.parametrize("layout", ["diffusion_t5x", "t5x"])
def test_conversions_from_and_into_a_bucket_keep_every_bit(bucket, layout, run_dir, local):
    to = f"{bucket}/converted {layout}"
    conversion.convert(run_dir, to, layout)
    [(step, path)] = list_checkpoints(to)
    assert (step, path) == (6, f"{to}/checkpoint_6")
    found, expected = (reading.open_params(p) for p in (path, f"{local[0]}/checkpoint_6"))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name].read(), array.read())
    with pytest.raises(FileExistsError):
        conversion.convert(run_dir, to, layout)


@both
def test_gin_files_vocabularies_and_texts_may_be_in_a_bucket(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_T5X_CACHE", str(tmp_path / "cache"))
    there = epath.Path(bucket, "inputs")
    (there / "gin" / "main.gin").write_bytes(b"include 'parts/part.gin'\nB = %A\n")
    (there / "gin" / "parts" / "part.gin").write_bytes(b"A = 7\n")
    for file in (f"{there}/gin/main.gin", "main.gin"):
        gin_utils.parse_config([file], [], [f"{there}/gin/"])
        assert gin_utils.gin.query_parameter("%A") == 7
        gin_utils.gin.clear_config()
    with pytest.raises(FileNotFoundError, match="was not found"):
        gin_utils.parse_config([f"{there}/gin/other.gin"], [])

    embedded = get_vocabulary("embedded", 32)
    (there / "spiece.model").write_bytes(embedded.sp_model)
    assert fingerprint(get_vocabulary(f"{there}/spiece.model", 32)) == fingerprint(embedded)
    with pytest.raises(ValueError, match="neither a name nor a file"):
        get_vocabulary(f"{there}/none.model", 32)

    for number in (1, 2):
        (there / f"text {number}.txt").write_bytes(b"some text\n" * number)
    pattern = f"{there}/text *.txt"
    files = local_files.find_files(pattern, "LOCAL_FILES")
    assert files == [(f"{there}/text {number}.txt",) for number in (1, 2)]
    assert local_files.find_files(files[0][0], "LOCAL_FILES") == files[:1]
    before = local_files._versions(files[0])
    assert before == local_files._versions(files[0])
    time.sleep(1.1)
    (there / "text 1.txt").write_bytes(b"same size\n")
    assert local_files._versions(files[0]) != before
    with local_files.readers.lines.Lines(files[1][0]) as lines:
        assert list(lines) == [b"some text"] * 2
    with pytest.raises(ValueError, match="matches no file"):
        local_files.find_files(f"{there}/none*", "LOCAL_FILES")


def test_the_stages_of_an_experiment_may_lie_in_a_bucket(monkeypatch, capsys):
    run = experiments.Run("demo", None, f"{GS}/experiments")
    stage = run.stages[0]
    directory = epath.Path(GS, "experiments", run.stages_dir.name, stage.name)

    def train(argv):
        assert f"--gin.MODEL_DIR='{directory}'" in argv
        print("trained")
        write_atomically(directory / "metrics.jsonl", '{"step": 3, "split": "train"}\n')

    monkeypatch.setitem(experiments.COMMANDS, "train", train)
    for _ in range(2):
        run._run_stage(stage, "first", False)
    assert (directory / "output.txt").read_text() == "trained\n"
    assert capsys.readouterr().out.count("step 3") == 2


def test_what_is_read_need_not_be_writable(run_dir, monkeypatch):
    monkeypatch.setattr(paths, "writable", lambda *args: 1 / 0)
    assert checkpoints.select_checkpoints(RestoreCheckpointConfig(run_dir))[0][0] == 6


@pytest.fixture
def _forbidding():
    """A server that forbids everything, and one that never answers."""

    class Forbid(http.server.BaseHTTPRequestHandler):
        def _answer(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.dumps({"error": {"code": 403, "message": "no access"}}).encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _answer

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forbid) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with socket.create_server(("127.0.0.1", 0)) as silent:
            yield [
                f"http://127.0.0.1:{port}" for port in (server.server_port, silent.getsockname()[1])
            ]
        server.shutdown()


def _refusal(work):
    """The message with which `work` is refused, within five seconds and before data are read."""
    started = time.monotonic()
    with pytest.raises(paths.StorageError) as error:
        work()
    assert time.monotonic() - started < 5
    return str(error.value)


def test_buckets_that_cannot_be_used_are_refused_before_anything_else(
    run_dir, tmp_path, monkeypatch, _forbidding
):
    forbidding, silent = _forbidding
    for name in ("get_training_iterator", "import_task_module"):
        monkeypatch.setattr(datasets, name, lambda *args, **kwargs: 1 / 0)
    restore = RestoreCheckpointConfig(f"{GS}-missing/run")
    for bucket in (GS, S3):
        missing = f"{bucket}-missing/x"
        no_bucket = f"= '{missing}' cannot be {{}}: there is no bucket 'runs-missing'".format
        for dry_run in (False, True):
            assert f"MODEL_DIR {no_bucket('written to')}" in _refusal(
                lambda: _train(missing, dry_run=dry_run)  # noqa: B023
            )
        restore = RestoreCheckpointConfig(missing)
        assert f"INITIAL_CHECKPOINT_PATH {no_bucket('read')}" in _refusal(
            lambda: _train(tmp_path / "a", restore=restore)  # noqa: B023
        )
        assert f"EVAL_OUTPUT_DIR {no_bucket('written to')}" in _refusal(
            lambda: _evaluate(run_dir, missing, dry_run=True)  # noqa: B023
        )
        assert f"CHECKPOINT_PATH {no_bucket('read')}" in _refusal(
            lambda: _evaluate(missing, tmp_path / "a")  # noqa: B023
        )
        assert "INFER_OUTPUT_DIR" in _refusal(lambda: _infer(run_dir, missing))  # noqa: B023
        assert "--to" in _refusal(lambda: conversion.convert(run_dir, missing))  # noqa: B023
        assert "--gin_file" in _refusal(lambda: gin_utils.parse_config([missing], []))  # noqa: B023
        assert "LOCAL_FILES" in _refusal(lambda: local_files.find_files(missing, "LOCAL_FILES"))  # noqa: B023
        assert "get_vocabulary.name" in _refusal(lambda: get_vocabulary(missing))  # noqa: B023
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", forbidding)
    assert "Check credentials and the permissions" in _refusal(lambda: _train(f"{GS}/x"))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", silent)
    monkeypatch.setattr(paths, "SECONDS", 0.5)
    assert "no answer within 0.5 seconds" in _refusal(lambda: _train(f"{GS}/x"))

    def missing_library(*args, **kwargs):
        raise ImportError("no gcsfs")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing_library)
    assert "pip install 'diffusion_t5x[gcs]'" in _refusal(lambda: _train(f"{GS}/x"))


def test_a_bucket_of_amazon_that_may_be_read_alone_is_refused_for_writing_alone():
    client = fsspec.filesystem("s3")
    client.pipe_file(f"{S3}/locked/a", b"a")
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Deny",
                "Principal": "*",
                "Action": "s3:PutObject",
                "Resource": f"arn:aws:s3:::{buckets.BUCKET}/locked/*",
            }
        ],
    }
    client.call_s3("put_bucket_policy", Bucket=buckets.BUCKET, Policy=json.dumps(policy))
    try:
        paths.readable(f"{S3}/locked", "CHECKPOINT_PATH")
        message = _refusal(lambda: _train(f"{S3}/locked/run", dry_run=True))
        assert "MODEL_DIR" in message
        assert "PermissionError" in message
    finally:
        client.call_s3("delete_bucket_policy", Bucket=buckets.BUCKET)
