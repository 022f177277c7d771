"""Programs that attack, by kind: nothing outside changes, nothing is left, and each gets a verdict.

`tests/tools/hostile_programs.py` has the programs.
"""

import concurrent.futures
import contextlib
import ctypes
import os
import pathlib
import re
import resource
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time

import pytest

from tasks import code_execution
from tasks.sandbox import jails, judge, scratch
from tests.tools import hostile_programs
from tests.tools.hostile_programs import KINDS, NUMBERS, TOOLS, attack

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
MARK = f"# of the test with number {os.getpid()}"
libc = ctypes.CDLL(None, use_errno=True)


def _judge(jail, tried, outside=()):
    limits = code_execution.Limits(**tried.limits)
    names = {"many": False, **NUMBERS, **dict(outside)}
    job = code_execution._job(f"W = {names!r}\n{TOOLS}\n{tried.program}\n", tried.tests,
                              tried.limits.get("modules", ()))  # fmt: skip
    return judge.judge(jail, job, code_execution.bounds(limits), limits.wall_seconds)


def _find_modes():
    """Returns the jails of this machine by name, and whether a program may have processes there."""
    found = {}
    for lacks, make in code_execution._ways(code_execution.Limits().modules, False):
        name = "landlock" if lacks else "namespaces"
        with contextlib.suppress(OSError, judge.JailError):
            jail = make()
            if name not in found and _judge(jail, attack("", tests=("x = 1",))):
                forks = attack("if os.fork() == 0: os._exit(0)", tests=("x = 1",))
                found[name] = jail, bool(_judge(jail, forks))
    return found


FOUND = _find_modes()
IN_EVERY_MODE = pytest.mark.parametrize("mode", [
    pytest.param(mode, marks=[] if mode in FOUND else pytest.mark.skip(f"{mode}: not to be had"))
    for mode in ("namespaces", "landlock")
])  # fmt: skip


def _look(*places):
    """Returns what is known of files, but for when they were last read."""
    found = {}
    for path in map(str, places):
        state, attributes = os.lstat(path), os.listxattr(path, follow_symlinks=False)
        found[path] = [
            state.st_mode, state.st_uid, state.st_gid, state.st_nlink, state.st_mtime_ns,
            state.st_ctime_ns, state.st_ino, [os.getxattr(path, x) for x in attributes],
            pathlib.Path(path).read_bytes() if stat.S_ISREG(state.st_mode) else None,
        ]  # fmt: skip
        if stat.S_ISDIR(state.st_mode):
            found |= _look(*(f"{path}/{name}" for name in os.listdir(path)))
    return found


