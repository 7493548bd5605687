"""Checksums and manifests: what a file or folder may have suffered, and that it is seen."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data import files
from data.files import hash_file
from launch import manifest
from launch.manifest import DamagedError, FileRecord


def complete(folder: Path, **contents: bytes) -> Path:
    folder.mkdir()
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    manifest.write_manifest(folder, manifest.record_all(folder), made_from="a test")
    return folder


def verify(folder: Path) -> None:
    files = manifest.read_manifest(folder)["files"]
    manifest.check_files(folder, files, files)


def test_a_complete_folder_verifies(tmp_path):
    folder = complete(tmp_path / "step_1", weights=os.urandom(9_000_000), empty=b"")
    verify(folder)
    assert manifest.read_manifest(folder)["made_from"] == "a test"


@pytest.mark.parametrize("name", ["weights", "state", manifest.MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "empty"])
def test_every_damage_is_seen_and_the_file_is_named(tmp_path, name, damage):
    folder = complete(tmp_path / "step_1", weights=os.urandom(5_000_000), state=b'{"step": 1}')
    path = folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes({"flip": bytes(data), "truncate": bytes(data[:-1]), "empty": b""}[damage])
    with pytest.raises(DamagedError, match=name):
        verify(folder)


@pytest.mark.parametrize("content", [b"1234", b"123456", b""])
def test_another_size_is_seen_by_those_who_do_not_hash_the_file(tmp_path, content):
    folder = complete(tmp_path / "step_1", state=b"12345")
    (folder / "state").write_bytes(content)
    with pytest.raises(DamagedError, match=f"state has {len(content)} bytes, 5 were written"):
        manifest.check_files(folder, manifest.read_manifest(folder)["files"], hashed=())


def test_every_single_flipped_bit_of_the_manifest_is_seen(tmp_path):
    folder = complete(tmp_path / "step_1", state=b"{}")
    path = folder / manifest.MANIFEST
    whole = path.read_bytes()
    unseen = []
    for position in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :])
            try:
                verify(folder)
            except DamagedError:
                continue
            unseen.append((position, bit))
    # White space means nothing in JSON: a flip that turns a blank into another blank changes nothing.
    assert all(chr(whole[position]) in " \n" for position, _ in unseen)


def test_a_newer_format_is_refused_not_called_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "MANIFEST_FORMAT", 2)
    folder = complete(tmp_path / "step_1", state=b"{}")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="newer version") as caught:
        manifest.read_manifest(folder)
    assert not isinstance(caught.value, DamagedError)


@pytest.mark.parametrize("format", ["1", None])
def test_a_manifest_that_says_no_format_is_refused(tmp_path, monkeypatch, format):
    monkeypatch.setattr(manifest, "MANIFEST_FORMAT", format)
    folder = complete(tmp_path / "step_1", state=b"{}")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=f"has format {format}, made by a newer version"):
        manifest.read_manifest(folder)


def test_a_file_in_the_place_of_a_folder_is_damage(tmp_path):
    """An older checkpoint may serve; an error of the system would be tried again and end the start."""
    (folder := tmp_path / "step_1" / "zero").mkdir(parents=True)
    (folder / "x.pt").write_bytes(b"x")
    record = manifest.record_file(folder / "x.pt")
    (folder / "x.pt").unlink()
    folder.rmdir()
    folder.write_bytes(b"")
    with pytest.raises(DamagedError, match=r"zero/x\.pt is missing"):
        manifest.check_files(folder.parent, {"zero/x.pt": record}, hashed=())


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"\xff", b"3"])
def test_a_manifest_that_is_no_object_is_damage(tmp_path, content):
    (tmp_path / manifest.MANIFEST).write_bytes(content)
    with pytest.raises(DamagedError, match=r"manifest\.json is damaged"):
        manifest.read_manifest(tmp_path)


def test_the_checksum_is_of_what_was_meant_to_be_written(tmp_path):
    tensors = {"a": torch.randn(1000), "b": torch.arange(7)}
    file = manifest.HashingFile(tmp_path / "x.pt")
    torch.save(tensors, file)
    record = file.close()
    assert record == {"bytes": (tmp_path / "x.pt").stat().st_size, "xxh3_128": hash_file(tmp_path / "x.pt", manifest.HASH)}
    assert record == manifest.record_file(tmp_path / "x.pt")
    assert torch.equal(torch.load(tmp_path / "x.pt")["a"], tensors["a"])


def test_what_is_long_written_or_read_tells_that_it_moves(tmp_path, monkeypatch):
    """Part by part, each on the disk before the next: else a large memory takes in all of it, and one fsync the whole time."""
    monkeypatch.setattr(manifest, "PART_BYTES", 4)
    told, synced = [], []
    monkeypatch.setattr(manifest.os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    file = manifest.HashingFile(tmp_path / "x", lambda: told.append(synced[:]))
    assert [file.write(data) for data in (b"0123456789", memoryview(b"ab"), b"")] == [10, 2, 0]
    assert told == [[4], [4, 8], [4, 8], [4, 8, 12]], "the last part of the first and the second write are four bytes"
    record = file.close()
    assert (tmp_path / "x").read_bytes() == b"0123456789ab" and record == manifest.record_file(tmp_path / "x")
    del told[:]
    content = manifest.read_verified(tmp_path / "x", record, lambda: told.append(1))
    assert content.read() == b"0123456789ab" and len(told) == 3


def test_hashing_tells_that_it_moves(tmp_path):
    folder = complete(tmp_path / "step_1", a=bytes(1 << 20), b=b"x")
    files, told = manifest.read_manifest(folder)["files"], []
    assert manifest.first_damage(folder, files, files, lambda: told.append(1)) == "" and len(told) >= 3
    before = len(told)
    assert manifest.record_all(folder, lambda: told.append(1)).items() >= files.items() and len(told) > 2 * before


def test_what_somebody_else_wrote_is_on_the_disk_before_it_is_listed(tmp_path, synced):
    """As the files of a conversion: DeepSpeed's converter syncs none."""
    (tmp_path / "fp32.pt").write_bytes(b"x")
    manifest.record_file(tmp_path / "fp32.pt")
    assert synced == [tmp_path / "fp32.pt"]


