"""What the README tells a reader to type runs as written."""

import ast
import json
import pathlib
import re
import shlex

import pytest

import tasks  # noqa: F401
from diffusion_t5x import eval as eval_command
from diffusion_t5x import infer, launch, sample, train
from diffusion_t5x.data.files import local_files
from diffusion_t5x.experiments import __main__ as experiments

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
TASKS = ROOT / "docs" / "tasks.md"
COMMANDS = {
    "train": train.main,
    "eval": eval_command.main,
    "infer": infer.main,
    "sample": sample.main,
    "experiments": experiments.main,
    "launch": launch.main,
}
DATA_FLAGS = ("MIXTURE_OR_TASK_NAME", "MODEL_DIR", "TASK_FEATURE_LENGTHS")


def _blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def _commands(page=README):
    for block in _blocks("sh", page):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["python", "-m"]:
                yield words[2].removeprefix("diffusion_t5x."), words[3:]


def test_the_commands_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = list(_commands())
    names = ["train", "train", "train", "eval", "infer", "sample"]
    assert [name for name, _ in commands] == [*names, *["launch"] * 4, *["experiments"] * 2]
    for name, argv in commands:
        COMMANDS[name](argv)
    results = json.loads((tmp_path / "runs/readme/eval/results.json").read_text())
    assert [row["step"] for row in results["rows"]] == [40, 50]
    assert results["best"]["metric"] == "bleu"
    [predictions] = (tmp_path / "runs/readme/infer").glob("*.jsonl-00000-of-00100")
    assert all("prediction" in json.loads(line) for line in predictions.read_text().splitlines())
    assert "step  10:" in capsys.readouterr().out


def test_the_commands_of_the_page_on_experiments_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, argv in _commands(ROOT / "docs" / "experiments.md"):
        COMMANDS[name](argv)
        assert capsys.readouterr().out


def test_the_page_on_tasks_gives_files_to_sources_that_exist():
    words = [word for block in _blocks("sh", TASKS) for word in shlex.split(block)]
    sources = {
        source
        for word in words
        if word.startswith("--gin.LOCAL_FILES=")
        for source in ast.literal_eval(word.split("=", 1)[1])
    }
    assert sources == {"wmt14", "squad_v1_1", "mbpp", "human_eval", "the_stack", "mc4_en"}
    assert sources <= local_files._KNOWN


@pytest.fixture
def my_tasks(tmp_path, monkeypatch):
    [module] = [block for block in _blocks("python") if block.startswith("# my_tasks.py")]
    (tmp_path / "my_tasks.py").write_text(module)
    for split in ("train", "dev"):
        lines = [f"{split} {number}\t{number} {split}\n" for number in range(40)]
        (tmp_path / f"{split}.tsv").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_task_of_ones_own_trains_without_a_change_to_the_package(tmp_path, my_tasks):
    _, argv = next(_commands())
    kept = [flag for flag in argv if not any(name in flag for name in DATA_FLAGS)]
    state = train.main(
        [
            *kept,
            "--gin.MIXTURE_OR_TASK_MODULE=my_tasks",
            "--gin.MIXTURE_OR_TASK_NAME=my_task",
            "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 16}",
            "--gin.MODEL_DIR=mine",
            "--gin.TRAIN_STEPS=2",
        ]
    )
    assert int(state.step) == 2
    assert (tmp_path / "mine" / "checkpoint_2" / "params").is_dir()
