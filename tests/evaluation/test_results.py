"""Results: the best checkpoint where numbers are missing, and the files for people and programs."""

import json
import math

import pytest
from etils import epath

from diffusion_t5x.evaluation import results


def _rows(*values, task="a"):
    return [
        {"step": step, "task": task, "metrics": {} if value is None else {"bleu": value}}
        for step, value in enumerate(values, 1)
    ]


@pytest.mark.parametrize(("mode", "step"), [("max", 3), ("min", 2)])
def test_the_best_is_found_where_some_rows_lack_the_metric_or_have_no_number(mode, step):
    rows = _rows(math.nan, 1.0, 5.0, None, 2.0, math.nan)
    best = results.choose_best(rows, "bleu", mode)
    assert best == {"step": step, "task": "a", "metric": "bleu", "value": rows[step - 1][
        "metrics"]["bleu"]}  # fmt: skip


def test_a_metric_of_one_task_needs_no_task_though_there_are_others():
    rows = [*_rows(1.0, 2.0), {"step": 1, "task": "b", "metrics": {"f1": 9.0}}]
    assert results.choose_best(rows, "bleu", "max")["task"] == "a"
    assert results.choose_best(rows, "f1", "max")["task"] == "b"


def test_an_unknown_metric_is_refused_with_the_nearest_of_all_tasks():
    with pytest.raises(ValueError, match=r"'blue' is unknown; did you mean 'a/bleu'"):
        results.choose_best(_rows(1.0), "blue", "max")
    with pytest.raises(ValueError, match="BEST_METRIC = 'b/bleu'"):
        results.choose_best(_rows(1.0), "b/bleu", "max")


def test_results_are_written_for_programs_and_for_people(tmp_path):
    found = {"rows": _rows(1.0, 2.5), "best": None, "settings": {"split": "test"}}
    results.write_results(epath.Path(tmp_path) / "out", found)
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(stored.pop("checksum")) == 16
    assert stored == found
    assert (tmp_path / "out" / "results.md").read_text().splitlines() == [
        "| step | task | bleu |",
        "| --- | --- | --- |",
        "| 1 | a | 1 |",
        "| 2 | a | 2.5 |",
    ]
