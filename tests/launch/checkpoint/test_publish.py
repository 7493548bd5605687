"""A folder gets its name whole or not at all, whatever was there and whenever the process dies."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from data.terminal import drain
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


def test_a_link_to_a_disk_that_is_not_mounted_is_replaced(tmp_path):
    final = tmp_path / "step_1"
    final.symlink_to("/not/mounted/step_1")
    publish.publish(folder_with(publish.working_name(final, "tmp"), state=b"new"), final)
    assert (final / "state").read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["step_1"]


def test_what_cannot_be_deleted_is_told_once(tmp_path, monkeypatch, capsys):
    """It had lost its name, and filled the disk unseen."""
    monkeypatch.setattr(publish.shutil, "rmtree", lambda *_, **__: None)
    publish.discard(folder_with(tmp_path / "step_1", state=b"old"))
    (trash,) = tmp_path.iterdir()
    drain()
    assert f"warning: {trash} cannot be deleted" in "".join(capsys.readouterr())
    publish.discard(trash)
    drain()
    assert "".join(capsys.readouterr()) == ""


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


def test_what_was_replaced_is_not_put_back_where_the_new_one_is(tmp_path):
    """The process died between its second rename and the old one's deletion."""
    new = folder_with(tmp_path / "step_1", state=b"new")
    folder_with(old := publish.working_name(new, "replaced"), state=b"old")
    publish.recover(tmp_path)
    assert (new / "state").read_bytes() == b"new" and publish.leftovers(tmp_path) == [old]


def test_what_is_put_back_is_there_after_a_power_cut_too(tmp_path, synced):
    publish.working_name(tmp_path / "step_1", "replaced").mkdir()
    publish.recover(tmp_path)
    assert synced == [tmp_path] and (tmp_path / "step_1").is_dir()


@pytest.mark.parametrize("can_rename", [True, False])
def test_a_folder_is_no_checkpoint_any_more_when_its_files_go(tmp_path, monkeypatch, synced, can_rename):
    """Half deleted it would be a damaged one: without its name, or else, on the disk too, without its manifest."""
    folder, going = folder_with(tmp_path / "step_1", **{"manifest.json": b"{}", "a.pt": b""}), []
    if not can_rename:
        monkeypatch.setattr(publish, "rename_if_possible", lambda *_: False)
    monkeypatch.setattr(publish.shutil, "rmtree", lambda path, **_: going.append((path, sorted(os.listdir(path)))))
    publish.discard(folder)
    ((path, files),) = going
    if can_rename:
        assert path.name.startswith(".trash-step_1-") and not folder.exists()
    else:
        assert (path, files, synced) == (folder, ["a.pt"], [folder])


def test_only_our_own_leftovers_are_found(tmp_path):
    ours = [publish.working_name(tmp_path / "step_7", kind) for kind in ("tmp", "trash", "replaced")]
    others = [
        tmp_path / name for name in (".tmp-mine", ".git", "step_7", ".trash", "tmp-step_7-0123abcd", ".tmp-step_7-0123abcd.kept")
    ]
    for folder in (*ours, *others):
        folder.mkdir()
    assert publish.leftovers(tmp_path) == sorted(ours)
    publish.discard(tmp_path / "step_7")
    assert not (tmp_path / "step_7").exists()


@pytest.mark.parametrize("replaced", [True, False])
def test_of_a_link_the_name_goes_and_what_it_points_to_stays(tmp_path, capsys, replaced):
    """A checkpoint that was moved to another disk: the link stayed for ever, under a hidden name."""
    kept = folder_with(tmp_path / "kept", state=b"old")
    run = folder_with(tmp_path / "run")
    (run / "step_1").symlink_to(kept)
    publish.working_name(run / "step_1", "trash").symlink_to(kept)  # of a process that died there
    for dead in publish.leftovers(run):
        publish.discard(dead)
    if replaced:
        publish.publish(folder_with(publish.working_name(run / "step_1", "tmp"), state=b"new"), run / "step_1")
    else:
        publish.discard(run / "step_1")
    assert [p.name for p in run.iterdir()] == ["step_1"] * replaced
    assert (kept / "state").read_bytes() == b"old"
    drain()
    assert capsys.readouterr().err.count(f" was a link; what it points to is kept: {kept}\n") == 2


def test_a_folder_that_may_not_be_renamed_stays(tmp_path, monkeypatch):
    """Only where the file system renames no folders is the old one deleted before the new one has its name."""
    final, temporary = folder_with(tmp_path / "step_1", state=b"old"), folder_with(tmp_path / "new", state=b"new")

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(publish, "exchange", lambda *_: False)
    monkeypatch.setattr(publish.os, "rename", refuse)
    for action in (lambda: publish.publish(temporary, final), lambda: publish.discard(final)):
        with pytest.raises(PermissionError):
            action()
    assert (final / "state").read_bytes() == b"old" and (temporary / "state").read_bytes() == b"new"


@pytest.fixture
def image(tmp_path):
    """A folder on overlayfs, as a container sees what came with its image; `step_4` is of the image."""
    lower, upper, work, merged, memory = (tmp_path / name for name in ("lower", "memory/upper", "memory/work", "merged", "memory"))
    for folder in (lower / "step_4", merged, memory):
        folder.mkdir(parents=True)
    (lower / "step_4" / "manifest.json").write_text("{}")
    (lower / "step_4" / "x").write_text("old")
    mounted = []
    try:
        for *kind, where in (
            ["-t", "tmpfs", "tmpfs", memory],
            ["-t", "overlay", "-o", f"lowerdir={lower},upperdir={upper},workdir={work}", "overlay", merged],
        ):
            done = subprocess.run(["mount", *kind, str(where)], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
            mounted.append(where)
            for folder in (upper, work):
                folder.mkdir(exist_ok=True)
        with pytest.raises(OSError, match="cross-device"):  # the fault strikes
            os.rename(merged / "step_4", merged / "moved")
        yield merged
    finally:
        for where in reversed(mounted):
            subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_folder_of_a_containers_image_is_deleted(image):
    """Every save failed there as soon as an old checkpoint was to go."""
    publish.discard(image / "step_4")
    assert os.listdir(image) == []


def test_a_folder_of_a_containers_image_is_replaced(image):
    new = publish.working_name(image / "step_4", "tmp")
    new.mkdir()
    (new / "x").write_text("new")
    publish.publish(new, image / "step_4")
    assert os.listdir(image) == ["step_4"] and os.listdir(image / "step_4") == ["x"]
    assert (image / "step_4" / "x").read_text() == "new"
