"""The filter of system calls, read by an interpreter of its own for both architectures; escapes.py tries it for real."""

from __future__ import annotations

import errno
import platform
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from launch.evaluation.execution import execute
from launch.evaluation.job import Job
from launch.evaluation.sandbox.inside import seccomp
from launch.evaluation.sandbox.levels import LEVELS, Level
from launch.evaluation.sandbox.limits import Limits
from launch.evaluation.sandbox.probe import find_isolation

AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}
ALLOWED, KILLED = "allowed", "killed"
OTHER = 4321  # another process


def answer(
    machine: str, number: int, *arguments: int, host: bool = True, architecture: int = 0, landlock_version: int = 3
) -> str | int:
    """Of the kernel to this call, by a classic BPF machine with the instructions that the filter has: allowed, or the error."""
    data = struct.pack("=iIQ6Q", number, architecture or AUDIT[machine], 0, *arguments, *[0] * (6 - len(arguments)))
    program = list(struct.iter_unpack("HBBI", seccomp.system_call_filter(machine, host=host, landlock_version=landlock_version)))
    at, held = 0, 0
    while True:
        code, if_true, if_false, value = program[at]
        at += 1
        if code == 0x20:  # ld [value]
            (held,) = struct.unpack_from("=I", data, value)
        elif code == 0x54:  # and
            held &= value
        elif code in (0x15, 0x35):  # jeq, jge
            at += if_true if (held == value if code == 0x15 else held >= value) else if_false
        else:
            assert code == 0x06  # ret
            return {0x7FFF0000: ALLOWED, 0x80000000: KILLED}.get(value, value & 0xFFFF)


# Calls by their numbers on (x86_64, aarch64), their arguments, and the answer.
CALLS = {
    "a pair of streams": ((53, 199), (1, 1), ALLOWED),
    "a pair of streams as Python asks for it": ((53, 199), (1, 1 | 0o2000000 | 0o4000), ALLOWED),
    "a pair of packets in sequence": ((53, 199), (1, 5 | 0o2000000), ALLOWED),
    "a pair of another family": ((53, 199), (30, 1), errno.EPERM),
    "nice": ((141, 140), (0, 0, 5), ALLOWED),
    "prlimit of oneself": ((302, 261), (0, 7), ALLOWED),
    "sched_setaffinity of oneself": ((203, 122), (0, 8), ALLOWED),
    "sched_setscheduler of oneself": ((144, 119), (0, 0), ALLOWED),
    "ioprio_set": ((251, 30), (1, OTHER, 0), errno.EPERM),
    "memfd_create": ((319, 279), (), errno.EPERM),
    "memfd_secret": ((447, 447), (), errno.EPERM),
    "socket": ((41, 198), (1, 1), errno.EPERM),
    "connect": ((42, 203), (3,), errno.EPERM),
    "bind": ((49, 200), (3,), errno.EPERM),
    "mq_open": ((240, 180), (), errno.EPERM),
    "mq_unlink": ((241, 181), (), errno.EPERM),
    "shmat": ((30, 196), (1,), errno.EPERM),
    "msgrcv": ((70, 188), (1,), errno.EPERM),
    "semop": ((65, 193), (1,), errno.EPERM),
    "fork": ((56, 220), (0x01200011,), ALLOWED),
    "clone with a namespace": ((56, 220), (0x10000011,), errno.EPERM),
    "clone3": ((435, 435), (), errno.ENOSYS),
    "ptrace": ((101, 117), (16, OTHER), errno.EPERM),
    "read": ((0, 63), (3,), ALLOWED),
}
# The same where namespaces hide the host's files and processes, and there allowed.
HOST_CALLS = {
    "prlimit of another": ((302, 261), (OTHER, 7), errno.EPERM),
    "prlimit, and bits that the kernel cuts off": ((302, 261), (OTHER | 1 << 32, 7), errno.EPERM),
    "setpriority of another": ((141, 140), (0, OTHER, 5), errno.EPERM),
    "setpriority of a group": ((141, 140), (1, 0, 5), errno.EPERM),
    "setpriority of the user": ((141, 140), (2, 0, 5), errno.EPERM),
    "sched_setaffinity of another": ((203, 122), (OTHER, 8), errno.EPERM),
    "sched_setscheduler of another": ((144, 119), (OTHER, 0), errno.EPERM),
    "sched_setparam of another": ((142, 118), (OTHER,), errno.EPERM),
    "sched_setattr of another": ((314, 274), (OTHER,), errno.EPERM),
    "a pair of datagram sockets": ((53, 199), (1, 2), errno.EPERM),
    "a pair of datagram sockets as Python asks for it": ((53, 199), (1, 2 | 0o2000000), errno.EPERM),
    "fchmod": ((91, 52), (3,), 0),
    "fchmodat": ((268, 53), (3,), 0),
    "fchmodat2": ((452, 452), (3,), 0),
    "fchown": ((93, 55), (3,), errno.EPERM),
    "fchownat": ((260, 54), (3,), errno.EPERM),
    "utimensat with times": ((280, 88), (3, 4, 0x7000), 0),
    "utimensat with times, whose lower half is zero": ((280, 88), (3, 4, 7 << 32), 0),
    "utimensat of now": ((280, 88), (3, 4, 0), errno.EPERM),
    "utimensat of now of a path whose lower half is zero": ((280, 88), (3, 4 << 32, 0), errno.EPERM),
    "utimensat of a descriptor": ((280, 88), (3, 0, 0x7000), 0),
    "utimensat of now of a descriptor": ((280, 88), (3, 0, 0), 0),
    "inotify_add_watch": ((254, 27), (3,), errno.EPERM),
    "fanotify_mark": ((301, 263), (3,), errno.EPERM),
    "file_setattr": ((469, 469), (3,), errno.EPERM),
    "setxattr": ((188, 5), (), errno.ENOTSUP),
    "fgetxattr": ((193, 10), (), errno.ENOTSUP),
    "fremovexattr": ((199, 16), (), errno.ENOTSUP),
    "setxattrat": ((463, 463), (), errno.ENOTSUP),
}
X86_FILE_CALLS = {"chmod": (90, 0), "chown": (92, errno.EPERM), "lchown": (94, errno.EPERM)}
X86_FILE_CALLS |= {"utime": (132, errno.EPERM), "utimes": (235, errno.EPERM), "futimesat": (261, errno.EPERM)}


