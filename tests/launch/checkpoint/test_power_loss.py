"""The power fails at every moment of a save: what was not brought to the disk is gone, and the newest checkpoint is whole."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from stub_engine import StubEngine, manager, state, whole

from launch.checkpoint import publish


class Disk:
    """What would be left of a folder: files as of their last fsync, names as of their folder's. Watches `os.fsync`."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.moments = root, 0
        self.files: dict[int, bytes] = {}
        self.folders: dict[int, dict[str, int]] = {}
        self._held: list[int] = []  # an inode that is still open is not given to another file
        for path in (root, *root.rglob("*")):
            self._keep(os.open(path, os.O_RDONLY))
        fsync = os.fsync

        def watched(descriptor: int) -> None:
            self.moments += 1
            self.on_moment()
            fsync(descriptor)
            self._keep(os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY))

        patch.setattr(os, "fsync", watched)

    def on_moment(self) -> None: ...

    def _keep(self, descriptor: int) -> None:
        self._held.append(descriptor)
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            self.folders[found.st_ino] = {e.name: e.inode() for e in os.scandir(f"/proc/self/fd/{descriptor}")}
        else:
            self.files[found.st_ino] = os.pread(descriptor, found.st_size, 0)

    def after_power_loss(self, target: Path, *, ahead: str = "") -> None:
        """The disk when it comes back. `ahead`: where names are ahead of contents, for a rename is often there before the data is:
        in "all" folders, or "inside" the checkpoints but not among the checkpoints' own."""
        here = (self.root, *self.root.rglob("*"))
        now = {p.stat().st_ino: {e.name: e.inode() for e in os.scandir(p)} for p in here if p.is_dir()}
        names = self.folders if not ahead else now
        if ahead == "inside":
            names = now | {p.stat().st_ino: self.folders[p.stat().st_ino] for p in (self.root, self.root / "checkpoints")}
        self._write(self.root.stat().st_ino, target, names, set(now) | set(self.folders))

    def _write(self, inode: int, target: Path, names: dict[int, dict[str, int]], folders: set[int]) -> None:
        target.mkdir(parents=True)
        for name, number in names.get(inode, {}).items():
            if number in folders:
                self._write(number, target / name, names, folders)
            else:
                (target / name).write_bytes(self.files.get(number, b""))

    def close(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "two renames"])
@pytest.mark.parametrize("ahead", ["", "all", "inside"], ids=["names lost too", "names ahead of contents", "ahead inside alone"])
@pytest.mark.parametrize("step", [4, 3], ids=["a new step", "the same step again"])
def test_power_fails_at_every_moment_of_a_save(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, ahead: str, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(publish, "exchange", lambda *_: False)
    disk = Disk(run, monkeypatch)
    left: list[Path] = []

    def power_loss() -> None:
        left.append(tmp_path / f"left_{len(left)}" / "run")
        disk.after_power_loss(left[-1], ahead=ahead)

    disk.on_moment = power_loss  # type: ignore[method-assign]
    manager(run, keep_last=2).save(StubEngine(seed=50), state(step, new=True))
    monkeypatch.undo()
    power_loss()
    disk.close()
    assert disk.moments >= 10, "files, folders, names"
    found = []
    for folder in left:
        choice = manager(folder).choose("auto")
        assert whole(choice.path) and "passed over" not in choice.message, choice.message
        assert manager(folder).load(StubEngine(seed=1), choice) == choice.state
        found.append((choice.state.step, choice.state.extra))
    assert found[0] == (3, {}) and found[-1] == (step, {"new": True})
    assert found == sorted(found, key=lambda item: item[1] == {"new": True}), "once the new one is there, it stays"


def test_power_fails_after_the_first_save_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of `checkpoints/` was never brought to the disk: the next start began at step 0, without a word."""
    (tmp_path / "run").mkdir()
    disk = Disk(tmp_path / "run", monkeypatch)
    manager(tmp_path / "run").save(StubEngine(seed=1), state(1))
    monkeypatch.undo()
    disk.after_power_loss(tmp_path / "left")
    disk.close()
    assert manager(tmp_path / "left").choose("auto").state.step == 1
