"""Landlock (Linux 5.13, without privileges or namespaces): which files a program may open, whom it may signal or look into.

Structures and numbers are those of the kernel's include/uapi/linux/landlock.h. What an older kernel lacks is left out: the probe
tells what then does not hold.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from contextlib import suppress

from launch.evaluation.sandbox.inside.system import check, libc

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
ASK_VERSION, PATH_BENEATH = 1, 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIRECTORY = 1, 2, 4, 8
FILE_RIGHTS = {1: 1 << 13, 2: 1 << 14, 3: 1 << 15, 5: 1 << 16}  # version: the first right that it does not know
READ = EXECUTE | READ_FILE | READ_DIRECTORY
TRUNCATE_VERSION = 3
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
NETWORK_VERSION, TCP_RIGHTS = 4, 3  # bind and connect
SCOPE_VERSION, SCOPES = 6, 3  # abstract sockets and signals stay within


def version() -> int:
    """0 where there is no Landlock."""
    return max(0, libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ASK_VERSION)) if libc else 0


def file_rights(landlock: int) -> int:
    """All that this version knows."""
    return max(first for known, first in FILE_RIGHTS.items() if known <= landlock) - 1


def allow(ruleset: int, path: str, rights: int) -> None:
    assert libc is not None
    with suppress(FileNotFoundError):
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights, opened)
        check(libc.syscall(ADD_RULE, ruleset, PATH_BENEATH, rule, 0), f"landlock {path}")
        os.close(opened)


def restrict(read_only: Sequence[str], own: str) -> None:
    """From here on only these folders can be read and only `own` written. Needs PR_SET_NO_NEW_PRIVS."""
    landlock = version()
    if landlock < 1:
        return
    assert libc is not None
    rights = file_rights(landlock)
    network = TCP_RIGHTS if landlock >= NETWORK_VERSION else 0
    scopes = SCOPES if landlock >= SCOPE_VERSION else 0
    size = 24 if scopes else 16 if network else 8
    attributes = struct.pack("=QQQ", rights, network, scopes)[:size]
    ruleset = check(libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(size), 0), "landlock")
    for folder in read_only:
        allow(ruleset, folder, READ)
    for device in DEVICES:
        allow(ruleset, device, READ_FILE | WRITE_FILE)
    allow(ruleset, own, rights)
    check(libc.syscall(RESTRICT_SELF, ruleset, 0), "landlock")
    os.close(ruleset)