@pytest.mark.parametrize("machine", AUDIT)
def test_answers_to_calls(machine: str) -> None:
    column = list(AUDIT).index(machine)
    for name, (numbers, arguments, expected) in CALLS.items():
        for host in (True, False):
            assert answer(machine, numbers[column], *arguments, host=host) == expected, name
    for name, (numbers, arguments, expected) in HOST_CALLS.items():
        assert answer(machine, numbers[column], *arguments) == expected, name
        assert answer(machine, numbers[column], *arguments, host=False) == ALLOWED, name
    for version, expected in ((0, errno.EPERM), (2, errno.EPERM), (3, ALLOWED)):
        assert answer(machine, (76, 45)[column], landlock_version=version) == expected
        assert answer(machine, (76, 45)[column], host=False, landlock_version=version) == ALLOWED
    assert answer(machine, 0, architecture=0x40000003) == KILLED  # i386


def test_calls_that_one_architecture_has() -> None:
    for name, (number, expected) in X86_FILE_CALLS.items():
        assert answer("x86_64", number) == expected, name
        assert answer("x86_64", number, host=False) == ALLOWED, name
    assert answer("x86_64", 0x40000000 | 1) == errno.EPERM  # its second table of calls
    assert answer("aarch64", 90) == answer("aarch64", 132) == ALLOWED  # capget and setgroups there


@pytest.mark.parametrize("machine", HEADERS)
def test_numbers_are_the_kernel_s(machine: str) -> None:
    header = Path(HEADERS[machine])
    if not header.exists():
        pytest.skip(f"no {header}, which linux-libc-dev has")
    known = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)\b", header.read_text())}
    column = list(AUDIT).index(machine)
    tables = (seccomp.FORBIDDEN, seccomp.UNKNOWN, seccomp.HOST_FILES, seccomp.ATTRIBUTES, seccomp.UNDONE)
    calls: dict = {name: numbers for table in (*tables, seccomp.BEFORE_TRUNCATE_RIGHT) for name, numbers in table.items()}
    checked = seccomp.ALLOWED_WITH | seccomp.HOST_ALLOWED_WITH
    calls |= {name: numbers for name, (numbers, _) in checked.items()} | {"utimensat": seccomp.UTIMENSAT}
    compared = {name: numbers[column] for name, numbers in calls.items() if name in known}
    assert compared == {name: known[name] for name in compared} and len(compared) > 40
    without = {name for name, numbers in calls.items() if numbers[column] is None}
    assert not without & set(known) and len(without) == (6 if machine == "aarch64" else 0)


