"""Seccomp: which system calls a program may make, and with which arguments. What waits behind a pointer cannot be looked at.

Numbers of (x86_64, aarch64), from the kernel's arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h; None
where there is no such call.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Sequence

from launch.evaluation.sandbox.inside import landlock
from launch.evaluation.sandbox.inside.system import PR_SET_SECCOMP, SECCOMP_MODE_FILTER, prctl

Numbers = tuple[int, int | None]

# Namespaces would give privileges over their own mounts, and with them memory that no limit counts; so would System V segments and
# files of memory, and the segments of the user's other programs need no name but a number. Queues of messages are created, and
# stay, though Landlock then refuses them.
FORBIDDEN: dict[str, Numbers] = {
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "ioprio_set": (251, 30),
}
Check = tuple[int, int, int]  # where in seccomp_data 32 bits of an argument lie, which of them count, what they must be
CheckedCalls = dict[str, tuple[Numbers, tuple[Check, ...]]]
FIRST, SECOND, THIRD = 16, 24, 32  # arguments; of a pointer the upper half follows
ALL = 0xFFFFFFFF  # of an int
CLONE_NEW = 0x7E020000 | 0x00000080  # every CLONE_NEW* flag
AF_UNIX: Check = (FIRST, ALL, 1)
ALLOWED_WITH: CheckedCalls = {
    "clone": ((56, 220), ((FIRST, CLONE_NEW, 0),)),
    "socketpair": ((53, 199), (AF_UNIX,)),
}
# Where no namespace hides the host's processes: the kernel lets a user limit and slow all of its own, and so training. A program's
# own number is none that a filter knows, for its children inherit the filter: 0 is whoever calls.
ITSELF: Check = (FIRST, ALL, 0)
CONNECTED: Check = (SECOND, 0xB, 1)  # SOCK_STREAM (1) and SOCK_SEQPACKET (5); flags lie above
HOST_ALLOWED_WITH: CheckedCalls = {
    "prlimit64": ((302, 261), (ITSELF,)),
    "setpriority": ((141, 140), ((FIRST, ALL, os.PRIO_PROCESS), (SECOND, ALL, 0))),
    "sched_setaffinity": ((203, 122), (ITSELF,)),
    "sched_setscheduler": ((144, 119), (ITSELF,)),
    "sched_setparam": ((142, 118), (ITSELF,)),
    "sched_setattr": ((314, 274), (ITSELF,)),
    # A pair that is connected reaches nobody else. One end of a pair of datagram sockets sends to every socket file.
    "socketpair": ((53, 199), (AF_UNIX, CONNECTED)),
}
# The C library falls back to clone, whose flags are no pointer.
UNKNOWN: dict[str, Numbers] = {"clone3": (435, 435)}

# Where no namespace hides the host's files, which Landlock has no right for: a user may change its own wherever they are. That
# a file is there, and how large, can be asked for all the same (stat), without which no program runs.
HOST_FILES: dict[str, Numbers] = {
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "file_setattr": (469, 469),
    "inotify_add_watch": (254, 27),
    "fanotify_mark": (301, 263),
}
# ftruncate needs a file that could be opened.
BEFORE_TRUNCATE_RIGHT: dict[str, Numbers] = {"truncate": (76, 45)}
# Answered as on a file system that has none, which copying programs are prepared for.
ATTRIBUTES: dict[str, Numbers] = {
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "getxattr": (191, 8),
    "lgetxattr": (192, 9),
    "fgetxattr": (193, 10),
    "listxattr": (194, 11),
    "llistxattr": (195, 12),
    "flistxattr": (196, 13),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "setxattrat": (463, 463),
    "getxattrat": (464, 464),
    "listxattrat": (465, 465),
    "removexattrat": (466, 466),
}
# Answered as if done: shutil's copy and copy2 set mode and times of what they have copied, and would fail after all.
UNDONE: dict[str, Numbers] = {"chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452)}
UTIMENSAT = (280, 88)
NO_PATH: tuple[Check, ...] = ((SECOND, ALL, 0), (SECOND + 4, ALL, 0))
NO_TIMES: tuple[Check, ...] = ((THIRD, ALL, 0), (THIRD + 4, ALL, 0))

NUMBER, ARCHITECTURE = 0, 4  # of seccomp_data, beside the arguments
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
X32 = 0x40000000  # x86_64's second table of system calls
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS, ENOTSUP, DONE = (ERROR | number for number in (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, 0))
LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06  # of classic BPF


def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def rule(number: int | None, answer: int | None, checks: Sequence[Check] = (), met: int = ALLOW) -> list[bytes]:
    """For one system call: `met` where its arguments pass all checks, `answer` where one does not or there is none.

    answer: None leaves it to the rules that follow.
    """
    if number is None:
        return []
    steps = []
    for left, (place, bits, value) in zip(reversed(range(len(checks))), checks, strict=True):
        to_answer = 3 * left + 1
        steps += [instruction(LOAD, place), instruction(AND, bits), instruction(EQUAL, value, 0, to_answer)]
    steps += [instruction(RETURN, met)] if checks else []
    steps += [instruction(LOAD, NUMBER) if answer is None else instruction(RETURN, answer)]
    return [instruction(EQUAL, number, 0, len(steps)), *steps]


def system_call_filter(machine: str, *, host: bool, landlock_version: int) -> bytes:
    """Classic BPF over seccomp_data. Raises KeyError for other machines.

    host: whether the host's files and processes are to be kept from what Landlock, in this version, has no right for.
    """
    column, architecture = ARCHITECTURES[machine]
    program = [instruction(LOAD, ARCHITECTURE), instruction(EQUAL, architecture, 1, 0), instruction(RETURN, KILL)]
    program += [instruction(LOAD, NUMBER)]
    if machine == "x86_64":
        program += [instruction(AT_LEAST, X32, 0, 1), instruction(RETURN, EPERM)]
    for numbers, checks in (ALLOWED_WITH | (HOST_ALLOWED_WITH if host else {})).values():
        program += rule(numbers[column], EPERM, checks)
    answers = [(FORBIDDEN, EPERM), (UNKNOWN, ENOSYS)]
    if host:
        answers += [(HOST_FILES, EPERM), (ATTRIBUTES, ENOTSUP), (UNDONE, DONE)]
        if landlock_version < landlock.TRUNCATE_VERSION:
            answers.append((BEFORE_TRUNCATE_RIGHT, EPERM))
        # pathlib's touch creates a file where the time of now cannot be set; touch of coreutils opens it and sets that afterwards.
        program += rule(UTIMENSAT[column], None, NO_PATH, met=DONE) + rule(UTIMENSAT[column], DONE, NO_TIMES, met=EPERM)
    for calls, answer in answers:
        for numbers in calls.values():
            program += rule(numbers[column], answer)
    return b"".join([*program, instruction(RETURN, ALLOW)])


def restrict(*, host: bool) -> None:
    """From here on. Needs PR_SET_NO_NEW_PRIVS; does nothing on other machines."""
    if platform.machine() not in ARCHITECTURES or os.uname().sysname != "Linux":
        return
    program = system_call_filter(platform.machine(), host=host, landlock_version=landlock.version())
    text = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(text)))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.cast(header, ctypes.c_void_p))
