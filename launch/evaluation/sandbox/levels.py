"""The ways of this machine to confine a program, the strongest first."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.cli import UserError

LEVELS = ("bubblewrap", "namespaces", "limits")
#: A user for each slot, where we are root. systemd leaves 60578 to 61183 unused; containers that map 65,536 users have them.
FIRST_USER, USERS = 60600, 512
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin")


@dataclass(frozen=True, kw_only=True)
class Level:
    """name: of LEVELS. user_namespace: whether privileges come from a user namespace; else from being root, and a user is taken."""

    name: str
    user_namespace: bool
    python: str
    bubblewrap: str | None = None

    @property
    def leaves_root(self) -> bool:
        return not self.user_namespace and os.getuid() == 0

    @property
    def most_workers(self) -> int | None:
        """Where users are taken, each worker has two of its own: who shares one shares its limits, and may signal the other."""
        return USERS // 2 if self.leaves_root else None

    @property
    def default_workers(self) -> int | None:
        """No more than this, unless more are asked for: other evaluations on this machine take users of the same range."""
        return self.most_workers and self.most_workers // 4


def levels(asked: str) -> Iterator[Level]:
    """What may work here, to be tried in this order. asked: a name of LEVELS, or auto."""
    if asked not in ("auto", *LEVELS):
        raise UserError(f"no isolation called {asked}; there are: auto, {', '.join(LEVELS)}")
    ways = [False, True] if os.getuid() == 0 else [True]
    python = os.path.realpath(own_python())
    bubblewrap = shutil.which("bwrap")
    if bubblewrap and asked in ("auto", "bubblewrap"):
        yield from (Level(name="bubblewrap", user_namespace=way, python=python, bubblewrap=bubblewrap) for way in ways)
    if sys.platform == "linux" and asked in ("auto", "namespaces"):
        yield from (Level(name="namespaces", user_namespace=way, python=python) for way in ways)
    if asked in ("auto", "limits"):
        yield Level(name="limits", user_namespace=False, python=open_python() if os.getuid() == 0 else python)


def own_python() -> str:
    """Not an environment's copy (`venv --copies`), which has no standard library beside it."""
    return getattr(sys, "_base_executable", "") or sys.executable


def open_python() -> str:
    """An interpreter that every user of the machine can run: ours may lie in root's home."""
    for path in (own_python(), "/usr/local/bin/python3", "/usr/bin/python3"):
        real = Path(path).resolve()
        if real.is_file() and all(folder.stat().st_mode & stat.S_IXOTH for folder in (real, *real.parents)):
            return str(real)
    return os.path.realpath(own_python())


def system_folders(python: str) -> tuple[list[str], dict[str, str]]:
    """(folders to show read-only, links such as /lib -> usr/lib): what an interpreter and its libraries need."""
    prefix = Path(python).parent.parent
    folders = [folder for folder in SYSTEM_FOLDERS if os.path.isdir(folder) and not os.path.islink(folder)]
    links = {folder: os.readlink(folder) for folder in SYSTEM_FOLDERS if os.path.islink(folder)}
    if not any(prefix.is_relative_to(folder) for folder in folders):
        # No more of it: a prefix can be somebody's home, or `.local` in it.
        folders += [str(prefix / name) for name in ("bin", "lib", "lib64") if (prefix / name).is_dir()]
    return folders, links


def bubblewrap_command(level: Level, temporary_size: int) -> list[str]:
    """Up to where the program's own command begins. Without a user namespace, two capabilities remain to leave root with."""
    assert level.bubblewrap
    command = [level.bubblewrap, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    if level.user_namespace:
        command += ["--unshare-user", "--uid", str(FIRST_USER), "--gid", str(FIRST_USER)]
    else:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    folders, links = system_folders(level.python)
    for folder in folders:
        for parent in list(Path(folder).parents)[-2::-1]:
            command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--ro-bind", folder, folder]
    for name, target in links.items():
        command += ["--symlink", target, name]
    command += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--size", str(temporary_size), "--tmpfs", "/tmp"]
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--"]


def namespaces_config(level: Level, root: str, temporary_size: int, temporary_files: int) -> dict[str, Any]:
    folders, links = system_folders(level.python)
    return {
        "root": root,
        "read_only": folders,
        "links": links,
        "user_inside": FIRST_USER if level.user_namespace else None,
        "temporary": f"size={temporary_size},nr_inodes={temporary_files}",
    }