def _status(pid):
    """Returns what others may change of a process."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    lines = re.findall(r"^(?:State|Uid|SigPnd|ShdPnd|Seccomp|TracerPid):.*", status, re.MULTILINE)
    limits = pathlib.Path(f"/proc/{pid}/limits").read_text()
    return (lines, limits, os.sched_getaffinity(pid), os.getpriority(os.PRIO_PROCESS, pid),
            os.sched_getscheduler(pid), os.getpgid(pid))  # fmt: skip


class _Outside:
    """What is outside: files, a process, who gets messages, objects in the kernel."""

    def __init__(self, opened):
        self.folder = pathlib.Path(tempfile.mkdtemp(dir="/var/tmp"))  # in no jail
        opened.callback(shutil.rmtree, self.folder)
        self.folder.chmod(0o777)
        for name in ("file", "other"):
            (self.folder / name).write_text("secret")
            (self.folder / name).chmod(0o666)
        with contextlib.suppress(OSError):  # not every file system has them
            os.setxattr(self.folder / "file", "user.theirs", b"x")
        (self.folder / "empty").mkdir()
        (self.folder / "empty").chmod(0o777)
        os.mkfifo(self.folder / "pipe")
        os.chmod(self.folder / "pipe", 0o666)
        self.process = subprocess.Popen(["sleep", "99"], start_new_session=True)
        opened.callback(self.process.wait)
        opened.callback(self.process.kill)
        assert _soon(lambda: "State:\tS (sleeping)" in _status(self.process.pid)[0])
        home = os.path.expanduser("~")
        own = [f"{home}/{name}" for name in os.listdir(home)] if os.access(home, os.R_OK) else []
        packages = pathlib.Path(os.__file__).parent / "site-packages"
        processes = ("self", "1", os.getpid(), self.process.pid)
        self.names = {
            **{name: str(self.folder / name) for name in ("file", "empty", "pipe")},
            "folder": str(self.folder), "bystander": self.process.pid, "judge": os.getpid(),
            "unreadable": [
                f"{self.folder}/file", __file__, str(REPOSITORY / "setup.py"), "/etc/passwd",
                *(f"/proc/{process}/{name}" for process in processes
                  for name in ("environ", "cmdline", "maps", "mem", "root/etc/passwd")),
                pytest.__file__, *map(str, sorted(packages.glob("*/__init__.py"))[:9]),
                *(path for path in own if not os.path.realpath(sys.base_prefix).startswith(path)),
            ],
        }  # fmt: skip
        self.sockets = {}
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            for what, family, address in (
                ("socket", socket.AF_UNIX, f"{self.folder}/socket {kind}"),
                ("abstract", socket.AF_UNIX, f"\0hostile {os.getpid()} {kind}"),
                ("port", socket.AF_INET, ("127.0.0.1", 0)),
            ):
                it = self.sockets[what, kind] = opened.enter_context(socket.socket(family, kind))
                it.bind(address)
                if kind == socket.SOCK_STREAM:
                    it.listen()
                self.names[what, int(kind)] = it.getsockname()[1] if what == "port" else address
            os.chmod(self.names["socket", kind], 0o777)
        key = os.getpid() | 0x40000000
        self.memory, self.queue = libc.shmget(key, 4096, 0o1666), libc.msgget(key, 0o1666)
        opened.callback(libc.shmctl, self.memory, 0, None)
        opened.callback(libc.msgctl, self.queue, 0, None)
        shared = opened.enter_context(tempfile.NamedTemporaryFile(dir="/dev/shm"))  # noqa: SIM115
        os.fchmod(shared.fileno(), 0o666)
        self.names |= {"key": key, "memory": self.memory, "queue": self.queue,
                       "shared name": os.path.basename(shared.name)}  # fmt: skip

    def state(self):
        """Returns all that must stay as it is, by names."""
        libc.shmat.restype = ctypes.c_void_p
        memory = ctypes.string_at(at := libc.shmat(self.memory, None, 0), 4096)
        libc.shmdt(ctypes.c_void_p(at))
        return {
            **_look(self.folder),
            # Root's programs have devices of their own; a user may touch these.
            **{name: (it.st_mode, it.st_uid, it.st_gid, it.st_mtime_ns * (os.geteuid() == 0))
               for name in ("/dev/null", "/dev/zero", "/dev/urandom") for it in [os.stat(name)]},
            **{key: select.select([it], [], [], 0)[0] != [] for key, it in self.sockets.items()},
            "messages": libc.msgrcv(self.queue, ctypes.create_string_buffer(99), 90, 0, 0o4000),
            "bystander": _status(self.process.pid), "judge": _status(os.getpid())[1:],
            "memory": memory,
        }  # fmt: skip


@pytest.fixture
def outside(monkeypatch):
    monkeypatch.setenv("A_SECRET", "SECRET")
    with contextlib.ExitStack() as opened:
        yield _Outside(opened)


def _left(judge_pid, mark):
    """Returns what there is of a judge: processes by their whole command lines, and by the users
    that it makes for programs, and control groups.
    """
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            marked = mark.encode() in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
            user = os.stat(f"/proc/{pid}").st_uid - jails._FIRST_UID
            if (marked or user >> 8 == judge_pid & 0x3FFFFF) and int(pid) != judge_pid:
                found.append(int(pid))
    return found, [
        f"{place}/{name}"
        for place, names, _ in os.walk("/sys/fs/cgroup")
        for name in names
        if name.startswith(f"generated-code-{judge_pid}-")
    ]


def _soon(what, seconds=5):
    """Waits until something holds, and returns whether it does."""
    until = time.monotonic() + seconds
    while not what() and time.monotonic() < until:
        time.sleep(0.02)
    return bool(what())


@IN_EVERY_MODE
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_outside_changes_nothing_is_left_and_each_gets_its_verdict(
    kind, mode, outside, monkeypatch
):
    jail, many = FOUND[mode]
    monkeypatch.setattr(jails, "_BOOT", f"{jails._BOOT}\n{MARK}\n")

    def run(name):
        tried, start = KINDS[kind][name], time.monotonic()
        try:
            verdict = _judge(jail, tried, {**outside.names, "many": many})
        except Exception as error:
            return f"{name}: raised {error!r}"
        late = time.monotonic() - start > tried.limits["wall_seconds"] + 5
        said = "passed" if verdict else verdict.why
        return f"{name}: {said} {late}" if late or not re.search(tried.why, said) else ""

    before, most = outside.state(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(run, name) for name in KINDS[kind]]
        if concurrent.futures.wait(futures, 40).not_done:  # else these would wait for ever
            with contextlib.suppress(OSError):
                os.close(os.open(outside.names["pipe"], os.O_WRONLY | os.O_NONBLOCK))
            for pid in _left(os.getpid(), MARK)[0]:
                os.kill(pid, signal.SIGKILL)
        wrong = [future.result() for future in futures if future.result()]
    assert not wrong, "\n".join(wrong)
    after = outside.state()
    assert {name for name in before | after if before.get(name) != after.get(name)} == set()
    assert _soon(lambda: _left(os.getpid(), MARK) == ([], []), 1), _left(os.getpid(), MARK)
    assert [name for name in os.listdir(scratch.own()) if name.isdigit()] == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 2**17  # in kilobytes


@pytest.mark.parametrize("name", ["CHANGES", "BY_DESCRIPTOR", "BY_LINK", "MESSAGES", "SIGNALS"])
def test_the_same_attacks_succeed_without_a_jail(name, outside, tmp_path):
    before, program = outside.state(), getattr(hostile_programs, name)
    names = {**NUMBERS, **outside.names, "judge": outside.process.pid}
    text = f"W = {names!r}\n{TOOLS}\n{program}\nprint(len(done))"
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert int(done.stdout) > 5, done.stderr
    if name == "SIGNALS":
        assert outside.process.wait(5) < 0
    else:
        assert outside.state() != before


@IN_EVERY_MODE
def test_a_thread_that_a_module_started_is_no_way_out(mode, outside, monkeypatch):
    name = f"busy_in_{mode}"
    (outside.folder / f"{name}.py").write_text(
        "import queue, threading\nwork = queue.Queue()\ndef run():\n    while True: work.get()()\n"
        "threading.Thread(target=run, daemon=True).start()\n"
    )
    monkeypatch.syspath_prepend(outside.folder)
    program = f"""
