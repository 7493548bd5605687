"""What a run writes down of the code that it is made with."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launch.run import environment


def test_the_commit_of_a_clone_of_another_user_s_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a shared clone git says "dubious ownership", and the run's config.json had no commit."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    monkeypatch.setattr(environment, "CLONE", tmp_path)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch
    refused = subprocess.run([*git, "status"], capture_output=True, text=True, check=False)
    assert "dubious ownership" in refused.stderr
    assert len(environment.git_commit() or "") == 40
    (tmp_path / "site-packages").mkdir()  # an installed copy below somebody's repository, whose hooks git would run
    monkeypatch.setattr(environment, "CLONE", tmp_path / "site-packages")
    assert environment.git_commit() is None
