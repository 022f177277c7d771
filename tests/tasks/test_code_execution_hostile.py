"""Programs that attack: none passes, none harms, none outlives its limit, however it is kept in."""

import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from tasks import code_execution
from tasks.code_execution import Limits, SandboxError

ADD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(20, 22) == 42"]


def _works(mode):
    try:
        return code_execution._run(mode, "", [], Limits(wall_seconds=30))
    except SandboxError:
        return False


MODES = [mode for mode in ("root" if os.geteuid() == 0 else "user", "landlock") if _works(mode)]
if not MODES:
    pytest.skip("neither namespaces nor Landlock work here", allow_module_level=True)
KEPT_IN = pytest.mark.parametrize("mode", MODES)


def _run(mode, program, tests, **limits):
    return code_execution._run(mode, program, tests, Limits(**limits))


def _processes():
    """Processes that this test's sandboxes started and that still run."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if code_execution._BOOT in words and str(os.getpid()) in words:
            found.append(int(pid))
    return found


def _assert_nobody_is_left():
    until = time.monotonic() + 2
    while _processes() and time.monotonic() < until:
        time.sleep(0.01)
    assert _processes() == []


SHADOWS = "".join(
    f"{name} = lambda *args, **kwargs: {value}\n"
    for name, value in {"abs": 0, "all": True, "isinstance": True, "len": 3, "set": None}.items()
)
FORGERIES = {
    "equal to everything": (
        "class Any:\n"
        "    def __eq__(self, other): return True\n"
        "    def __ne__(self, other): return False\n"
        "    def __lt__(self, other): return True\n"
        "    __le__ = __gt__ = __ge__ = __lt__\n"
        "    def __sub__(self, other): return 0\n"
        "    __rsub__ = __add__ = __radd__ = __abs__ = __sub__\n"
        "    def __contains__(self, other): return True\n"
        "    def __len__(self): return 0\n"
        "    def __bool__(self): return True\n"
        "    def __float__(self): return 3.0\n"
        "    __hash__ = None\n"
        "add = lambda a, b: Any()\n"
    ),
    **{
        f"a kind of {base} equal to everything": (
            f"class Any({base}):\n"
            "    def __eq__(self, other): return True\n"
            "    def __ne__(self, other): return False\n"
            "    def __sub__(self, other): return 0\n"
            "    def __hash__(self): return 3\n"
            "add = lambda a, b: Any()\n"
        )
        for base in ("int", "float", "str", "list", "dict", "tuple", "set", "frozenset")
    },
    "a class that is equal to everything": (
        "class Meta(type):\n"
        "    def __eq__(self, other): return True\n"
        "    def __call__(self, *args): return self\n"
        "    __hash__ = type.__hash__\n"
        "class add(metaclass=Meta): pass\n"
    ),
    "leaving when asked": "import os\ndef add(a, b): os._exit(0)\n",
    "leaving politely": "import sys\ndef add(a, b): sys.exit(0)\n",
    "leaving before": "import os\nadd = max\nos._exit(0)\n",
    "built-in names of its own": SHADOWS + "add = lambda a, b: 0\n",
    "built-in functions replaced": (
        "import builtins, math\n"
        "builtins.abs = lambda x: 0\n"
        "builtins.all = builtins.isinstance = lambda *args: True\n"
        "builtins.AssertionError = Exception\n"
        "math.isclose = lambda *args, **kwargs: True\n"
        "add = lambda a, b: 0\n"
    ),
    "a word to every file": (
        "import os\n"
        "for fd in range(256):\n"
        "    try: os.write(fd, b'passed')\n"
        "    except OSError: pass\n"
        "add = lambda a, b: 0\n"
        "os._exit(0)\n"
    ),
    "a class made where it is compared": (
        "import sys\n"
        "def add(a, b):\n"
        "    frame = sys._getframe()\n"
        "    while not hasattr(frame.f_locals.get('self'), 'request'): frame = frame.f_back\n"
        "    peer, attributes = frame.f_locals['self'], {'__eq__': bool, '__call__': bool}\n"
        "    return peer.request('call', type, ('Any', (), attributes), {})()\n"
    ),
    "an exception that is equal to everything": (
        "class Any(AssertionError):\n"
        "    def __eq__(self, other): return True\n"
        "def add(a, b): raise Any\n"
    ),
    "no end of answers": "import itertools\nadd = lambda a, b: itertools.count()\n",
    "too much of an answer": "add = lambda a, b: bytes(2**26)\n",
    "an answer in itself": "def add(a, b):\n    x = []\n    x.append(x)\n    return x\n",
    "a deep answer": "def add(a, b):\n    for _ in range(10**5): a = [a]\n    return a\n",
}
WAYS_TO_ASK = [
    "assert add(1, 2) == 3",
    "assert 3 == add(1, 2)",
    "assert not add(1, 2) != 3",
    "assert add(1, 2) in (3, 4)",
    "import math\nassert math.isclose(add(1, 2), 3)",
    "assert abs(add(1, 2) - 3) < 1e-6",
    "assert isinstance(add(1, 2), int) and add(1, 2) - 3 == 0",
    "assert all([add(1, 2) == 3, add(2, 2) == 4])",
    "assert {add(1, 2)} == {3}",
    "def check(candidate):\n    assert candidate(1, 2) == 3\n\ncheck(add)",
]


ANY_WAY = [
    "passed = 0",
    *(
        f"try:\n    {way}\n    passed += 1\nexcept Exception: pass".replace("\n    \n", "\n")
        for way in (way.replace("\n", "\n    ") for way in WAYS_TO_ASK)
    ),
]


@pytest.mark.parametrize("name", FORGERIES)
def test_no_forgery_passes_in_any_way_its_result_is_asked_for(name):
    assert not code_execution.run(FORGERIES[name], [*ANY_WAY, "assert passed"])


def test_the_right_answer_passes_in_every_way():
    assert code_execution.run(ADD, [*ANY_WAY, f"assert passed == {len(WAYS_TO_ASK)}"])
    assert not code_execution.run(ADD, [*ANY_WAY, f"assert passed != {len(WAYS_TO_ASK)}"])


SEARCH = """
import gc, sys, threading
def texts(value, depth=3, seen=None):
    seen = set() if seen is None else seen
    if id(value) in seen: return
    seen.add(id(value))
    if isinstance(value, (str, bytes, bytearray)): yield value
    elif depth and isinstance(value, (list, tuple, set, frozenset)):
        for item in list(value): yield from texts(item, depth - 1, seen)
    elif depth and isinstance(value, dict):
        for item in list(value.items()): yield from texts(item, depth - 1, seen)
