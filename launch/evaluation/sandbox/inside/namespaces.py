"""Namespaces of our own, for machines without bubblewrap: own mounts with a read-only system, processes, network, host name.

What bubblewrap does, in the order of its steps; mount_setattr (Linux 5.12) makes a whole tree read-only at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import suppress
from typing import Any

from launch.evaluation.sandbox.inside.system import PR_SET_PDEATHSIG, check, exit_code, libc, prctl

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x00020000, 0x10000000, 0x20000000, 0x40000000
CLONE_NEWIPC, CLONE_NEWUTS, CLONE_NEWCGROUP = 0x08000000, 0x04000000, 0x02000000
SEPARATE = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH, AT_FDCWD, AT_RECURSIVE = 2, -100, 0x8000
READ_ONLY, NO_SUID, NO_DEVICES = 1, 2, 4  # of struct mount_attr
MOUNT_SETATTR = 442
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
DEVICES = ("null", "zero", "full", "random", "urandom")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    assert libc is not None
    result = libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    check(result, f"mount {target}")


def make_read_only(target: str, *, recursive: bool) -> None:
    assert libc is not None
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NO_SUID | (NO_DEVICES if recursive else 0), 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    result = libc.syscall(MOUNT_SETATTR, AT_FDCWD, target.encode(), flags, attributes, ctypes.c_size_t(32))
    check(result, f"mount_setattr {target}")


def separate(user: int | None) -> None:
    """Leaves the host's namespaces. user: the number to have within, where it takes a user namespace to do so."""
    assert libc is not None
    outside = os.getuid(), os.getgid()
    check(libc.unshare(SEPARATE | (CLONE_NEWUSER if user is not None else 0)), "unshare")
    if user is not None:
        for file, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {outside[0]} 1"),
            ("gid_map", f"{user} {outside[1]} 1"),
        ):
            with open(f"/proc/self/{file}", "w") as opened:
                opened.write(text)


def build_root(root: str, config: dict[str, Any]) -> None:
    """A root of the read-only system folders, an empty /tmp, a few devices and the namespace's own /proc."""
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    for folder in config["read_only"]:
        os.makedirs(root + folder, exist_ok=True)
        mount(folder, root + folder, flags=MS_BIND | MS_REC)
        make_read_only(root + folder, recursive=True)
    for name, target in config["links"].items():
        os.symlink(target, root + name)
    for folder in ("/tmp", "/proc", "/dev"):
        os.makedirs(root + folder, exist_ok=True)
    mount("tmpfs", root + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777,{config['temporary']}")
    for name in DEVICES:
        with open(f"{root}/dev/{name}", "w"):
            pass
        mount(f"/dev/{name}", f"{root}/dev/{name}", flags=MS_BIND)
    with suppress(OSError):  # a container that hides parts of its /proc allows no other: programs then have none
        mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)


def change_root(root: str) -> None:
    assert libc is not None
    os.chdir(root)
    check(libc.syscall(PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")
    make_read_only("/", recursive=False)


def wait_for(child: int) -> None:
    """Reaps whatever ends until the child has, and ends as it did."""
    while True:
        ended, status = os.wait()
        if ended == child:
            os._exit(exit_code(status))


def enter(config: dict[str, Any]) -> None:
    """Returns in a process of the new namespaces; the two that wait for it end when it ends, and it with them. All of them end
    with the thread that started them: an evaluation that is killed leaves nothing that runs."""
    separate(config["user_inside"])  # another user's credentials would take the next line back
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != config["parent"]:  # it had ended before
        os._exit(0)
    first = os.fork()
    if first:
        wait_for(first)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the first process of its namespace: all others there die with it
    build_root(config["root"], config)
    change_root(config["root"])
    program = os.fork()
    if program:
        wait_for(program)
