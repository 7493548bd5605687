"""What a program does to itself before it runs what it was started for: another user, limits, fewer system calls.

Nothing of it can be taken back by what runs afterwards: limits are lowered for good, and the user has no privileges.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
from contextlib import suppress
from typing import Any

from launch.evaluation.sandbox.inside import landlock
from launch.evaluation.sandbox.inside.system import (
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_SECCOMP,
    SECCOMP_MODE_FILTER,
    drop_capabilities,
    prctl,
)


def confine(config: dict[str, Any]) -> None:
    """config: `user` (a number, or None to stay), `limits` of resource's names, `folder` to be in.

    Where no namespace hides the host's folders, `read_only` names those that may be read.
    """
    os.environ.clear()  # of what the interpreter and bubblewrap set
    os.chdir(config["folder"])
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out, it is this process that goes
    if config["user"] is not None:
        os.setgroups([])
        os.setresgid(config["user"], config["user"], config["user"])
        os.setresuid(config["user"], config["user"], config["user"])
    drop_capabilities()
    for name, value in config["limits"].items():
        if hasattr(resource, name):  # some systems lack some
            # One second between the signal that says why (SIGXCPU) and the one that cannot be ignored.
            resource.setrlimit(getattr(resource, name), (value, value + (name == "RLIMIT_CPU")))
    prctl(PR_SET_DUMPABLE, 0)  # other processes of this user cannot look into this one
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if config["level"] == "limits":
        landlock.restrict(config["read_only"], config["folder"])
    forbid_system_calls()


# Numbers of (x86_64, aarch64), from the kernel's arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
# Namespaces would give privileges over their own mounts, and with them memory that no limit counts; so would System V segments.
FORBIDDEN = {
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
    "msgget": (68, 186),
    "semget": (64, 190),
    "memfd_create": (319, 279),
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
    "socket": (41, 198),  # socketpair stays: it reaches nobody
}
CLONE, CLONE3 = (56, 220), (435, 435)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
CLONE_NEW = 0x7E020000 | 0x00000080  # every CLONE_NEW* flag
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS = 1, 38
X32 = 0x40000000  # x86_64's second table of system calls
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of classic BPF


def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def system_call_filter(machine: str) -> bytes:
    """Classic BPF over seccomp_data (number at 0, architecture at 4, first argument at 16). Raises KeyError for other machines."""
    column, architecture = ARCHITECTURES[machine]
    refuse = instruction(RETURN, ERROR | EPERM)
    program = [instruction(LOAD, 4), instruction(EQUAL, architecture, 1, 0), instruction(RETURN, KILL), instruction(LOAD, 0)]
    if machine == "x86_64":
        program += [instruction(AT_LEAST, X32, 0, 1), refuse]
    for numbers in FORBIDDEN.values():
        program += [instruction(EQUAL, numbers[column], 0, 1), refuse]
    # The C library falls back to clone, whose flags can be read here; clone3's are behind a pointer.
    program += [instruction(EQUAL, CLONE3[column], 0, 1), instruction(RETURN, ERROR | ENOSYS)]
    program += [instruction(EQUAL, CLONE[column], 0, 3), instruction(LOAD, 16), instruction(ANY_BIT, CLONE_NEW, 0, 1), refuse]
    return b"".join([*program, instruction(RETURN, ALLOW)])


def forbid_system_calls() -> None:
    if platform.machine() not in ARCHITECTURES or os.uname().sysname != "Linux":
        return
    program = system_call_filter(platform.machine())
    text = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(text)))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.cast(header, ctypes.c_void_p))