def search():
    places = list(gc.get_objects()) + [dict(frame.f_locals) for frame in frames()]
    places += [code for frame in frames() for code in frame.f_code.co_consts]
    places += [sys.argv, sys.orig_argv]
    for name in ('/proc/self/environ', '/proc/self/cmdline', '/proc/1/cmdline', '/proc/self/fd/0'):
        try: places.append(open(name, 'rb').read())
        except OSError: pass
    return [1 for place in places for text in texts(place)
            if ('eldeen' if isinstance(text, str) else b'eldeen') in text[::-1]]
def frames():
    frame = sys._getframe()
    while frame: yield frame; frame = frame.f_back
def mapped():
    try:
        spans = [line.split()[0].split('-') for line in open('/proc/self/maps')]
        memory = open('/proc/self/mem', 'rb')
    except OSError: return []
    found = []
    for low, high in spans:
        try:
            memory.seek(int(low, 16))
            found += [1] * (b'eldeen dnoces' in memory.read(int(high, 16) - int(low, 16))[::-1])
        except (OSError, ValueError, OverflowError): pass
    return found
at_first = search()
"""


def test_a_program_can_look_everywhere_and_finds_no_assertion():
    tests = ["'needle'", "'second needle'", "assert at_first == []", "assert search() == []"]
    tests += ["assert mapped() == []"]
    assert code_execution.run(SEARCH, tests)
    # The search does find what is there.
    assert not code_execution.run(SEARCH + "hidden = ['needle']", tests)


@KEPT_IN
def test_nothing_is_written_outside_the_scratch_directory(mode, tmp_path):
    repository = pathlib.Path(__file__).parents[2]
    places = ["/", "..", "/etc", "/usr/lib", "/dev", "/dev/shm", "/var/tmp", "/run", "/proc/self"]
    places += [str(path) for path in (repository, tmp_path, pathlib.Path.home())]
    places += [os.path.dirname(os.__file__)]
    tmp_path.chmod(0o777)
    existing = tmp_path / "existing"
    existing.write_text("kept")
    existing.chmod(0o666)
    program = f"""
import os
written = []
for place in {places!r}:
    for attempt in (lambda: open(place + '/hostile', 'w'), lambda: os.mkdir(place + '/dir')):
        try: attempt(); written.append(place)
        except OSError: pass
