"""Names in `checkpoints/`: what is a checkpoint, what the pointers mean, which one comes first, which may go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data.cli import UserError
from launch.checkpoint.folder import BEST, LATEST, LEFT, RESUMED, CheckpointFolder, step_of


def folder_with(path: Path, *steps: int, latest: str | None = None) -> CheckpointFolder:
    for step in steps:
        (path / f"step_{step}").mkdir()
    folder = CheckpointFolder(path)
    if latest is not None:
        folder.point(LATEST, latest)
    return folder


@pytest.mark.parametrize(
    ("name", "step"), [("step_0", 0), ("step_42", 42), ("step_", None), ("step_1.universal", None), (".step_1", None), ("a", None)]
)
def test_only_a_step_is_a_step(name: str, step: int | None) -> None:
    assert step_of(name) == step


def test_other_things_are_no_checkpoints(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 1, 20)
    (tmp_path / "step_3").write_text("a file")
    (tmp_path / "step_4.universal").mkdir()
    assert sorted(folder.steps()) == [1, 20]
    assert CheckpointFolder(tmp_path / "none").steps() == {}


def test_the_order_begins_at_what_latest_names_and_ends_beyond_it(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 1, 2, 9, 10, latest="step_2")
    assert [path.name for path in folder.newest_first()] == ["step_2", "step_1", "step_10", "step_9"]
    folder.point(LATEST, "step_77")
    assert [path.name for path in folder.newest_first()] == ["step_10", "step_9", "step_2", "step_1"]
    folder.point(LATEST, "step_5")  # nor is one that is gone a place in the order
    assert [path.name for path in folder.newest_first()] == ["step_10", "step_9", "step_2", "step_1"]


def test_where_a_run_began_is_kept_for_the_same_command(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 1, 2, 3, latest="step_3")
    assert folder.began_at() is None
    folder.begin_at(tmp_path / "step_1", None)
    assert folder.began_at() is None and folder.pointed(LATEST) == "step_3", "by itself a start leaves no branch"
    folder.begin_at(tmp_path / "step_2", str(tmp_path / "step_2"))
    assert folder.began_at() == str(tmp_path / "step_2") and folder.pointed(LATEST) == "step_2"
    folder.begin_at(tmp_path / "step_1", str(tmp_path / "step_2"))
    assert folder.pointed(LATEST) == "step_2" and folder.left() == {"step_3"}, "the same command, where step_2 is damaged"
    moved = CheckpointFolder(folder.path.rename(tmp_path.with_name("moved")))
    assert moved.began_at() == str(moved.path / "step_2"), "the same command in a run that was moved"
    moved.path.rename(tmp_path)
    folder.begin_at(tmp_path / "other" / "step_1", "/a\n\udcff/step_2")
    assert folder.began_at() == "/a\n\udcff/step_2"
    folder.begin_at(tmp_path / "other" / "step_1", "/other")
    assert folder.began_at() == "/other" and folder.pointed(LATEST) == "step_2", "not of this folder"
    folder.begin_at(tmp_path / "step_2", None)
    assert folder.began_at() is None


def test_a_run_that_begins_at_another_s_checkpoint_has_a_folder_that_survives(tmp_path: Path, synced: list[Path]) -> None:
    """A power cut took `checkpoints/` along with `resumed`."""
    (tmp_path / "run").mkdir()
    CheckpointFolder(tmp_path / "run" / "checkpoints").begin_at(tmp_path / "other" / "step_1", "other")
    assert tmp_path / "run" in synced


def test_a_crash_where_a_run_begins_lets_it_begin_there_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `resumed` but the old `latest` the same command would go on beyond the checkpoint that it names."""
    folder, written = folder_with(tmp_path, 1, 2, latest="step_2"), list[str]()
    monkeypatch.setattr("launch.checkpoint.folder.replace_file", lambda path, _: written.append(path.name))
    folder.begin_at(tmp_path / "step_1", str(tmp_path / "step_1"))
    assert written == [LEFT, LATEST, RESUMED]


