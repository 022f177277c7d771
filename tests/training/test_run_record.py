"""The record of a run: what may not change is compared, and a damaged record is refused by name."""

import json

import pytest

from diffusion_t5x.training import run_record
from diffusion_t5x.training.run_record import OtherRunError

SETTINGS = {"network": "DecoderOnly", "mixture": "a_task"}


def test_a_record_holds_the_settings_and_the_first_step(tmp_path):
    assert run_record.read(str(tmp_path)) == {}
    run_record.write(str(tmp_path), SETTINGS, 25)
    assert run_record.read(str(tmp_path)) == {**SETTINGS, "first_step": 25}
    run_record.check(str(tmp_path), SETTINGS)
    with pytest.raises(OtherRunError, match="MIXTURE_OR_TASK_NAME: a_task there, another here"):
        run_record.check(str(tmp_path), {**SETTINGS, "mixture": "another"})


def test_a_record_of_an_older_version_is_compared(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(OtherRunError, match="network: DecoderOnly there, T5 here"):
        run_record.check(str(tmp_path), {**SETTINGS, "network": "T5"})


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "", lambda text: text[:-9], lambda text: "\0" * len(text),
        lambda text: "[]", lambda text: text.replace("25", "26"),
        lambda text: text.replace("DecoderOnly", "T5"), lambda text: "\ufffd" + text,
    ],
)  # fmt: skip
def test_a_damaged_record_is_refused_with_its_path_and_the_way_out(tmp_path, damage, capsys):
    run_record.write(str(tmp_path), SETTINGS, 25)
    path = tmp_path / "run.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(OtherRunError, match=f"{path} is damaged.*delete it"):
        run_record.check(str(tmp_path), SETTINGS)
    path.unlink()
    run_record.check(str(tmp_path), SETTINGS)
    assert f"{path} is missing" in capsys.readouterr().out