for attempt in (lambda: open({str(existing)!r}, 'w'), lambda: os.remove({str(existing)!r}),
                lambda: os.truncate({str(existing)!r}, 0), lambda: os.link({str(existing)!r}, 'l')):
    try: attempt(); written.append(attempt)
    except OSError: pass
open('allowed', 'w').close()
count = len(written)
"""
    assert _run(mode, program, ["assert count == 0"])
    assert existing.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [existing]
    assert not (repository / "hostile").exists()


@KEPT_IN
def test_nothing_of_the_user_is_read(mode, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "secret")
    (tmp_path / "secret").write_text("secret")
    tmp_path.chmod(0o755)
    repository = pathlib.Path(__file__).parents[2]
    files = [str(tmp_path / "secret"), str(repository / "setup.py"), __file__, "/etc/passwd",
             f"/proc/{os.getpid()}/environ", f"/proc/{os.getpid()}/cwd/setup.py", "/proc/1/environ",
             "/proc/self/environ"]  # fmt: skip
    folders = [str(tmp_path), str(repository), str(pathlib.Path.home()), "/etc", "/tmp/..", "/home"]
    program = f"""
import os
got = []
for name in {files!r}:
    try: got.append(open(name, 'rb').read())
    except OSError: pass
for name in {folders!r}:
    try: got.append(sorted(set(os.listdir(name)) - {{'dev', 'tmp', 'usr', 'lib', 'lib64', 'root'}}))
    except OSError: pass
got = [item for item in got if item]
import os, sys
environment = dict(os.environ)
try:
    import tasks
    got.append('tasks')
except ImportError: pass
"""
    tests = ["assert set(environment) <= {'LC_CTYPE'}"]
    # A home that holds the interpreter is there as an empty path to it.
    own = str(pathlib.Path.home()) in os.path.dirname(os.__file__)
    tests += ["assert not got" if not own else "assert all('secret' not in str(x) for x in got)"]
    assert _run(mode, program, tests)


@KEPT_IN
def test_no_socket_reaches_anybody(mode):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        port = server.getsockname()[1]
        program = f"""
import socket
count = 0
for attempt in (lambda: socket.create_connection(('127.0.0.1', {port}), 1),
                lambda: socket.create_connection(('1.1.1.1', 53), 1),
                lambda: socket.socket(socket.AF_UNIX).connect('/run/docker.sock'),
                lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53)),
                lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)):
    try: attempt(); count += 1
    except OSError: pass
"""  # noqa: E501
        assert _run(mode, program, ["assert count == 0"])
        with pytest.raises(TimeoutError):
            server.accept()


@KEPT_IN
def test_no_process_but_its_own_is_signalled_traced_or_slowed(mode):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        program = f"""
import ctypes, os, resource, signal
libc = ctypes.CDLL(None)
count = 0
pids = [os.getppid(), {os.getpid()}, {bystander.pid}, {os.getppid()}, 1]
for pid in pids:
    for attempt in (lambda: os.kill(pid, signal.SIGKILL) if pid > 1 else 1 / 0,
                    lambda: os.killpg(pid, signal.SIGKILL) if pid > 1 else 1 / 0,
                    lambda: resource.prlimit(pid, resource.RLIMIT_CPU, (1, 1)),
                    lambda: os.setpriority(os.PRIO_PROCESS, pid, 19)):
        try: attempt(); count += 1
        except (OSError, ZeroDivisionError): pass
    count += libc.ptrace(16, pid, 0, 0) == 0
for pid in (-1, 0):
    try: os.kill(pid, signal.SIGKILL)
    except OSError: pass
"""
        # Where it has processes of its own, its parent is one of them and may go.
        assert not _run(mode, program + "add = lambda a, b: count\n", ["assert add(1, 2) == 3"])
        assert bystander.poll() is None
        assert _run(mode, "import os\ntry: os.kill(-1, 9)\nexcept OSError: pass\n" + ADD, TESTS)
    finally:
        bystander.kill()
        bystander.wait()
    _assert_nobody_is_left()


DAEMON = """
import os, time
try: child = os.fork()
except OSError: child = 1  # as root without namespaces
if child == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        for fd in range(64):
            try: os.close(fd)
            except OSError: pass
        while True: time.sleep(1)
    os._exit(0)
"""
THREAD = """
import threading, time
def on():
    while True: time.sleep(0.01)
