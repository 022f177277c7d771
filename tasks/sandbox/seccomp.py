"""System calls that a generated program has no use for, refused by the kernel (seccomp)."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

# name -> number on x86-64 and on 64-bit ARM; from 424 on they are the same everywhere.
_REFUSED = {
    "socket": (41, 198),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "open_by_handle_at": (304, 265),
    # Memory and objects that no limit of a process counts.
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    # What may slow or change other processes of the same user.
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "io_uring_setup": (425, 425),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "mount_setattr": (442, 442),
    "memfd_secret": (447, 447),
}
# Without a process namespace: a program signals itself and nobody else.
_SIGNALS = {
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
}
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_CLONE, _CLONE3, _TGKILL, _PRLIMIT = (56, 220), 435, (234, 131), (302, 261)
_FORK, _VFORK = 57, 58  # on x86-64 alone
_NEW_NAMESPACES, _THREAD = 0x7E020000, 0x00010000  # flags of clone
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _ARG0 = 0, 4, 16  # offsets in struct seccomp_data
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2


def supported() -> bool:
    """Whether the system calls of this processor are known here."""
    return platform.machine() in _ARCHITECTURES


def _program(keep_signals: bool, keep_fork: bool) -> list[tuple[int, int, int, int]]:
    """The filter, as (code, jump if true, jump if false, operand)."""
    column, architecture = _ARCHITECTURES[platform.machine()]
    refuse = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    code = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if platform.machine() == "x86_64":  # the x32 numbers would go round the list
        code += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    names = _REFUSED if keep_signals else _REFUSED | _SIGNALS
    numbers = [numbers[column] for numbers in names.values()]
    if not keep_fork and column == 0:
        numbers += [_FORK, _VFORK]
    for number in sorted(numbers):
        code += [(_EQUAL, 0, 1, number), refuse]
    # The C library falls back from clone3, whose flags are in memory, to clone, whose are not.
    code += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    code += [(_EQUAL, 0, 3, _CLONE[column]), (_LOAD, 0, 0, _ARG0)]
    code += [(_ANY_BIT, 0, 1, _NEW_NAMESPACES), refuse, (_LOAD, 0, 0, _NUMBER)]
    if not keep_fork:
        code += [(_EQUAL, 0, 3, _CLONE[column]), (_LOAD, 0, 0, _ARG0)]
        code += [(_ANY_BIT, 1, 0, _THREAD), refuse, (_LOAD, 0, 0, _NUMBER)]
    # Limits of others: only 0, which is oneself, may be named.
    code += [(_EQUAL, 0, 3, _PRLIMIT[column]), (_LOAD, 0, 0, _ARG0)]
    code += [(_EQUAL, 1, 0, 0), refuse, (_LOAD, 0, 0, _NUMBER)]
    if not keep_signals:
        code += [(_EQUAL, 0, 3, _TGKILL[column]), (_LOAD, 0, 0, _ARG0)]
        code += [(_EQUAL, 1, 0, os.getpid()), refuse, (_LOAD, 0, 0, _NUMBER)]
    return [*code, (_RETURN, 0, 0, _ALLOW)]


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def install(keep_signals: bool, keep_fork: bool) -> None:
    """Installs the filter for this process and all that it starts.

    Args:
      keep_signals: whether it may send signals to whatever process it sees.
      keep_fork: whether it may start processes; threads it always may.

    Raises:
      OSError: if the kernel has no such filters.
    """
    packed = b"".join(struct.pack("=HBBI", *step) for step in _program(keep_signals, keep_fork))
    program = _Filter(len(packed) // 8, packed)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp filter")
