"""Checksums, manifests, names: what a file or folder may have suffered, and that it is seen."""

import os
from pathlib import Path

import pytest
import torch

from launch import integrity
from launch.integrity import DamagedError


def complete(folder: Path, **contents: bytes) -> Path:
    folder.mkdir()
    files = {name: integrity.write_durably(folder / name, data) for name, data in contents.items()}
    integrity.write_manifest(folder, files, made_from="a test")
    return folder


def verify(folder: Path) -> None:
    files = integrity.read_manifest(folder)["files"]
    integrity.check_files(folder, files, files)


def test_a_complete_folder_verifies(tmp_path):
    folder = complete(tmp_path / "step_1", weights=os.urandom(9_000_000), empty=b"")
    verify(folder)
    assert integrity.read_manifest(folder)["made_from"] == "a test"


@pytest.mark.parametrize("name", ["weights", "state", integrity.MANIFEST])
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


def test_every_single_flipped_bit_of_the_manifest_is_seen(tmp_path):
    folder = complete(tmp_path / "step_1", state=b"{}")
    path = folder / integrity.MANIFEST
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
    monkeypatch.setattr(integrity, "MANIFEST_FORMAT", 2)
    folder = complete(tmp_path / "step_1", state=b"{}")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="newer version") as caught:
        integrity.read_manifest(folder)
    assert not isinstance(caught.value, DamagedError)


def test_the_checksum_is_of_what_was_meant_to_be_written(tmp_path):
    tensors = {"a": torch.randn(1000), "b": torch.arange(7)}
    file = integrity.HashingFile(tmp_path / "x.pt")
    torch.save(tensors, file)
    record = file.close()
    assert record == {"bytes": (tmp_path / "x.pt").stat().st_size, "xxh3_128": integrity.hash_file(tmp_path / "x.pt")}
    assert record == integrity.record_file(tmp_path / "x.pt")
    assert torch.equal(torch.load(tmp_path / "x.pt")["a"], tensors["a"])


def test_shares_cover_every_file_once_and_spread_the_bytes():
    files = {f"f{i}": {"bytes": 10 + i % 7} for i in range(50)}
    shares = [integrity.share(files, rank, 4) for rank in range(4)]
    assert sorted(name for share in shares for name in share) == sorted(files)
    loads = [sum(files[name]["bytes"] for name in share) for share in shares]
    assert max(loads) - min(loads) <= 16


@pytest.mark.parametrize("can_exchange", [True, False])
def test_publishing_over_an_existing_folder(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(integrity, "exchange", lambda *_: False)
    final = complete(tmp_path / "step_1", state=b"old")
    temporary = complete(integrity.working_name(final, "tmp"), state=b"new")
    integrity.publish(temporary, final)
    assert (final / "state").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]


def test_a_death_between_the_two_renames_is_undone(tmp_path, monkeypatch):
    monkeypatch.setattr(integrity, "exchange", lambda *_: False)
    final = complete(tmp_path / "step_1", state=b"old")
    temporary = complete(integrity.working_name(final, "tmp"), state=b"new")
    renames = []

    def die_at_the_second(source, target, rename=os.rename):
        renames.append(target)
        if len(renames) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(integrity.os, "rename", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        integrity.publish(temporary, final)
    monkeypatch.undo()
    assert not final.exists()
    integrity.recover(tmp_path)
    verify(final)
    assert (final / "state").read_bytes() == b"old"


def test_only_our_own_leftovers_are_found(tmp_path):
    ours = [integrity.working_name(tmp_path / "step_7", kind) for kind in ("tmp", "trash", "replaced")]
    others = [tmp_path / name for name in (".tmp-mine", ".git", "step_7", ".trash", "tmp-step_7-0123abcd")]
    for folder in (*ours, *others):
        folder.mkdir()
    assert integrity.leftovers(tmp_path) == sorted(ours)
    integrity.discard(tmp_path / "step_7")
    assert not (tmp_path / "step_7").exists()