threading.Thread(target=on).start()
"""


@KEPT_IN
@pytest.mark.parametrize("program", [DAEMON, THREAD])
def test_what_a_program_leaves_behind_ends_with_it(mode, program):
    assert _run(mode, program + ADD, TESTS)
    _assert_nobody_is_left()


@KEPT_IN
@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import os\nwhile True:\n    try:\n        if os.fork() == 0: os.setsid()\n"
        "    except OSError: pass",
        "import threading, time\nwhile True:\n    try:\n"
        "        threading.Thread(target=time.sleep, args=(9,)).start()\n"
        "    except RuntimeError: pass",
    ],
)
def test_a_fork_bomb_is_defused(mode, program):
    start = time.monotonic()
    assert not _run(mode, ADD + program, TESTS, wall_seconds=1.0)
    assert time.monotonic() - start < 5
    _assert_nobody_is_left()


@KEPT_IN
def test_memory_is_limited_for_all_processes_together(mode):
    program = """
import os, time
for _ in range(8):
    if os.fork() == 0:
        hoard = bytearray(os.urandom(1)) * 50_000_000
        time.sleep(60)
time.sleep(60)
"""
    start = time.monotonic()
    assert not _run(mode, ADD + program, TESTS, total_memory_bytes=2 * 10**8, wall_seconds=20)
    assert time.monotonic() - start < 10
    _assert_nobody_is_left()


@KEPT_IN
def test_the_disk_cannot_be_filled(mode):
    program = """
import os
written = 0
try:
    for number in range(10**4):
        with open(f'file{number}', 'wb', 0) as file:
            written += file.write(bytes(10**6))
except OSError: pass
def total(): return written
"""
    passed = _run(mode, program, ["assert total() <= 5_000_000"], scratch_bytes=5_000_000)
    # A file system of its own is full; elsewhere the program is killed.
    assert passed == (mode != "landlock")
    many = "for number in range(10**6): open(str(number), 'w').close()\n"
    assert not _run(mode, many + ADD, TESTS, wall_seconds=3)


@KEPT_IN
def test_directories_without_end_are_removed(mode, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = """
import os
for number in range(3000):
    try:
        os.mkdir('d')
        os.chdir('d')
    except OSError: break
os.chmod('.', 0)
"""
    _run(mode, program + ADD, TESTS)  # it may be killed for it, or not
    assert list(tmp_path.iterdir()) == []


@KEPT_IN
def test_printing_without_end_ends(mode):
    start = time.monotonic()
    program = "import os\nwhile True: print('x' * 1000)"
    assert not _run(mode, program, TESTS)
    persistent = (
        "import os\nwhile True:\n    try: os.write(1, bytes(1000))\n    except OSError: pass"
    )
    assert not _run(mode, persistent, TESTS, wall_seconds=0.5)
    assert time.monotonic() - start < 10


FORKS = """
import os, time
count = 0
try:
    while count < 200:
        if os.fork() == 0: time.sleep(9)
        count += 1
except OSError: pass
"""


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="root may become another user")
def test_a_user_without_rights_is_protected_as_well():
    python = next(
        (p for p in ("/usr/bin/python3", "/usr/local/bin/python3") if os.path.exists(p)), ""
    )
    tasks = str(pathlib.Path(code_execution.__file__).parent)
    script = f"""
import sys, types, warnings
if sys.version_info < (3, 11): sys.exit(77)
package = types.ModuleType("tasks")
package.__path__ = [{tasks!r}]
sys.modules["tasks"] = package
from tasks import code_execution
warnings.simplefilter("ignore")
assert code_execution.run({ADD!r}, {TESTS!r})
assert not code_execution.run("add = max", {TESTS!r})
files = "import os\\nfound = os.path.exists('/etc/passwd')\\ntry: open('/etc/passwd')\\n" \\
        "except OSError: found = False"
assert code_execution.run(files, ["assert not found"])
assert code_execution._run("landlock", files, ["assert not found"], code_execution.Limits())
forks = {FORKS!r}
for mode in ("landlock", code_execution._mode(False)):
    limits = code_execution.Limits(processes=20, wall_seconds=2)
    assert not code_execution._run(mode, forks, ["assert count >= 100"], limits)
print("protected by", code_execution._mode(False))
"""
    if not python:
        pytest.skip("no interpreter that every user may run")
    result = subprocess.run(
        [python, "-I", "-c", script], user=65534, group=65534, extra_groups=[], cwd="/",
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode == 77 or "Permission denied" in result.stderr:
        pytest.skip("no interpreter or checkout that every user may read")
    assert "protected by" in result.stdout, result.stderr
