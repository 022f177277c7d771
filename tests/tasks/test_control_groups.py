"""Control groups: where they may be made, and that they bound and end what is in them."""

import os
import pathlib
import subprocess
import sys

import pytest

from tasks.sandbox import control_groups

HERE = bool(control_groups.find_parents())


def _process(tmp_path, cgroup, mountinfo):
    """A process as the kernel describes it, whose hierarchies are folders of `tmp_path`."""
    (tmp_path / "cgroup").write_text(cgroup)
    (tmp_path / "mountinfo").write_text(mountinfo.replace("PLACE", str(tmp_path)))
    return tmp_path


VERSION_2 = "31 23 0:28 / PLACE/unified rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def test_version_2_takes_the_nearest_group_whose_children_have_both_controllers(tmp_path):
    session = tmp_path / "unified" / "user.slice" / "session-3.scope"
    session.mkdir(parents=True)
    (tmp_path / "unified" / "cgroup.subtree_control").write_text("cpu memory pids\n")
    (tmp_path / "unified" / "user.slice" / "cgroup.subtree_control").write_text("memory pids\n")
    (session / "cgroup.subtree_control").write_text("\n")
    process = _process(tmp_path, "0::/user.slice/session-3.scope\n", VERSION_2)
    assert control_groups.find_parents(process) == (tmp_path / "unified" / "user.slice",) * 2


def test_version_2_without_controllers_gives_none(tmp_path):
    (tmp_path / "unified" / "own").mkdir(parents=True)
    (tmp_path / "unified" / "cgroup.subtree_control").write_text("cpu\n")
    assert control_groups.find_parents(_process(tmp_path, "0::/own\n", VERSION_2)) == ()


def test_version_1_takes_the_own_group_of_each_hierarchy_also_of_a_part_that_is_mounted(tmp_path):
    mounts = (
        "32 31 0:29 / PLACE/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
        "33 31 0:30 /jobs PLACE/memory rw - cgroup cgroup rw,memory\n"
        "34 31 0:31 / PLACE/pids rw - cgroup cgroup rw,pids\n" + VERSION_2
    )
    for folder in ("memory/a", "pids", "unified"):
        (tmp_path / folder).mkdir(parents=True)
    own = "3:cpu,cpuacct:/\n2:memory:/jobs/a\n1:pids:/\n0::/\n"
    expected = (tmp_path / "memory" / "a", tmp_path / "pids")
    assert control_groups.find_parents(_process(tmp_path, own, mounts)) == expected


@pytest.mark.parametrize("own", ["2:memory:/elsewhere/a\n1:pids:/\n", "1:pids:/\n", ""])
def test_what_is_not_mounted_gives_none(tmp_path, own):
    mounts = (
        "33 31 0:30 /jobs PLACE/memory rw - cgroup cgroup rw,memory\n"
        "34 31 0:31 / PLACE/pids rw - cgroup cgroup rw,pids\n"
    )
    assert control_groups.find_parents(_process(tmp_path, own, mounts)) == ()


@pytest.mark.skipif(not HERE, reason="no control group is to be had here")
def test_memory_of_all_processes_is_bounded_and_the_group_goes():
    group = control_groups.create(64 * 2**20, 16)
    hoard = "import os\nif os.fork(): os.wait()\nelse: x = bytearray(os.urandom(1)) * 2**27"
    joins = "; ".join(f"echo 0 > {path}/cgroup.procs" for path in group.directories)
    command = f'{joins}; exec "{sys.executable}" -I -S -c "$0"'
    subprocess.run(["sh", "-c", command, hoard], check=False, timeout=60)
    assert group.ran_out_of_memory()
    assert all(path.exists() for path in group.directories)
    group.remove()
    assert not any(path.exists() for path in group.directories)


@pytest.mark.skipif(not HERE, reason="no control group is to be had here")
def test_groups_of_processes_that_are_gone_are_removed_and_others_kept():
    gone = subprocess.Popen(["true"])
    gone.wait()
    left, kept = (
        pathlib.Path(parent, f"{control_groups._PREFIX}-{pid}-0")
        for parent, pid in zip(
            control_groups.find_parents()[:1] * 2, (gone.pid, os.getpid()), strict=True
        )
    )
    left.mkdir()
    kept.mkdir()
    try:
        control_groups.clear_leftovers()
        assert (left.exists(), kept.exists()) == (False, True)
    finally:
        kept.rmdir()
