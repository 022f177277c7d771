"""The pages: what they say to type runs, what they name exists, each figure has one place."""

import ast
import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import small_hf_models

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
# Commands run as written, but on fewer examples and with one layer.
SMALL = ["--gin.config.TransformerConfig.num_layers=1"]
FEWER = {
    "train": [*SMALL, "--gin.EVAL_STEPS=1", "--gin.BATCH_SIZE=8"],
    "eval": [
        *SMALL, "--gin.EVALUATOR_NUM_EXAMPLES=8", "--gin.NUM_SAMPLES=2", "--gin.BATCH_SIZE=8",
    ],
    "infer": [*SMALL, "--gin.NUM_SAMPLES=1", "--gin.BATCH_SIZE=8"],
    "sample": SMALL,
}  # fmt: skip
PAGES = sorted([README, ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")])
PACKAGE = ROOT / "diffusion_t5x"
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
        COMMANDS[name]([*argv, *FEWER.get(name, ())])
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


@pytest.mark.slow  # each step of the way has a test in its room
def test_a_model_becomes_a_diffusion_model_that_chats_as_the_page_on_adaptation_says(
    tmp_path,
):
    small_hf_models.write(tmp_path / "model")
    page = ROOT / "docs" / "adapt.md"
    [chats] = _blocks("json", page)
    (tmp_path / "chats.jsonl").write_text(chats)
    printed = ""
    for name, argv in _commands(page):  # in processes of their own: tasks keep the first vocabulary
        words = [word.replace("$MODEL", str(tmp_path / "model")) for word in argv]
        command = [sys.executable, "-m", f"diffusion_t5x.{name}", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        printed += done.stdout
    assert "step  10:" in printed  # of a canvas after a message
    assert {path.name for path in (tmp_path / "runs/mine").iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "decoder_config.json",
    }  # fmt: skip
    transformers = pytest.importorskip("transformers")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "runs/mine")


def test_the_page_on_tasks_gives_files_to_sources_that_exist():
    words = [word for block in _blocks("sh", TASKS) for word in shlex.split(block)]
    sources = {
        source
        for word in words
        if word.startswith("--gin.LOCAL_FILES=")
        for source in ast.literal_eval(word.split("=", 1)[1])
    }
    assert sources == {"wmt14", "squad_v1_1", "mbpp", "human_eval", "the_stack", "mc4_en", "chat"}
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
            *FEWER["train"],
        ]
    )
    assert int(state.step) == 2
    assert (tmp_path / "mine" / "checkpoint_2" / "params").is_dir()


def test_the_tutorial_runs_and_its_model_learns_its_two_texts(capsys):
    page = {}
    for block in _blocks("python", ROOT / "docs" / "tutorial.md"):
        exec(compile(block, "docs/tutorial.md", "exec"), page)
    assert page["losses"][-1] < page["losses"][0] / 20
    assert capsys.readouterr().out.splitlines()[-1].startswith("['cinq', 'dix']")


def _anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_of_a_page_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in (link for link in links if not link.startswith("http")):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in _anchors(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_of_this_project_that_a_page_names_exists(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    named = re.findall(r"`((?:[\w.]+/)+[\w.]*(?:\.py|\.gin|\.md|/))`", text)
    places = (ROOT, PACKAGE, ROOT / "gin", ROOT / "tasks")
    rooms = {path.name for place in places for path in place.iterdir() if path.is_dir()}
    for name in named:
        if name.partition("/")[0] in rooms:
            assert any((place / name).exists() for place in places), f"{page.name} names {name}"


def test_the_terms_of_each_group_of_the_glossary_are_in_order():
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    for group in text.split("\n## ")[1:]:
        terms = [
            re.sub("[`*]", "", row).lower().replace("-", " ")
            for row in re.findall(r"^\| ([^|]+) \|", group, re.M)
        ]
        assert terms[2:] == sorted(terms[2:]), group.partition("\n")[0]


def test_the_readmes_table_of_results_is_that_of_the_page_on_results():
    rows = [row for row in README.read_text(encoding="utf-8").splitlines() if "| 0." in row]
    assert len(rows) == 4
    assert set(rows) <= set((ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines())


def _room(module):
    """The room that a module of the package is in: a folder, or a file that is its own room."""
    name = module.split(".")[1]
    return f"{name}/" if (PACKAGE / name).is_dir() else f"{name}.py"


def _imports(path):
    """The modules of the package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffusion_t5x"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_a_room_imports_only_rooms_that_stand_above_it_on_the_page_on_architecture():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("| room | holds |")[2].partition("\n\n")[0]
    rooms = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert {f"{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} <= (
        set(rooms)
    )
    order = {room: place for place, room in enumerate(rooms)}
    for path in PACKAGE.rglob("*.py"):
        room = _room(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for imported in _imports(path):
            other = _room(imported)
            if (room, other) == ("models.py", "data/"):  # inside a method, as the page says
                continue
            if room in order and other in order:
                assert order[other] <= order[room], f"{path.name} imports {imported}"