def test_a_branch_that_was_left_is_neither_tried_nor_counted_nor_deleted(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 5, 10, 14, 17, latest="step_17")
    folder.begin_at(tmp_path / "step_10", str(tmp_path / "step_10"))
    assert folder.left() == {"step_14", "step_17"}
    folder_with(tmp_path, 18, 20, latest="step_20")
    assert [path.name for path in folder.newest_first()] == ["step_20", "step_18", "step_10", "step_5"]
    assert [path.name for path in folder.expendable(keep_last=2, keep_every=0)] == ["step_10", "step_5"]
    assert sorted(folder.steps()) == [5, 10, 14, 17, 18, 20], "by its name each is still there"
    folder.begin_at(tmp_path / "step_17", str(tmp_path / "step_17"))
    assert [path.name for path in folder.newest_first()] == ["step_17"], "nobody knows that it came by step_14, and not by step_18"
    folder.leave([], but="step_20")
    assert [path.name for path in folder.newest_first()] == ["step_17", "step_20"], "once it is saved anew"
    (tmp_path / LEFT).write_bytes(b"step_10 step_99\n\xff")
    folder.leave(["step_5"], but="step_17")
    assert (tmp_path / LEFT).read_text().split() == ["step_10", "step_5"]


def test_what_was_left_is_told_of_with_its_size(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 5, 10, 9, latest="step_10")
    assert folder.left_hint() is None
    (tmp_path / "step_10" / "zero").mkdir()
    for name in ("a", "zero/b"):
        (tmp_path / "step_10" / name).touch()
        os.truncate(tmp_path / "step_10" / name, 700_000_000)  # a hole, which takes no space
    folder.begin_at(tmp_path / "step_5", str(tmp_path / "step_5"))
    folder.leave(["step_77"], but="step_5")  # and it is gone
    assert folder.left_hint() == (
        f"{tmp_path} holds 2 checkpoints of branches that were left, 1.4GB that are never deleted by themselves: step_9, step_10"
    )


def test_a_disk_that_fails_does_not_bring_a_branch_back(tmp_path: Path) -> None:
    """Unread, what was left would be taken for none."""
    folder = folder_with(tmp_path, 1, 2, latest="step_2")
    (tmp_path / LEFT).mkdir()
    with pytest.raises(OSError, match="left"):
        folder.newest_first()


def test_what_a_rollback_will_go_to_is_kept(tmp_path: Path) -> None:
    """Of a row of skipped steps with a save in it, all that --keep_last 1 left was saved in the row."""
    folder = folder_with(tmp_path, 3, 4, 7, 8, latest="step_8")
    kept = {skipped: [path.name for path in folder.expendable(keep_last=1, keep_every=0, skipped=skipped)] for skipped in range(6)}
    assert kept == {
        0: ["step_7", "step_4", "step_3"],
        1: ["step_4", "step_3"],
        2: ["step_7", "step_3"],
        3: ["step_7", "step_3"],
        4: ["step_7", "step_3"],
        5: ["step_7", "step_4"],
    }


def test_what_may_go(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 1, 2, 3, 4, 5, 6, latest="step_5")
    folder.point(BEST, "step_1")
    (tmp_path / "step_5.universal").mkdir()
    gone = [path.name for path in folder.expendable(keep_last=1, keep_every=3)]
    assert gone == ["step_4", "step_2", "step_5.universal"]  # 1 is the best, 3 a multiple, 5 the newest, 6 beyond it
    assert [path.name for path in folder.expendable(keep_last=0, keep_every=0)] == ["step_5.universal"]


def test_new_bests_fill_up_what_the_others_leave_and_push_none_of_them_out(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 10, 13, 20, 24, 25, 26, latest="step_26")
    folder.point(BEST, "step_26")
    bests = {"step_13", "step_24", "step_25", "step_26"}

    def gone(keep_last: int, **more: int) -> list[str]:
        return [path.name for path in folder.expendable(keep_last=keep_last, keep_every=0, of_bests=bests, **more)]

    assert gone(2) == ["step_25", "step_24", "step_13"]
    assert gone(1) == ["step_10", "step_25", "step_24", "step_13"]
    assert gone(4) == ["step_24", "step_13"], "of two others, the newest bests fill up"
    assert gone(0) == [] and gone(1, skipped=1) == ["step_10", "step_24", "step_13"]


def test_what_lies_where_a_save_will_write_is_refused_at_the_start(tmp_path: Path) -> None:
    """It was found at the first save, which by default is 50,000 steps later."""
    CheckpointFolder(tmp_path / "none").check()
    (tmp_path / "checkpoints").mkdir()
    folder = folder_with(tmp_path / "checkpoints", 4, latest="step_4")
    folder.check()
    (folder.path / LATEST).unlink()
    (folder.path / LATEST).mkdir()
    with pytest.raises(UserError, match="latest is a folder and must be a file that names one"):
        folder.check()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(UserError, match=f"{name} is no folder, so no checkpoint can be written there"):
            CheckpointFolder(tmp_path / name).check()
