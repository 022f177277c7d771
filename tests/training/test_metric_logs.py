"""What a run writes about itself is whole, and tells of every step once."""

import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import pytest
from clu import metric_writers

from diffusion_t5x.runtime.files import write_atomically
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.train_state import TrainState
from diffusion_t5x.training import metric_logs
from diffusion_t5x.training.metric_logs import MetricLog, read_metrics


@pytest.fixture
def events(monkeypatch):
    """(split, step, numbers) of what goes to TensorBoard, in place of its files."""
    written = []

    class Writer:
        def __init__(self, directory):
            self.split = directory

        def write_scalars(self, step, numbers):
            written.append((os.path.basename(self.split), step, dict(numbers)))

        def close(self):
            written.append((os.path.basename(self.split), "closed", {}))

    monkeypatch.setattr(metric_writers, "SummaryWriter", Writer)
    return written


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "down" / "results.json"
    write_atomically(path, "before")
    assert path.read_text() == "before"
    replace = os.replace

    def killed(source, target):
        # All of the new text is there before it takes the old one's place.
        assert pathlib.Path(source).read_text() == "after" * 1000
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "after" * 1000)
    assert path.read_text() == "before"
    monkeypatch.setattr(os, "replace", replace)
    write_atomically(path, "ä€")
    assert path.read_bytes() == "ä€".encode()
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_a_run_without_a_log_has_no_lines(tmp_path):
    assert read_metrics(str(tmp_path / "nowhere")) == []


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    lines = [{"step": step, "split": "train", "loss": 1.5} for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for cut in range(1, len(json.dumps(lines[2])) + 1):
        (tmp_path / "metrics.jsonl").write_text(text[: -cut - 1])
        assert read_metrics(str(tmp_path)) == lines[:2]
    # Only the end of the line was lost.
    (tmp_path / "metrics.jsonl").write_text(text[:-1])
    assert read_metrics(str(tmp_path)) == lines


def test_a_log_goes_on_behind_a_cut_off_line(tmp_path, events):
    whole = {"step": 1, "split": "train", "loss": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(whole) + '\n{"step": 1, "spl')
    with MetricLog(str(tmp_path), 1, 8) as log:
        log.write(2, "training_eval", {"loss": 2.0})
    assert read_metrics(str(tmp_path)) == [
        whole,
        {"step": 2, "split": "training_eval", "loss": 2.0},
    ]


def test_what_was_logged_beyond_the_restored_step_is_dropped(tmp_path, events):
    with MetricLog(str(tmp_path), 0, 8) as log:
        for step in (1, 2, 3):
            log.write(step, "training_eval", {"loss": float(step)})
    with MetricLog(str(tmp_path), 2, 8) as log:
        log.write(3, "training_eval", {"loss": 30.0})
    assert [line["loss"] for line in read_metrics(str(tmp_path))] == [1.0, 2.0, 30.0]


def test_seconds_of_compilation_are_a_line_of_their_own_and_logged_once(tmp_path, events):
    seconds = {"training step": 12.5, "initialisation": 3.0}
    with MetricLog(str(tmp_path), 0, 8) as log:
        log.compiled(0, seconds)
        log.compiled(4, seconds)
        log.write(4, "train", {"loss": 1.0})
    first, *others = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first) == {
        "step": 0, "split": "compile", "training_step_seconds": 12.5, "initialisation_seconds": 3.0
    }  # fmt: skip
    # Those who read metrics get metrics.
    assert [json.loads(line) for line in others] == read_metrics(str(tmp_path)) != []


def test_rates_are_those_since_the_last_line_and_seconds_those_of_the_run(tmp_path, events):
    with MetricLog(str(tmp_path), 0, batch_size=8) as log:
        log.count(4.0)
        log.training(10, {"loss": 1.0})
        log.count(1.0)
        log.count(1.0)
        log.training(20, {"loss": 0.5})
    # A run that goes on counts its seconds on, but not the time in between.
    with MetricLog(str(tmp_path), 20, batch_size=8) as log:
        log.count(5.0)
        log.training(25, {"loss": 0.25})
    lines = read_metrics(str(tmp_path))
    assert [line["seconds"] for line in lines] == [4.0, 6.0, 11.0]
    assert [line["steps_per_second"] for line in lines] == [2.5, 5.0, 1.0]
    assert [line["examples_per_second"] for line in lines] == [20.0, 40.0, 8.0]
    assert [line["loss"] for line in lines] == [1.0, 0.5, 0.25]
    assert [event[:2] for event in events if event[1] != "closed"] == [
        ("train", 10), ("train", 20), ("train", 25),
    ]  # fmt: skip
    assert events[0][2]["loss"] == 1.0
    assert events[-1][1] == "closed"


def test_every_line_is_on_disk_at_once(tmp_path, events):
    with MetricLog(str(tmp_path), 0, 8) as log:
        log.write(1, "inference_eval/a_task", {"bleu": 3.0})
        assert read_metrics(str(tmp_path))[0]["split"] == "inference_eval/a_task"


def test_numbers_that_are_not_finite_are_logged_but_not_drawn(tmp_path, events):
    with MetricLog(str(tmp_path), 0, 8) as log:
        log.write(1, "train", {"loss": math.nan, "accuracy": 0.5, "perplexity": math.inf})
    [line] = read_metrics(str(tmp_path))
    assert math.isnan(line["loss"]) and line["perplexity"] == math.inf
    assert events[0] == ("train", 1, {"accuracy": 0.5})


def test_other_processes_than_the_first_write_nothing(tmp_path, events, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricLog(str(tmp_path / "run"), 0, 8) as log:
        log.count(1.0)
        log.training(1, {"loss": 1.0})
    metric_logs.write_model_info(str(tmp_path / "run"), None)
    assert not (tmp_path / "run").exists()
    assert events == []


def test_the_model_info_lists_every_parameter_and_their_sum(tmp_path):
    replicated = PjitPartitioner().replicated
    params = {
        "decoder": {"kernel": jax.ShapeDtypeStruct((30, 50), jnp.float32, sharding=replicated)},
        "scale": jax.ShapeDtypeStruct((7,), jnp.float32, sharding=replicated),
    }
    metric_logs.write_model_info(str(tmp_path), TrainState(None, params, None))
    rows = [line.split() for line in (tmp_path / "model-info.txt").read_text().splitlines()]
    assert [row[:2] for row in rows] == [
        ["decoder/kernel", "1,500"],
        ["scale", "7"],
        ["parameters", "1,507"],
    ]
    assert rows[0][2:4] == ["[30,", "50]"]


def test_lines_that_a_disk_has_changed_or_a_kill_has_cut_are_left_out(tmp_path):
    good = b'{"step": 2, "split": "train"}'
    bad = [b"\xff\xfe", b"3", b"null", b'{"st\x80p": 4}', b"\0" * 8, b'{"step": 6, "spl']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([bad[0], good, *bad[1:]]))
    assert read_metrics(str(tmp_path)) == [{"step": 2, "split": "train"}]
    with MetricLog(str(tmp_path), 4, 1) as log:
        assert log.lines == [{"step": 2, "split": "train"}]
