"""A folder gets its name whole or not at all, whatever was there and whenever the process dies."""

import os
from pathlib import Path

import pytest

from launch.checkpoint import publish


def folder_with(folder: Path, **contents: bytes) -> Path:
    folder.mkdir()
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("can_exchange", [True, False])
def test_publishing_over_an_existing_folder(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(publish, "exchange", lambda *_: False)
    final = folder_with(tmp_path / "step_1", state=b"old")
    temporary = folder_with(publish.working_name(final, "tmp"), state=b"new")
    publish.publish(temporary, final)
    assert (final / "state").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]


def test_a_death_between_the_two_renames_is_undone(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "exchange", lambda *_: False)
    final = folder_with(tmp_path / "step_1", state=b"old")
    temporary = folder_with(publish.working_name(final, "tmp"), state=b"new")
    renames = []

    def die_at_the_second(source, target, rename=os.rename):
        renames.append(target)
        if len(renames) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(publish.os, "rename", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        publish.publish(temporary, final)
    monkeypatch.undo()
    assert not final.exists()
    publish.recover(tmp_path)
    assert (final / "state").is_file()
    assert (final / "state").read_bytes() == b"old"


def test_only_our_own_leftovers_are_found(tmp_path):
    ours = [publish.working_name(tmp_path / "step_7", kind) for kind in ("tmp", "trash", "replaced")]
    others = [tmp_path / name for name in (".tmp-mine", ".git", "step_7", ".trash", "tmp-step_7-0123abcd")]
    for folder in (*ours, *others):
        folder.mkdir()
    assert publish.leftovers(tmp_path) == sorted(ours)
    publish.discard(tmp_path / "step_7")
    assert not (tmp_path / "step_7").exists()
