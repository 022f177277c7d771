"""The system calls that a program may make, as a filter for the kernel (seccomp, by libseccomp).

All others fail with EPERM: what is new in the kernel is refused until somebody adds it here.
"""

from __future__ import annotations

import errno
import functools
import tempfile
from typing import Any

from .harness import PID

_ALWAYS = """
read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 close close_range lseek
open openat creat stat fstat lstat newfstatat statx access faccessat faccessat2 getdents getdents64
readlink readlinkat getcwd chdir fchdir mkdir mkdirat rmdir unlink unlinkat rename renameat
renameat2 link linkat symlink symlinkat ftruncate fsync fdatasync umask statfs fstatfs
fadvise64 flock dup dup2 dup3 pipe pipe2 poll ppoll select pselect6 epoll_create epoll_create1
epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd eventfd2 timerfd_create timerfd_settime
timerfd_gettime signalfd signalfd4 sendfile splice tee copy_file_range
recvfrom shutdown getsockopt setsockopt getsockname getpeername
munmap mprotect mremap madvise msync mincore brk mlock munlock membarrier
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait sigaltstack
restart_syscall pause alarm getitimer setitimer timer_create timer_settime timer_gettime
timer_getoverrun timer_delete nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday
time times futex futex_waitv set_robust_list set_tid_address rseq sched_yield
sched_getaffinity getcpu getpid getppid gettid getpgrp getpgid getsid getuid geteuid getgid getegid
getresuid getresgid getgroups getrusage getrlimit sysinfo uname getrandom getpriority
sched_getparam sched_getscheduler sched_get_priority_max sched_get_priority_min capget
exit exit_group wait4 waitid arch_prctl
"""
# Where nothing but the program's own is in reach: its files, its processes, its network.
_IN_NAMESPACES = """
chmod fchmod fchmodat fchmodat2 utime utimes futimesat utimensat chown fchown lchown fchownat
truncate fallocate mknod mknodat kill tkill tgkill setpgid setsid execve execveat
setgroups setresuid setresgid
"""
# Where a control group counts their memory, also of what nobody holds any more.
_IN_GROUP = (
    " fork vfork sendto sendmsg recvmsg sendmmsg recvmmsg bind connect listen accept accept4"
)
# Not to be had, rather than forbidden: libraries then go another way.
_MISSING = {
    "clone3": errno.ENOSYS,  # its flags are in memory, where a filter cannot look; clone's are not
    "openat2": errno.ENOSYS,
    **dict.fromkeys(
        ("listxattr", "llistxattr", "flistxattr", "getxattr", "lgetxattr", "fgetxattr"),
        errno.ENOTSUP,
    ),
}
_NEW_NAMESPACES, _THREAD = 0x7E020080, 0x00010000  # flags of clone
_PR_SET_NAME, _PR_GET_NAME, _PR_SET_VMA = 15, 16, 0x53564D41
# Duplicates, flags, locks and the size of a pipe; not whom a file sends signals.
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)
# Of a terminal: its settings and size; of any file: how much there is to read, whether it blocks
# and whether it is closed by execve.
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
_AF_UNIX, _STREAM, _SOCKET_KIND = 1, 1, 0xF
_SHARED, _ANONYMOUS, _PAGE = 0x01, 0x20, 4096  # flags of mmap, and bytes


@functools.cache
def compile_filter(namespaces: bool, processes: bool) -> bytes:
    """Returns the filter's code for this machine's processor.

    `harness.PID` stands in it for the process that installs it, if there are no namespaces.

    Args:
      namespaces: The program sees no files, processes and sockets but its own.
      processes: It may start processes, which are in a control group; threads it always may.

    Raises:
      OSError: if libseccomp is missing.
    """
    try:
        import pyseccomp
    except (ImportError, RuntimeError) as error:
        raise OSError(
            f"libseccomp is missing ({error}): apt-get install libseccomp2, or what your system "
            "calls it"
        ) from error
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))

    def allow(name: str, *arguments: Any) -> None:
        _add(rules, pyseccomp.ALLOW, name, *arguments)

    def where(argument: int, mask: int, value: int) -> Any:
        return pyseccomp.Arg(argument, pyseccomp.MASKED_EQ, mask, value)

    def equal(argument: int, value: int) -> Any:
        return pyseccomp.Arg(argument, pyseccomp.EQ, value)

    for name in (_ALWAYS + _IN_NAMESPACES * namespaces + _IN_GROUP * processes).split():
        allow(name)
    for name, number in _MISSING.items():
        _add(rules, pyseccomp.ERRNO(number), name)
    must = 0 if processes else _THREAD
    allow("clone", where(0, _NEW_NAMESPACES | must, must))
    allow("prlimit64", equal(0, 0))
    for option in (_PR_SET_NAME, _PR_GET_NAME, _PR_SET_VMA):
        allow("prctl", equal(0, option))
    for command in _FCNTL:
        allow("fcntl", equal(1, command))
    for request in _IOCTL:
        allow("ioctl", equal(1, request))
    if processes:
        allow("mmap")
        allow("socketpair", equal(0, _AF_UNIX))
        allow("socket", equal(0, _AF_UNIX))  # others' memory is not counted
    else:
        allow("mmap", where(3, _SHARED, 0))
        allow("mmap", where(3, _ANONYMOUS, 0))
        # More than a page could stay in memory, of which but one is mapped and counted.
        allow("mmap", pyseccomp.Arg(1, pyseccomp.LE, _PAGE))
        # What is connected cannot send to others.
        allow("socketpair", equal(0, _AF_UNIX), where(1, _SOCKET_KIND, _STREAM))
        allow("sendto", equal(4, 0))
    if not namespaces:
        allow("kill", equal(0, PID))
        allow("tgkill", equal(0, PID))
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _add(rules: Any, action: int, name: str, *arguments: Any) -> None:
    """Adds a rule, if this processor and this libseccomp know the system call."""
    import pyseccomp

    if pyseccomp.resolve_syscall(pyseccomp.system_arch(), name) >= 0:
        rules.add_rule(action, name, *arguments)