import {name}
{name}.work.put(lambda: attempt(open, W['file'], 'a'))
time.sleep(0.3)
"""
    [make, *_] = [
        make for lacks, make in code_execution._ways((name,), False)
        if bool(lacks) == (mode == "landlock")
    ]  # fmt: skip
    try:
        assert _judge(make(), attack(program, modules=(name,)), outside.names)
    except judge.JailError as error:  # such a module is refused
        assert "thread" in str(error) and "No module" not in str(error)


def test_a_child_of_the_judge_that_ends_leaves_the_judges_directory(tmp_path):
    program = f"""
import os, sys, tempfile
sys.path.insert(0, {str(REPOSITORY)!r})
sys.modules["tasks"] = package = type(sys)("tasks")
package.__path__ = [{os.path.dirname(code_execution.__file__)!r}]
tempfile.tempdir = {str(tmp_path)!r}
from tasks.sandbox import scratch
here = scratch.own()
if (child := os.fork()) == 0:
    assert scratch.own() != here
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
print(here.exists(), len(list(here.parent.iterdir())))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("True 1\n", "")
    assert list(tmp_path.iterdir()) == []


JUDGE = """
import sys, tempfile, types
sys.modules["tasks"] = package = types.ModuleType("tasks")
package.__path__, tempfile.tempdir = [{tasks!r}], {folder!r}
from tasks import code_execution
from tasks.sandbox import jails
jails._BOOT += "\\n# " + {mark!r}
code_execution.configure(wall_seconds=99, modules=())
[make, *_] = [make for lacks, make in code_execution._ways((), False) if bool(lacks) == {lacks}]
jail = make()
code_execution.find_jail = lambda *_: jail
print("made", flush=True)
print(code_execution.run_all({programs!r}))
"""
SLEEPER = "import time\ntime.sleep(99)"
TREE = f"""
import os
for _ in range(3):
    try:
        if os.fork() == 0: os.setsid()
    except OSError: pass
{SLEEPER}
"""


