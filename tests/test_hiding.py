"""A user's own `data` or `model` on PYTHONPATH, or a second clone: each command runs its own, `python -m` names what hides it."""

from __future__ import annotations

import os
import shutil
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


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second clone, which says that it runs; ROOT is the one that is installed."""
    folder = tmp_path_factory.mktemp("second") / "clone"
    for name in ("data", "model", "launch"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "setup.py", folder / "setup.py")
    for name in ("data", "launch"):
        with (folder / name / "cli.py").open("a") as file:
            file.write(f"print('the second clone has {name}')\n")
    return folder


def hide(folder: Path) -> None:
    for name in ("data.py", "model.py"):
        (folder / name).write_text("raise SystemExit('somebody else')\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_clone_that_is_started_is_what_runs(command: str, clone: Path, tmp_path: Path) -> None:
    """An installed clone, or PYTHONPATH's, trained in its place, without a word."""
    hide(tmp_path)
    done = run(tmp_path, str(clone / command), "--help")
    assert done.returncode == 0, done.stderr
    assert "the second clone has data" in done.stdout
    assert not command.startswith("launch/") or "the second clone has launch" in done.stdout


def test_what_it_starts_is_of_the_same_clone(clone: Path, tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(clone)!r})
from pathlib import Path
from launch.benchmarks.training_runs.leash import run_leashed
from launch.cli import run_command
run_command(lambda: run_leashed(["true"], Path("log")))
"""
    (tmp_path / "start.py").write_text(program)
    (tmp_path / "work").mkdir()
    hide(tmp_path / "work")
    done = run(tmp_path / "work", "../start.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the second clone has data" in (tmp_path / "work/log").read_text()


@pytest.mark.parametrize("name", ["data.py", "model.py"])
def test_a_module_names_what_hides_ours(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("")
    done = run(tmp_path, "-m", "launch.exporting.gguf", "--help")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"{tmp_path / name} hides this system's package {name[:-3]!r}" in done.stderr
