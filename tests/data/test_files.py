"""Whole or absent, on the disk before they have their name, hashed by what the file holds, locked as long as a process lives."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xxhash
from data_helpers import ROOT, environment

from data import files
from data.files import FolderLock, LockHeld, hash_file, is_inside, replace_file, replacing, sync_folder


def test_a_replacement_is_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        steps.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    def noted_replace(old: Path, new: Path) -> None:
        steps.append("name")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    (tmp_path / "x").write_bytes(b"old")
    replace_file(tmp_path / "x", b"new")
    assert steps == ["file", "name", "folder"] and (tmp_path / "x").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_failed_replacement_leaves_the_old_content_and_names_the_file(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if call != "write":
        monkeypatch.setattr(os, {"fsync": "fsync", "rename": "replace"}[call], fail)
    with pytest.raises(OSError) as caught, replacing(tmp_path / "x") as file:
        file.write(b"new")
        if call == "write":
            fail()
    assert call == "rename" or caught.value.filename == str(tmp_path / ".x.tmp")
    assert (tmp_path / "x").read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(("number", "tolerated"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_fsync_a_folder_is_good_enough(
    number: int, tolerated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def refuse(handle: int) -> None:
        calls.append(handle)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if tolerated:
        sync_folder(tmp_path)
    else:
        with pytest.raises(OSError, match=tmp_path.name):
            sync_folder(tmp_path)
    assert len(calls) == 1


def test_hashes_are_the_libraries_(tmp_path: Path) -> None:
    data = bytes(range(256)) * 20_000  # several blocks and a part
    (tmp_path / "x").write_bytes(data)
    assert len(data) > 4 * files.BLOCK_BYTES
    assert hash_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()
    assert hash_file(tmp_path / "x", "xxh3_128") == xxhash.xxh3_128(data).hexdigest()


@pytest.mark.parametrize("name", ["a", "a/b.bin", ".hidden", "a..b", "train/shard_000000.bin"])
def test_names_inside_a_folder(name: str) -> None:
    assert is_inside(name)


@pytest.mark.parametrize("name", ["", "/dev/zero", "../x", "a/../../x", "a/..", "..", ".", "x\0y", None, 5, ["a"]])
def test_names_that_lead_out(name: object) -> None:
    assert not is_inside(name)


HOLD = """
import sys
import time
from pathlib import Path
from data.files import FolderLock
lock = FolderLock(Path(sys.argv[1])); print(lock.take(), flush=True); sys.stdin.readline()
"""


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


def test_a_file_system_without_locks_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", without)
    lock = FolderLock(tmp_path)
    assert lock.take() is False
    lock.release()