@pytest.fixture
def another_judge():
    """Starts processes that judge programs; what they write is in a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="judges-", dir="/tmp") as name:
        os.chmod(name, 0o755)
        started = []

        def start(mode, programs, least=0):
            script = JUDGE.format(
                tasks=os.path.dirname(code_execution.__file__), folder=name, mark=name,
                lacks=mode == "landlock", programs=[(program, []) for program in programs],
            )  # fmt: skip
            process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE, text=True)  # fmt: skip
            started.append(process)
            assert process.stdout.readline() == "made\n", process.communicate()
            assert _soon(lambda: len(_left(process.pid, name)[0]) >= least, 20)
            time.sleep(0.5)  # until the programs themselves run
            return process, pathlib.Path(name)

        yield start
        for process in started:
            process.kill()
            process.communicate()


@IN_EVERY_MODE
def test_nothing_outlives_a_judge_that_is_killed_but_what_the_next_one_clears(mode, another_judge):
    killed, folder = another_judge(mode, [SLEEPER, TREE], 2)
    killed.kill()
    killed.wait()
    assert _soon(lambda: not _left(killed.pid, folder.name)[0]), _left(killed.pid, folder.name)
    assert list(folder.iterdir()) or mode == "namespaces"
    other, _ = another_judge(mode, ["x = 1"])
    assert other.communicate()[0] == "[True]\n"
    assert (_left(killed.pid, folder.name), list(folder.iterdir())) == (([], []), [])


@IN_EVERY_MODE
def test_an_interrupted_judge_ends_all_at_once(mode, another_judge):
    interrupted, folder = another_judge(mode, [SLEEPER] * 20, 2)
    start = time.monotonic()
    interrupted.send_signal(signal.SIGINT)
    assert interrupted.communicate()[1].rstrip().endswith("KeyboardInterrupt")
    assert time.monotonic() - start < 2
    assert (_left(interrupted.pid, folder.name), list(folder.iterdir())) == (([], []), [])


def _opened_to_others(paths):
    """Returns options of bubblewrap with which every user reaches paths in closed directories."""
    options, opened = [], set()
    for path in paths:
        closed = [x for x in path.parents if not x.stat().st_mode & stat.S_IXOTH]
        if closed and closed[-1] not in opened:
            options += ["--perms", "0755", "--tmpfs", closed[-1]]
            opened.add(closed[-1])
        if closed:
            for place in reversed([x for x in path.parents if x.is_relative_to(closed[-1])][:-1]):
                options += ["--perms", "0755", "--dir", place]
            options += ["--ro-bind", path, path]
    return list(map(str, options))


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="this is not root")
def test_all_of_this_holds_for_a_user_without_rights():
    bubblewrap = shutil.which("bwrap") or code_execution._bundled_bubblewrap()
    places = {pathlib.Path(os.path.realpath(x)) for x in (sys.base_prefix, sys.prefix, REPOSITORY)}
    become = [
        str(bubblewrap), "--dev-bind", "/", "/", *_opened_to_others(sorted(places)),
        "--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--",
        "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-B", "-c",
    ]  # fmt: skip
    works = bubblewrap and shutil.which("setpriv")
    if not works or subprocess.run([*become, ""], check=False).returncode:
        pytest.skip("no program can be started as another user here")
    script = f"""
import sys, types, pytest
sys.modules["tasks"] = package = types.ModuleType("tasks")
package.__path__ = [{os.path.dirname(code_execution.__file__)!r}]
sys.exit(pytest.main(["-o", "addopts=-q --import-mode=importlib", "-p", "no:cacheprovider",
                      "--tb=short", {__file__!r}]))
"""
    with tempfile.TemporaryDirectory(dir="/tmp") as home:
        os.chown(home, 65534, 65534)
        environment = {**os.environ, "HOME": home, "TMPDIR": "/tmp"}
        done = subprocess.run([*become, script], cwd=REPOSITORY, env=environment, check=False,
                              capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and re.search(r"\d+ passed", done.stdout), (
        done.stdout[-9000:] + done.stderr[-3000:]
    )
