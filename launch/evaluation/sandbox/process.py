"""Start a confined program, see what it uses, end it and all that it started."""

from __future__ import annotations

import os
import platform
import select
import signal
import stat
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from launch.evaluation.sandbox.folder import folder_use, remove
from launch.evaluation.sandbox.inside.warden import parents
from launch.evaluation.sandbox.levels import FIRST_USER, USERS, Level, bubblewrap_command, namespaces_config, system_folders
from launch.evaluation.sandbox.limits import Limits
from launch.evaluation.sandbox.program import python_command

END_SECONDS = 10.0  # that a warden may take to end its program
PAGE = os.sysconf("SC_PAGE_SIZE")
KERNEL_LIST = "/proc/thread-self/children"  # where there is one (CONFIG_PROC_CHILDREN, which distributions set)


@dataclass(frozen=True, kw_only=True)
class Confined:
    """A running program. leash: where a warden watches over it, the pipe whose end makes it end its program."""

    process: subprocess.Popen[bytes]
    limits: Limits
    leash: int | None
    folder: str | None

    def excess(self) -> str | None:
        """What the whole tree has too much of; the kernel limits each process alone."""
        tree = descendants(self.process.pid)
        if sum(resident_memory(process) for process in tree) > self.limits.memory:
            return "memory"
        try:
            size, files = folder_use(self.folder) if self.leash is not None and self.folder else (0, temporary_files(tree[-1]))
        except OSError:  # it has made what cannot be counted
            return "files"
        if self.leash is not None:
            size += sum(nameless_files(tree).values())
        return "files" if size > self.limits.temporary_size or files > self.limits.temporary_files else None

    def end(self) -> None:
        """Nothing of the program is left afterwards."""
        if self.leash is not None:
            os.close(self.leash)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=END_SECONDS)
        else:
            for first in descendants(self.process.pid)[1:2]:
                kill_namespace(first)
        self.process.kill()
        self.process.wait()
        if self.folder is not None:
            remove(self.folder)


def kill_namespace(first: int) -> None:
    """A namespace's first process: the kernel lets it end when all the others have ended."""
    with suppress(ProcessLookupError):
        handle = os.pidfd_open(first)
        try:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            select.select([handle], [], [], END_SECONDS)
        finally:
            os.close(handle)


def start(
    level: Level,
    limits: Limits,
    *,
    role: str,
    slot: int,
    stdin: int | IO[bytes],
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
    descriptors: Sequence[int] = (),
    extra: Mapping[str, Any] | None = None,
) -> Confined:
    """slot: programs that run at the same time have different ones. descriptors: stay open within, under the same numbers."""
    user = FIRST_USER + slot % USERS if level.leaves_root else None
    config: dict[str, Any] = {"level": level.name, "role": role, "user": user, "descriptors": list(descriptors), "folder": "/tmp"}
    config["limits"] = resource_limits(limits, processes_besides(level))
    command, folder, leash, passed = [], None, None, list(descriptors)
    if level.name == "bubblewrap":
        command = bubblewrap_command(level, limits.temporary_size)
    else:
        folder = private_folder(user)
    if level.name == "namespaces":
        assert folder
        config |= namespaces_config(level, folder, limits.temporary_size, limits.temporary_files) | {"parent": os.getpid()}
    if level.name == "limits":
        config["folder"] = folder
        config["read_only"] = system_folders(level.python)[0]
        config["leash"], leash = os.pipe()
        passed.append(config["leash"])
    process = subprocess.Popen(
        [*command, *python_command(level.python, config | dict(extra or {}))],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env={},
        pass_fds=passed,
        cwd="/",
        start_new_session=True,
    )
    if leash is not None:
        os.close(config["leash"])
    return Confined(process=process, limits=limits, leash=leash, folder=folder)


def private_folder(user: int | None) -> str:
    folder = tempfile.mkdtemp(prefix="sandbox-")
    if user is not None:
        os.chown(folder, user, user)
    return folder


def resource_limits(limits: Limits, besides: int) -> dict[str, int]:
    """By the names of Python's `resource`. besides: processes of the same user that are none of the program's."""
    return {
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": limits.seconds,
        "RLIMIT_AS": limits.memory,
        "RLIMIT_NPROC": limits.processes + besides,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_FSIZE": limits.file_size,
    }


def processes_besides(level: Level) -> int:
    """What RLIMIT_NPROC counts besides the program's own: nothing for a user of its own or, since 5.14, a namespace of its own."""
    if level.leaves_root:
        return 0
    if level.user_namespace and kernel_release() >= (5, 14):
        return 0
    tasks = 0
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        with suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():
                tasks += len(os.listdir(f"/proc/{name}/task"))
    return tasks


def kernel_release() -> tuple[int, int]:
    numbers = platform.release().split("-")[0].split(".")
    return int(numbers[0]), int(numbers[1])


def descendants(process: int) -> list[int]:
    """Of this process, itself first; children come after their parents."""
    found = [process]
    for one in found:  # which grows while it is read
        found += children(one)
    return found


def children(process: int) -> list[int]:
    """By the kernel's own list, or else by all of /proc, which takes 4 ms for a hundred processes: of 128 workers that looked into
    it ten times a second, on a host with 3,000, a quarter called right programs timed out."""
    if not os.path.exists(KERNEL_LIST):
        return [child for child, parent in parents().items() if parent == process]
    found: list[int] = []
    with suppress(OSError):  # it has ended
        for task in os.listdir(f"/proc/{process}/task"):
            with suppress(OSError), open(f"/proc/{process}/task/{task}/children", "rb") as file:
                found += map(int, file.read().split())
    return found


def resident_memory(process: int) -> int:
    """Bytes; 0 once it has ended."""
    with suppress(OSError), open(f"/proc/{process}/statm", "rb") as file:
        return int(file.read().split()[1]) * PAGE
    return 0


def nameless_files(processes: Sequence[int]) -> dict[tuple[int, int], int]:
    """Bytes of each file that is open there and lies in no folder, by device and inode. Only root may look."""
    found = {}
    for process in processes:
        with suppress(OSError):
            for entry in os.scandir(f"/proc/{process}/fd"):
                with suppress(OSError):
                    about = entry.stat()
                    if stat.S_ISREG(about.st_mode) and about.st_nlink == 0:
                        found[about.st_dev, about.st_ino] = about.st_size
    return found


def temporary_files(process: int) -> int:
    """Files in the /tmp that this process sees, where that is a file system of its own; 0 where it cannot be seen."""
    with suppress(OSError):
        status = os.statvfs(f"/proc/{process}/root/tmp")
        if status.f_fsid != os.statvfs("/tmp").f_fsid:
            return status.f_files - status.f_ffree
    return 0