ORDINARY = """
import asyncio, multiprocessing, os, pathlib, resource, shutil, socket, subprocess, sys, tempfile, threading

def f():
    async def one():
        return await asyncio.to_thread(int, '1')
    assert asyncio.run(one()) == 1
    left, right = multiprocessing.Pipe()
    left.send([2])
    assert right.recv() == [2]
    folder = pathlib.Path(tempfile.mkdtemp(dir='.'))
    (folder / 'a').write_text('a')
    (folder / 'b').touch()
    (folder / 'a').touch()
    for copy in (shutil.copy, shutil.copy2):
        assert pathlib.Path(copy(folder / 'a', folder / copy.__name__)).read_text() == 'a'
    shutil.copytree(folder, folder.name + '-tree')
    assert sorted(os.listdir(folder.name + '-tree')) == ['a', 'b', 'copy', 'copy2']
    shutil.rmtree(folder)
    os.nice(1)
    os.sched_setaffinity(0, os.sched_getaffinity(0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    thread = threading.Thread(target=print)
    thread.start()
    thread.join()
    assert subprocess.run([sys.executable, '-I', '-S', '-c', 'print(3)'], capture_output=True, check=True).stdout == b'3\\n'
    subprocess.run(['/usr/bin/touch', 'new'], check=True)
    subprocess.run(['/usr/bin/touch', 'new'], check=True)
    assert os.path.exists('new')
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        one, other = socket.socketpair(type=kind)
        one.send(b'4')
        assert other.recv(9) == b'4'
    own = pathlib.Path('own')
    own.touch(mode=0o600)
    own.chmod(0o604)
    return own.stat().st_mode & 0o777
"""


BY_NUMBER = """
import os, resource, socket

def f():
    os.setpriority(os.PRIO_PROCESS, os.getpid(), 5)
    os.sched_setaffinity(os.getpid(), os.sched_getaffinity(0))
    os.sched_setscheduler(os.getpid(), os.SCHED_BATCH, os.sched_param(0))
    resource.prlimit(os.getpid(), resource.RLIMIT_CORE, (0, 0))
    one, other = socket.socketpair(type=socket.SOCK_DGRAM)
    one.send(b'6')
    return other.recv(9)
"""


def level_called(name: str) -> Level:
    try:
        return find_isolation(name).level
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", [name for name in LEVELS if name != "limits"])
def test_where_namespaces_hide_other_processes_one_may_name_oneself(name: str) -> None:
    job = Job(program=BY_NUMBER, test="assert f() == b'6'", entry_point="f")
    assert execute(job, level=level_called(name), limits=Limits(), slot=78).result == "passed"


TRUNCATES = """
import os, sys
from launch.evaluation.sandbox.inside import landlock, seccomp
from launch.evaluation.sandbox.inside.system import PR_SET_NO_NEW_PRIVS, prctl
landlock.version = lambda known=landlock.version(): min(known, int(sys.argv[1]))
prctl(PR_SET_NO_NEW_PRIVS, 1)
landlock.restrict(["/usr"], sys.argv[3])
seccomp.restrict(host=True)
def empties(path):
    try:
        os.truncate(path, 0)
    except OSError:
        return False
    return True

assert not empties(sys.argv[2])
assert empties(sys.argv[3] + "/file") is (landlock.version() >= 3)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() not in AUDIT, reason="there is no filter here")
@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_no_landlock_lets_files_be_emptied(version: int, tmp_path: Path) -> None:
    """Its first two versions have no right for it. (Versions that this kernel lacks are tried as the last that it has.)"""
    secret, own = tmp_path / "secret", tmp_path / "own"
    secret.write_text("of the host")
    own.mkdir()
    (own / "file").touch()
    command = [sys.executable, "-c", TRUNCATES, str(version), str(secret), str(own)]
    subprocess.run(command, check=True, cwd=ROOT)
    assert secret.read_text() == "of the host"


@pytest.mark.parametrize("name", LEVELS)
def test_what_ordinary_programs_do_goes_on(name: str) -> None:
    mode = 0o600 if name == "limits" else 0o604  # a file's own mode is set where namespaces hide the host's
    job = Job(program=ORDINARY, test=f"assert f() == {mode}", entry_point="f")
    assert execute(job, level=level_called(name), limits=Limits(), slot=77).result == "passed"
