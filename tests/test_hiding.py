"""A user's own `data` or `model` on PYTHONPATH: the commands of `data/` work all the same, those of `launch/` name it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT
from test_help import COMMANDS

TOKENIZER = ROOT / "tests/fixtures/before_the_move/run/tokenizer/tokenizer.json"


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """With what the folder holds before ours, as a user's PYTHONPATH comes before an installed clone."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("name", ["data.py", "data/__init__.py"])
def test_preprocessing_and_verifying_are_ours(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("raise SystemExit('somebody else')\n")
    (tmp_path / "model.py").write_text("raise SystemExit('somebody else')\n")
    (tmp_path / "code").mkdir()
    (tmp_path / "code/a.py").write_text("def f(x):\n    return x\n" * 20)
    flags = ("--input", "tree:code", "--tokenizer", str(TOKENIZER), "--output", "shards", "--workers", "2")
    done = run(tmp_path, str(ROOT / "data/preprocess.py"), *flags)
    assert done.returncode == 0 and "1 documents" in done.stdout + done.stderr, done.stderr
    done = run(tmp_path, str(ROOT / "data/verify.py"), "shards")
    assert done.returncode == 0 and "all sound" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["data.py", "model.py"])
@pytest.mark.parametrize("command", [name for name in COMMANDS if name.startswith("launch/")])
def test_the_commands_of_launch_name_it(command: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("")
    done = run(tmp_path, str(ROOT / command), "--help")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"{tmp_path / name} hides this system's package {name[:-3]!r}" in done.stderr
