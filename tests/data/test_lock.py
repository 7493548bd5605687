"""A folder belongs to one process, as long as that lives."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from data_helpers import environment
from support import ROOT

from data import lock
from data.cli import UserError, as_user_error
from data.lock import FolderLock, LockHeld, is_held, take_folder

HOLD = """
import sys
import time
from pathlib import Path
from data.lock import FolderLock
lock = FolderLock(Path(sys.argv[1])); print(lock.take(), flush=True); sys.stdin.readline()
"""


def test_a_job_s_folder_keeps_its_name(tmp_path: Path, synced: list[Path]) -> None:
    """A power cut lost all that was on the disk in it with a name that was not."""
    held = FolderLock(tmp_path / "runs" / "run")
    held.take()
    held.release()
    assert {tmp_path, tmp_path / "runs"} <= set(synced)


def test_a_lock_is_held_by_one_and_ends_with_its_process(tmp_path: Path) -> None:
    line = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment())
    assert holder.stdout is not None and holder.stdout.readline() == "True\n"
    with pytest.raises(LockHeld, match=f"process {holder.pid} on"):
        FolderLock(tmp_path).take()
    holder.kill()
    holder.wait()
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    assert first.take()
    with pytest.raises(LockHeld):
        second.take()
    first.release()
    assert second.take()
    second.release()


def test_whether_a_folder_is_held_is_told_without_taking_it(tmp_path: Path) -> None:
    path, taken = tmp_path / ".lock", FolderLock(tmp_path)
    assert is_held(tmp_path) is None
    assert taken.take() and is_held(tmp_path) is True
    taken.release()
    assert is_held(tmp_path) is False and taken.take()
    taken.release()
    for text in ("process 4711 on another-host", "", "somebody else's"):
        path.write_text(text)
        assert is_held(tmp_path) is None
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert is_held(tmp_path) is None
    path.unlink()
    os.mkfifo(path)  # an open of which waits for a writer
    assert is_held(tmp_path) is None


def test_a_look_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks holds the lock as well, for a moment: others who ask do not see it, and who takes the folder waits for it."""
    taken = FolderLock(tmp_path)
    taken.take()
    taken.release()
    real, looks = lock.fcntl.flock, [1, 2, 3]
    with open(tmp_path / ".lock") as looking:
        real(looking, fcntl.LOCK_SH)
        assert is_held(tmp_path) is False

        def flock(file: Any, kind: int) -> None:
            if looks and looks.pop() == 1:
                real(looking, fcntl.LOCK_UN)
            real(file, kind)

        monkeypatch.setattr(lock.fcntl, "flock", flock)
        assert taken.take() and not looks
    taken.release()


def test_a_refusal_for_want_of_permission_is_a_lock_that_another_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fcntl(2): EACCES or EAGAIN, by the file system."""

    def held(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(lock.fcntl, "flock", held)
    with pytest.raises(LockHeld):
        FolderLock(tmp_path).take()


def test_a_lock_that_its_holder_removed_meanwhile_keeps_out_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened before, locked after: two of three held the folder."""
    first, second, third = (FolderLock(tmp_path) for _ in range(3))
    assert first.take()
    real = lock.try_lock

    def late(file: Any) -> bool:
        monkeypatch.setattr(lock, "try_lock", real)
        (tmp_path / ".lock").unlink()
        first.release()
        return real(file)

    monkeypatch.setattr(lock, "try_lock", late)
    assert second.take()
    with pytest.raises(LockHeld):
        third.take()
    second.release()
    assert third.take()
    third.release()


def test_a_forked_child_does_not_hold_the_folder(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    lock.take()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(write)
        os.read(read, 1)  # lives until the parent lets it go
        os._exit(0)
    lock.release()
    other = FolderLock(tmp_path)
    try:
        while True:  # until the child has run its hook
            try:
                assert other.take()
                break
            except LockHeld:
                time.sleep(0.01)
    finally:
        other.release()
        os.close(write)
        os.waitpid(child, 0)


def test_a_lock_names_its_holder_alone(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("process 4194304 on a-host-of-a-longer-name-than-ours" * 9)
    lock = take_folder(tmp_path, "job")
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    lock.release()


@pytest.mark.parametrize("kind", ["link", "hard link", "link to nothing", "FIFO"])
def test_a_lock_that_leads_to_another_file_leaves_it_alone(kind: str, tmp_path: Path) -> None:
    """The file was emptied: whoever could write to a folder could have the next run of it empty any file of its user."""
    victim, folder = tmp_path / "victim", tmp_path / "run"
    folder.mkdir()
    if kind != "link to nothing":
        victim.write_text("precious")
    if kind == "FIFO":
        os.mkfifo(folder / ".lock")
    elif kind == "hard link":
        os.link(victim, folder / ".lock")
    else:
        (folder / ".lock").symlink_to(victim)
    with pytest.raises((UserError, OSError), match=r"\.lock") as raised:
        take_folder(folder, "run")
    assert as_user_error(raised.value) is not None
    assert victim.read_text() == "precious" if kind != "link to nothing" else not victim.exists()


def test_a_file_system_without_locks_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", without)
    said: list[str] = []
    monkeypatch.setattr(lock, "say", said.append)
    first, second = take_folder(tmp_path, "job"), take_folder(tmp_path, "job")
    assert said == [f"warning: {tmp_path} lies on a file system without locks: nothing keeps a second job out of it"] * 2
    first.release()
    second.release()
