"""Which checkpoint a path names, whatever it is called and wherever it is typed."""

import os
import shutil

import pytest
import toy

from diffusion_t5x.checkpointing import conversion
from diffusion_t5x.checkpointing.checkpoints import RestoreCheckpointConfig, select_checkpoints


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of three steps, a link to a checkpoint, and copies, one of them T5X's."""
    directory = tmp_path_factory.mktemp("place")
    toy.run(directory / "run", 3, toy.model("autoregressive"), period=1)
    os.symlink("run/checkpoint_2", directory / "best")
    shutil.copytree(directory / "run" / "checkpoint_3", directory / "my best")
    (directory / "elsewhere").mkdir()
    return directory


def _select(path):
    return select_checkpoints(RestoreCheckpointConfig(str(path)))


@pytest.mark.parametrize(
    ("name", "step"),
    [("best", 2), ("best/", 2), ("my best", 3), ("run/checkpoint_1", 1), ("run", 3)],
)
def test_a_checkpoint_is_one_under_any_name_and_has_its_own_step(place, name, step, monkeypatch):
    assert _select(place / name)[0][0] == step
    monkeypatch.chdir(place / "elsewhere")
    [(found, path)] = _select(f"../{name}")
    assert found == step
    assert os.path.isabs(path)


def test_a_run_starts_from_a_copy_at_its_step(place, tmp_path):
    restore = RestoreCheckpointConfig(str(place / "my best"))
    state = toy.run(tmp_path, 5, toy.model("autoregressive"), restore=restore)
    assert int(state.step) == 5
    assert not (tmp_path / "checkpoint_2").exists()


def test_what_was_typed_is_not_offered_again(place):
    with pytest.raises(FileNotFoundError, match=r"did you mean 'best'\?"):
        _select(place / "bset")
    with pytest.raises(FileNotFoundError) as error:
        _select(place / "elsewhere")
    assert "elsewhere" not in str(error.value).partition("In ")[2].partition(": ")[2]


@pytest.mark.parametrize("layout", ["diffusion_t5x", "t5x"])
def test_a_conversion_goes_where_a_path_with_dots_leads(place, layout, tmp_path, monkeypatch):
    monkeypatch.chdir(place / "elsewhere")
    destination = os.path.relpath(tmp_path / "absent" / ".." / "to", os.getcwd())
    done = conversion.convert("../my best", f"{destination}/../to", layout)
    assert done.path == str(tmp_path / "to" / "checkpoint_3")
    assert {path.name for path in (tmp_path / "to").iterdir()} == {"checkpoint_3", "network.gin"}
    assert [path.name for path in tmp_path.iterdir()] == ["to"]
    os.rename(done.path, tmp_path / "copied")
    assert _select(tmp_path / "copied")[0][0] == (3 if layout == "t5x" else 0)
    if layout == "t5x":
        monkeypatch.chdir(tmp_path)
        again = conversion.convert("to/../copied", "ours")
        assert again.step == 3


def test_a_conversion_that_fails_leaves_nothing(place, tmp_path, monkeypatch):
    from diffusion_t5x.interop import t5x_checkpoints

    def fail(*args):
        raise OSError("no room")

    monkeypatch.setattr(t5x_checkpoints, "_write_array", fail)
    with pytest.raises(OSError, match="no room"):
        conversion.convert(str(place / "run"), str(tmp_path / "to"), "t5x")
    assert list((tmp_path / "to").iterdir()) == []