def test_folders_below_are_on_the_disk_before_the_manifest_is(tmp_path, monkeypatch):
    """As those of a conversion: a manifest must not outlive a power cut that takes names of files along."""
    synced = []
    sync = files.sync_folder
    for module in (manifest, files):  # this one's own, and that of what replaces a file
        monkeypatch.setattr(
            module, "sync_folder", lambda path: (synced.append((path, (tmp_path / "manifest.json").exists())), sync(path))
        )
    for name in ("zero/a/x.pt", "zero/y.pt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    manifest.write_manifest(tmp_path, manifest.record_all(tmp_path))
    assert {path for path, there in synced if not there} >= {tmp_path / "zero", tmp_path / "zero" / "a"}
    assert synced[-1] == (tmp_path, True)


def test_shares_cover_every_file_once_and_spread_the_bytes():
    files = {f"f{i}": {"bytes": 10 + i % 7} for i in range(50)}
    shares = [manifest.share(files, rank, 4) for rank in range(4)]
    assert sorted(name for share in shares for name in share) == sorted(files)
    loads = [sum(files[name]["bytes"] for name in share) for share in shares]
    assert max(loads) - min(loads) <= 16


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "/dev/zero", ""])
def test_a_manifest_names_only_files_of_its_folder(tmp_path, name):
    (tmp_path / "outside").write_bytes(b"x")
    folder = complete(tmp_path / "step_1", state=b"{}")
    (folder / "a").mkdir()
    record = FileRecord(bytes=1, xxh3_128=hash_file(tmp_path / "outside", manifest.HASH))
    manifest.write_manifest(folder, {**manifest.read_manifest(folder)["files"], name: record})
    with pytest.raises(DamagedError, match="which is not a file of this folder"):
        verify(folder)


def test_a_name_that_is_no_regular_file_is_damage(tmp_path):
    folder = complete(tmp_path / "step_1", state=b"{}", endless=b"")
    (folder / "endless").unlink()
    (folder / "endless").symlink_to("/dev/zero")  # as long as an empty file, and without an end when read
    with pytest.raises(DamagedError, match="is no regular file"):
        verify(folder)


@pytest.mark.parametrize("files", [[], None, {"state": 3}, {"state": {"bytes": "2", "xxh3_128": "x"}}])
def test_a_manifest_without_sense_is_damage(tmp_path, files):
    folder = complete(tmp_path / "step_1", state=b"{}")
    body = {"format": 1, "files": files}
    body["checksum"] = manifest._checksum(body)
    (folder / manifest.MANIFEST).write_bytes(manifest.to_json(body))
    with pytest.raises(DamagedError, match="does not list its files"):
        manifest.read_manifest(folder)


class Failing:
    """`hash_file` on a disk that fails its first reads."""

    def __init__(self, failures: int, number: int) -> None:
        self.failures, self.number, self.hits = failures, number, 0

    def __call__(self, path: Path, algorithm: str, on_read: Callable[[], object]) -> str:
        self.hits += 1
        if self.hits <= self.failures:
            raise OSError(self.number, os.strerror(self.number), str(path))
        return hash_file(path, algorithm, on_read)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_read_that_fails_is_tried_again_and_then_refused_but_no_damage(tmp_path, monkeypatch, number):
    monkeypatch.setattr(manifest, "RETRY_AFTER", (0.0, 0.0))
    folder = complete(tmp_path / "step_1", state=b"{}")
    once, always = Failing(1, number), Failing(100, number)
    monkeypatch.setattr(manifest, "hash_file", once)
    verify(folder)
    assert once.hits == 2, "the fault was to strike"
    monkeypatch.setattr(manifest, "hash_file", always)
    with pytest.raises(manifest.UnreadableError, match=r"step_1/state cannot be read .*also when tried again"):
        manifest.first_damage(folder, manifest.read_manifest(folder)["files"], ["state"])
    assert always.hits == 3


def test_a_table_of_files_has_a_size_and_a_hash_of_each() -> None:
    right = {"bytes": 1, "xxh3_128": "0"}
    assert manifest.is_file_table({}) and manifest.is_file_table({"a": right, "b": right})
    for wrong in (None, [], "x", {}, {"bytes": 1}, {"xxh3_128": "0"}, right | {"bytes": "1"}, right | {"xxh3_128": 0}):
        assert not manifest.is_file_table({"a": right, "b": wrong})
    assert not manifest.is_file_table(None) and not manifest.is_file_table([right])
