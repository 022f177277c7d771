"""What is installed is what a checkout holds: every module and every gin file."""

import os
import pathlib
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


@pytest.mark.parametrize("package", ["diffusion_t5x", "tasks"])
def test_every_module_is_installed(installed, package):
    expected = _files(ROOT / package, "*.py")
    assert len(expected) > 3
    assert _files(installed / package, "*.py") == expected


def test_every_gin_file_is_installed_inside_the_package(installed):
    expected = _files(ROOT / "gin", "*.gin")
    assert len(expected) > 15
    assert _files(installed / "diffusion_t5x" / "gin", "*.gin") == expected


def test_nothing_installed_takes_the_name_of_another_project(installed):
    # A package `gin` of ours would hide gin-config's.
    assert {path.name for path in installed.iterdir()} == {"diffusion_t5x", "tasks"}
    assert not _files(ROOT / "gin", "*.py")


def test_the_gin_files_of_an_installed_package_are_found_and_parse(installed, tmp_path):
    program = (
        "import sys, gin, diffusion_t5x\n"
        "from diffusion_t5x import gin_utils\n"
        "files = ['models/tiny.gin', 'objectives/diffusion.gin', 'runs/finetune.gin']\n"
        "names = ['MODEL_DIR', 'MIXTURE_OR_TASK_NAME', 'TASK_FEATURE_LENGTHS',\n"
        "         'INITIAL_CHECKPOINT_PATH']\n"
        "gin_utils.parse_config(files, [f'{name}=x' for name in names])\n"
        "print(gin_utils.config_dir(), gin.query_parameter('%NUM_STEPS'))\n"
        "ours = [m for name, m in sys.modules.items() if name.startswith('diffusion_t5x')]\n"
        "print(*{m.__file__ for m in ours if m.__file__})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed), "TF_CPP_MIN_LOG_LEVEL": "3"}
    # From another directory, so that the checkout is not on the path.
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    place, num_steps, *modules = done.stdout.split()
    assert (place, num_steps) == (str(installed / "diffusion_t5x" / "gin"), "10")
    # A checkout that is installed as well, editable, must not have filled a gap.
    assert len(modules) > 10
    assert not [module for module in modules if not module.startswith(str(installed))]


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
