"""Damage to any file of a checkpoint is detected, named and survived."""

import ast
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import toy

from diffusion_t5x.checkpointing import integrity
from diffusion_t5x.checkpointing.checkpoints import (
    Checkpointer,
    RestoreCheckpointConfig,
    SaveCheckpointConfig,
    list_checkpoints,
    newest_undamaged,
    select_checkpoints,
)
from diffusion_t5x.checkpointing.integrity import CHECKSUMS, ITEMS, STAMP, DamagedCheckpointError
from diffusion_t5x.checkpointing.items import restore_position
from diffusion_t5x.checkpointing.reading import open_params, restore_params
from diffusion_t5x.commands import launch_local
from diffusion_t5x.data import datasets
from diffusion_t5x.runtime.train_state import TrainState

COMMIT_MARK = "commit_success.txt"  # Orbax's, written last and never read


def _flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def _cut(file):
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {
    "has the CRC-32": _flip_a_bit,
    "bytes, expected": _cut,
    "is missing": pathlib.Path.unlink,
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of four steps with an average, with checkpoints of steps 2 and 4."""
    directory = tmp_path_factory.mktemp("run")
    toy.run(directory, 4, trainer={"ema_decay": 0.9})
    return directory


@pytest.fixture
def a_copy(run_dir, tmp_path):
    """A copy of the run, to be damaged."""
    return pathlib.Path(shutil.copytree(run_dir, tmp_path / "run"))


def _array_file(item):
    """Returns the largest of an item's files, which holds arrays."""
    return max((file for file in item.rglob("*") if file.is_file()), key=lambda f: f.stat().st_size)


def test_each_file_that_is_cut_changed_or_missing_is_named(a_copy):
    checkpoint = a_copy / "checkpoint_4"
    integrity.verify(checkpoint, ITEMS)
    files = [
        file
        for item in ITEMS
        for file in (checkpoint / item).rglob("*")
        if file.is_file() and file.name not in (CHECKSUMS, COMMIT_MARK)
    ]
    assert {file.relative_to(checkpoint).parts[0] for file in files} == set(ITEMS)
    for file in files:
        content = file.read_bytes()
        for words, damage in DAMAGES.items():
            damage(file)
            name = re.escape(str(file.relative_to(checkpoint)))
            with pytest.raises(DamagedCheckpointError, match=f"{name} .*{words}"):
                integrity.verify(checkpoint, ITEMS)
            file.write_bytes(content)
    integrity.verify(checkpoint, ITEMS)


def test_damage_to_the_checksums_themselves_is_damage(a_copy):
    checksums = a_copy / "checkpoint_4" / "params" / CHECKSUMS
    for text in ("", "[1]", '{"d": {"bytes": 1}}'):
        checksums.write_text(text)
        with pytest.raises(DamagedCheckpointError, match=r"params/checksums.json is not readable"):
            integrity.verify(a_copy / "checkpoint_4", ITEMS)


@pytest.mark.parametrize("name", ["checksums.json", "checkpoint.json", "_METADATA"])
def test_a_directory_where_a_file_should_be_is_damage(a_copy, name):
    file = a_copy / "checkpoint_4" / "optimizer" / name
    file.unlink()
    file.mkdir()
    assert newest_undamaged(str(a_copy), ("params", "optimizer"))[0] == 2


def test_only_the_files_that_are_asked_for_are_compared(a_copy):
    _flip_a_bit(_array_file(a_copy / "checkpoint_4" / "optimizer"))
    integrity.verify(a_copy / "checkpoint_4", ("params",))
    with pytest.raises(DamagedCheckpointError):
        integrity.verify(a_copy / "checkpoint_4", ("optimizer",))


def _replace(path, source):
    """Puts a copy of `source`, '' as a file, None as a dangling link, at a path."""
    if path.exists():
        shutil.rmtree(path)
    if source is None:
        path.symlink_to("/nowhere")
    elif source == "":
        path.write_text("")
    else:
        shutil.copytree(source, path)


def _assert_passed_over(run, damaged, words, capsys):
    """A run's newest checkpoint is the one before, and the damaged one is refused by its name."""
    capsys.readouterr()
    step, _, found = newest_undamaged(str(run), ("params",))
    assert (step, found) == (2, (str(damaged),))
    assert f"{damaged} is damaged:\n  {words}" in capsys.readouterr().out
    with pytest.raises((DamagedCheckpointError, FileNotFoundError), match=re.escape(str(damaged))):
        select_checkpoints(RestoreCheckpointConfig(str(damaged)))


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    return tmp_path_factory.mktemp("empty")


@pytest.mark.parametrize("item", ITEMS)
def test_a_missing_item_is_damage_whatever_is_in_its_place(a_copy, item, empty, capsys):
    path = a_copy / "checkpoint_4" / item
    for source in (empty, "", None):
        _replace(path, source)
        _assert_passed_over(a_copy, a_copy / "checkpoint_4", f"{item} is missing", capsys)
        path.unlink() if source is None or source == "" else path.rmdir()
    _assert_passed_over(a_copy, a_copy / "checkpoint_4", f"{item} is missing", capsys)


def _iterator():
    return datasets.get_training_iterator(toy.dataset_cfg(), toy.model().FEATURE_CONVERTER_CLS)


def _save(directory, step, **settings):
    arrays = {"a": jnp.zeros(3)}
    checkpointer = Checkpointer(str(directory), SaveCheckpointConfig(**settings))
    checkpointer.save(TrainState(jnp.int32(step), arrays, arrays, arrays), _iterator())
    checkpointer.close()
    return directory / f"checkpoint_{step}"


@pytest.fixture(scope="module")
def of_another_run(tmp_path_factory):
    """A checkpoint of the same step."""
    return _save(tmp_path_factory.mktemp("other"), 4)


@pytest.mark.parametrize("item", ITEMS)
def test_an_item_of_another_step_or_run_is_damage(run_dir, of_another_run, a_copy, item, capsys):
    for source in (run_dir / "checkpoint_2", of_another_run):
        _replace(a_copy / "checkpoint_4" / item, source / item)
        words = "its items are of different checkpoints: params of step"
        _assert_passed_over(a_copy, a_copy / "checkpoint_4", words, capsys)


def test_an_item_without_a_stamp_among_others_is_of_another_checkpoint(a_copy, capsys):
    for name in (CHECKSUMS, STAMP):
        (a_copy / "checkpoint_4" / "optimizer" / name).unlink()
    words = (
        "its items are of different checkpoints: params of step 4, average of step 4, dataset of "
        "step 4, optimizer of an unknown one"
    )
    _assert_passed_over(a_copy, a_copy / "checkpoint_4", words, capsys)


def test_another_step_under_this_name_is_damage(run_dir, a_copy, capsys):
    _replace(a_copy / "checkpoint_4", run_dir / "checkpoint_2")
    words = "it is the checkpoint of step 2"
    _assert_passed_over(a_copy, a_copy / "checkpoint_4", words, capsys)


def test_what_is_no_checkpoint_where_one_should_be_is_damage(run_dir, a_copy, empty, capsys):
    shutil.rmtree(a_copy / "checkpoint_4")
    name = "its name is not checkpoint_ and a step from 0 to 2147483647"
    for source, words in (
        (empty, "params is missing"),
        ("", "it is no directory"),
        (None, "it is no directory"),
    ):
        _replace(a_copy / "checkpoint_6", source)
        _assert_passed_over(a_copy, a_copy / "checkpoint_6", words, capsys)
        integrity.set_aside(integrity.epath.Path(a_copy / "checkpoint_6"))
    for number in ("99999999999999999999", "2147483648", "-5", "02", "\u0664"):
        path = a_copy / f"checkpoint_{number}"
        source = run_dir / "checkpoint_2"
        _replace(path, source)
        _assert_passed_over(a_copy, path, name, capsys)
        shutil.rmtree(path)


def test_a_run_sets_aside_whatever_is_damaged_and_saves_its_steps_again(a_copy):
    shutil.rmtree(a_copy / "checkpoint_4" / "dataset")
    (a_copy / "checkpoint_6").write_text("")
    (a_copy / "checkpoint_8").symlink_to("/nowhere")
    (a_copy / "checkpoint_007").mkdir()
    assert int(toy.run(a_copy, 8).step) == 8
    kept = {path.name for path in a_copy.glob("*.damaged")}
    assert kept == {f"checkpoint_{step}.damaged" for step in ("4", "6", "8", "007")}
    assert [step for step, _ in list_checkpoints(str(a_copy))] == [2, 4, 6, 8]
    integrity.verify(a_copy / "checkpoint_4", ITEMS)


def test_an_older_checkpoint_without_stamps_is_valid_and_its_missing_items_are_still_found(
    a_copy, capsys
):
    checkpoint = a_copy / "checkpoint_4"
    for file in [*a_copy.rglob(STAMP), *a_copy.rglob(CHECKSUMS)]:
        file.unlink()
    integrity.verify(checkpoint, ITEMS)
    shutil.rmtree(checkpoint / "dataset")
    _assert_passed_over(a_copy, checkpoint, "dataset is missing", capsys)
    (checkpoint / "_CHECKPOINT_METADATA").unlink()
    integrity.verify(checkpoint, ITEMS)  # nothing says that there was one


def test_where_no_data_position_was_saved_a_line_says_that_the_data_begin_again(tmp_path, capsys):
    path = _save(tmp_path, 2, save_dataset=False)
    integrity.verify(path, ITEMS)
    restore_position(str(path), _iterator())
    assert f"{path} was saved without a position in the data" in capsys.readouterr().out


def test_parameters_can_be_converted_out_of_a_checkpoint_that_lacks_other_items(a_copy):
    shutil.rmtree(a_copy / "checkpoint_4" / "optimizer")
    assert open_params(str(a_copy / "checkpoint_4"))


@pytest.mark.parametrize(
    "item",
    ["optimizer", *(pytest.param(item, marks=pytest.mark.slow) for item in ("params", "dataset"))],
)
def test_a_run_resumes_from_the_newest_undamaged_checkpoint_and_ends_the_same(
    run_dir, a_copy, item, capsys
):
    damaged = _array_file(a_copy / "checkpoint_4" / item)
    _flip_a_bit(damaged)
    capsys.readouterr()
    state = toy.run(a_copy, 4, trainer={"ema_decay": 0.9})
    text = capsys.readouterr().out
    assert f"{damaged.relative_to(a_copy / 'checkpoint_4')} has the CRC-32" in text
    assert f"The newest undamaged checkpoint is {a_copy}/checkpoint_2" in text
    assert (a_copy / "checkpoint_4.damaged" / item).is_dir()
    assert [step for step, _ in list_checkpoints(str(a_copy))] == [2, 4]
    expected = open_params(str(run_dir / "checkpoint_4"))
    for name, array in open_params(str(a_copy / "checkpoint_4")).items():
        np.testing.assert_array_equal(array.read(), expected[name].read())
    assert int(state.step) == 4


def test_a_run_without_an_undamaged_checkpoint_stops_and_touches_none(a_copy):
    for step in (2, 4):
        _cut(_array_file(a_copy / f"checkpoint_{step}" / "params"))
    before = sorted(path.name for path in a_copy.iterdir())
    with pytest.raises(DamagedCheckpointError, match=r"no checkpoint is undamaged") as error:
        toy.run(a_copy, 6)
    assert "checkpoint_2 is damaged" in str(error.value)
    assert "checkpoint_4 is damaged" in str(error.value)
    assert sorted(path.name for path in a_copy.iterdir()) == before


def test_the_latest_of_another_run_is_its_newest_undamaged_one_and_a_named_one_is_refused(
    a_copy, tmp_path, capsys
):
    newest = str(a_copy / "checkpoint_4")
    _flip_a_bit(_array_file(a_copy / "checkpoint_4" / "params"))
    for mode in ("specific", "latest"):
        [(step, path)] = select_checkpoints(RestoreCheckpointConfig(str(a_copy), mode))
        assert (step, path) == (2, str(a_copy / "checkpoint_2"))
    assert "checkpoint_4 is damaged" in capsys.readouterr().out
    adapted = toy.run(tmp_path / "new", 3, restore=RestoreCheckpointConfig(str(a_copy)))
    assert int(adapted.step) == 3
    for params_only in (False, True):
        restore = RestoreCheckpointConfig(newest, params_only=params_only)
        with pytest.raises(DamagedCheckpointError, match=r"params/.* has the CRC-32"):
            toy.run(tmp_path / "named", 5, restore=restore)
    with pytest.raises(DamagedCheckpointError, match=r"params/.* has the CRC-32"):
        open_params(newest)
    assert not list(a_copy.glob("*.damaged"))


def test_what_has_no_checksums_is_read_as_it_is(a_copy):
    for file in [*a_copy.rglob(CHECKSUMS), *a_copy.rglob(STAMP)]:
        file.unlink()
    assert int(toy.run(a_copy, 5).step) == 5


def test_checksums_may_be_left_out(tmp_path):
    state = TrainState(jnp.int32(1), {"a": jnp.arange(3.0)}, None)
    for checksums in (False, True):
        config = SaveCheckpointConfig(save_dataset=False, checksums=checksums)
        directory = tmp_path / str(checksums)
        checkpointer = Checkpointer(str(directory), config)
        checkpointer.save(state)
        checkpointer.close()
        assert (directory / "checkpoint_1" / "params" / CHECKSUMS).exists() == checksums
        stored = restore_params(str(directory / "checkpoint_1"), {"a": jnp.zeros(3)})
        np.testing.assert_array_equal(stored["a"], [0.0, 1.0, 2.0])


def test_a_name_that_is_taken_is_not_overwritten(tmp_path):
    for content in ("first", "second", "third"):
        (tmp_path / "checkpoint_4").mkdir()
        (tmp_path / "checkpoint_4" / "file").write_text(content)
        integrity.set_aside(integrity.epath.Path(tmp_path / "checkpoint_4"))
    kept = {path.name: (path / "file").read_text() for path in tmp_path.iterdir()}
    assert kept == {
        "checkpoint_4.damaged": "first",
        "checkpoint_4.damaged_2": "second",
        "checkpoint_4.damaged_3": "third",
    }


def test_the_checksums_are_those_of_other_programs(run_dir):
    import zlib

    listed = json.loads((run_dir / "checkpoint_4" / "params" / CHECKSUMS).read_text())
    for name, entry in listed.items():
        content = (run_dir / "checkpoint_4" / "params" / name).read_bytes()
        assert entry == {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
    assert "manifest.ocdbt" in listed


@pytest.mark.parametrize("text", ["", '{"training_eval/loss": 1', "\0\0\0\0"])
def test_metrics_of_a_checkpoint_that_cannot_be_read_do_not_stop_a_run(a_copy, text, capsys):
    item = a_copy / "checkpoint_2" / "metrics"
    item.mkdir()
    (item / "metrics").write_text(text)
    config = SaveCheckpointConfig(keep=1, keep_best_metric="training_eval/loss")
    Checkpointer(str(a_copy), config).close()
    assert f"{item}/metrics is not readable" in capsys.readouterr().out
    assert (a_copy / "checkpoint_2" / "metrics.damaged" / "metrics").read_text() == text


def test_readable_metrics_stay_as_they_are(a_copy):
    item = a_copy / "checkpoint_2" / "metrics"
    item.mkdir()
    (item / "metrics").write_text('{"training_eval/loss": 1.5}')
    Checkpointer(str(a_copy), SaveCheckpointConfig()).close()
    assert (item / "metrics").read_text() == '{"training_eval/loss": 1.5}'


def test_a_resumed_run_reads_each_file_for_its_checksum_once(a_copy, monkeypatch):
    read = []
    original = integrity._checksum
    monkeypatch.setattr(
        integrity, "_checksum", lambda file: read.append(str(file)) or original(file)
    )
    toy.run(a_copy, 4)
    listed = [
        str(a_copy / "checkpoint_4" / item / name)
        for item in ITEMS
        for name in json.loads((a_copy / "checkpoint_4" / item / CHECKSUMS).read_text())
    ]
    assert sorted(read) == sorted(listed)


def test_a_single_checkpoint_is_looked_at_when_it_is_chosen(a_copy):
    shutil.rmtree(a_copy / "checkpoint_2")
    _flip_a_bit(_array_file(a_copy / "checkpoint_4" / "params"))
    for path in (a_copy, a_copy / "checkpoint_4"):
        with pytest.raises(DamagedCheckpointError, match=r"checkpoint_4 is damaged:\n  params/"):
            select_checkpoints(RestoreCheckpointConfig(str(path)))
    # All checkpoints of a run are verified only when they are restored.
    assert len(select_checkpoints(RestoreCheckpointConfig(str(a_copy), "all"))) == 1


TWO_PROCESSES = """
import pathlib, sys
sys.path.insert(0, {tests!r})
import jax
jax.distributed.initialize("localhost:{port}", 2, int(sys.argv[1]))
import toy
from jax.experimental import multihost_utils
from diffusion_t5x.commands import launch_local
from diffusion_t5x.checkpointing import integrity

run, read = pathlib.Path({run!r}), []
toy.run(run, 4)
if jax.process_index() == 0:
    for item, process in (("params", 0), ("optimizer", 1)):
        name, _, _ = integrity._listed_files(run / "checkpoint_4" / item)[process]
        file = run / "checkpoint_4" / item / name
        file.write_bytes(bytes(file.stat().st_size))
multihost_utils.sync_global_devices("damaged")
original = integrity._checksum
integrity._checksum = lambda file: read.append(str(file)) or original(file)
state = toy.run(run, 5)
print("READ", sorted(file for file in read if "/checkpoint_2/" in file))
print("STEP", int(state.step))
"""


@pytest.mark.slow
def test_two_processes_share_the_reading_and_agree_on_what_is_damaged(tmp_path):
    run = tmp_path / "run"
    program = TWO_PROCESSES.format(
        tests=os.path.dirname(toy.__file__), port=launch_local.free_port(), run=str(run)
    )
    environment = {**launch_local.process_environment(1), "PYTHONPATH": os.getcwd()}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(index)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    printed = [out for out, _ in outputs]
    assert all("STEP 5" in out for out in printed)
    for found, other, out in (("params", 1, printed[0]), ("optimizer", 0, printed[1])):
        assert re.findall(r"  (\w+)/.* has the CRC-32", out) == [found]
        assert f"  process {other} found damage; its output names the files" in out
        assert f"The newest undamaged checkpoint is {run}/checkpoint_2" in out
    shares = [set(ast.literal_eval(out.partition("READ ")[2].splitlines()[0])) for out in printed]
    assert all(shares) and not shares[0] & shares[1]
    listed = {
        str(run / "checkpoint_2" / item / name)
        for item in ITEMS
        if item != "average"
        for name in json.loads((run / "checkpoint_2" / item / CHECKSUMS).read_text())
    }
    assert shares[0] | shares[1] == listed
    assert (run / "checkpoint_4.damaged").is_dir()
    assert [step for step, _ in list_checkpoints(str(run))] == [2, 4, 5]
