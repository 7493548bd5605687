"""Locks of extensions' builds: waited for while somebody may hold them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launch.ranks import builds


def test_who_waits_for_a_builder_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    monkeypatch.setattr(time, "sleep", lambda _: lock.unlink())
    builds.wait_for_builds(tmp_path)
    assert capfd.readouterr().err == f"waiting for {lock}, which another process may hold\n"


def test_the_next_builder_s_lock_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    answers = iter([True, True, None])  # waited for, and then gone
    monkeypatch.setattr(builds, "_may_be_held", lambda _: next(answers))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    builds.wait_for_builds(tmp_path)
    assert lock.exists()
