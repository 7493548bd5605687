"""Whole or absent, on the disk before they have their name, hashed by what the file holds."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import xxhash

from data.files import (
    check_replaceable,
    hash_file,
    is_inside,
    make_folder,
    read_json,
    read_object,
    replace_file,
    replace_json,
    replacing,
    small_file,
    sync_folder,
)


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


def test_a_folder_that_is_made_keeps_its_name(tmp_path: Path, synced: list[Path]) -> None:
    """And so do those above it that are made."""
    make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir() and sorted(synced) == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    make_folder(tmp_path / "a" / "b")
    assert len(synced) == 3


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


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "link to /proc"])
def test_what_is_no_file_is_not_replaced(kind: str, tmp_path: Path) -> None:
    """`--output /dev/null`, as root: the device would be a file from then on."""
    pipe, path = tmp_path / "pipe", tmp_path / "output"
    os.mkfifo(pipe)
    if kind == "pipe":
        path = pipe
    else:
        path.symlink_to(pipe if kind == "link to a pipe" else "/proc/self/fd/1")
    before = os.lstat(path)
    with pytest.raises(OSError, match="not a regular file") as refused:
        replace_file(path, b"page")
    assert refused.value.filename == str(path) and os.lstat(path) == before
    assert not list(tmp_path.glob(".*"))


def test_what_could_not_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    """By the name of what is wrong; nothing is made meanwhile."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    check_replaceable(tmp_path / "file")
    check_replaceable(tmp_path / "new")
    for path, kind, named in (
        (tmp_path, IsADirectoryError, tmp_path),
        (tmp_path / "none" / "x", FileNotFoundError, tmp_path / "none"),
        (tmp_path / "file" / "x", FileNotFoundError, tmp_path / "file"),
        (tmp_path / "pipe", OSError, tmp_path / "pipe"),
    ):
        with pytest.raises(kind) as refused:
            check_replaceable(path)
        assert refused.value.filename == str(named)
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]


def test_hashes_are_the_libraries_(tmp_path: Path) -> None:
    data = bytes(range(256)) * 20_000  # several blocks and a part
    (tmp_path / "x").write_bytes(data)
    assert hash_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()
    assert hash_file(tmp_path / "x", xxhash.xxh3_128) == xxhash.xxh3_128(data).hexdigest()


@pytest.mark.parametrize("name", ["a", "a/b.bin", ".hidden", "a..b", "train/shard_000000.bin"])
def test_names_inside_a_folder(name: str) -> None:
    assert is_inside(name)


@pytest.mark.parametrize("name", ["", "/dev/zero", "../x", "a/../../x", "a/..", "..", ".", "x\0y", None, 5, ["a"]])
def test_names_that_lead_out(name: object) -> None:
    assert not is_inside(name)


def test_a_small_file_is_read_only_if_it_is_one(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"x": 1}')
    assert small_file(tmp_path / "a.json") == b'{"x": 1}' and read_json(tmp_path / "a.json") == {"x": 1}
    assert small_file(tmp_path / "a.json", most=8) == b'{"x": 1}'
    with pytest.raises(OSError, match="not a regular file of at most 7 bytes"):
        small_file(tmp_path / "a.json", most=7)
    os.mkfifo(tmp_path / "fifo")  # an open of which waits for a writer
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 1 << 40)
    for name in ("fifo", "zero", "sparse"):
        with pytest.raises(OSError, match=f"not a regular file of at most .*{name}"):
            read_json(tmp_path / name)
    for nonsense in (b"[" * 100_000, b"", b"\xff\xfe", b"{"):
        (tmp_path / "b.json").write_bytes(nonsense)
        with pytest.raises(ValueError, match=r"."):
            read_json(tmp_path / "b.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"[" * 100_000, b"\xff", None])
def test_an_object_that_may_be_lacking_is_empty(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"x": 1}')
    assert read_object(path) == {"x": 1}
    path.unlink() if content is None else path.write_bytes(content)
    assert read_object(path) == {}


def test_json_knows_no_nan(tmp_path: Path) -> None:
    """A loss that was not finite must not make a file that jq and browsers refuse."""
    replace_json(tmp_path / "result.json", {"loss": float("nan"), "worst": [float("inf"), 1.5], "pair": (2, float("nan"))})
    text = (tmp_path / "result.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) == {
        "loss": None,
        "worst": [None, 1.5],
        "pair": [2, None],
    }
    assert text.endswith("}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
