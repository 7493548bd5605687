"""What a confined program leaves on the host's disk is counted and goes, whatever it has made of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import readable_copy, without_path

from launch.evaluation.sandbox.folder import DEEPEST, folder_use, remove
from launch.evaluation.sandbox.levels import open_python, own_python, system_folders

DEEP = "import os; [(os.mkdir('d'), os.chdir('d')) for _ in range(3000)]; open('x', 'w').write('x' * 99)"
ORDINARY = 64900  # nobody's number
COUNT_AND_REMOVE = """
import os, sys
from launch.evaluation.sandbox.folder import folder_use, remove
os.makedirs(sys.argv[1] + "/d/e")
open(sys.argv[1] + "/d/e/x", "wb").write(bytes(5_000_000))
for name in ("/d/e", "/d"):
    os.chmod(sys.argv[1] + name, 0o300)
size, files = folder_use(sys.argv[1])
os.chmod(sys.argv[1] + "/d", 0)
remove(sys.argv[1])
print(size > 5_000_000, files, os.path.exists(sys.argv[1]))
"""


def test_bytes_files_and_folders_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x").write_bytes(bytes(1000))
    (tmp_path / "link").symlink_to("/usr")
    size, files = folder_use(str(tmp_path))
    assert files == 4 and 1000 <= size < 100_000


def test_folders_too_deep_to_be_named(tmp_path: Path) -> None:
    """Counting and removing them was a RecursionError, which ended the whole evaluation."""
    folder = tmp_path / "sandbox"
    folder.mkdir()
    subprocess.run([sys.executable, "-c", DEEP], cwd=folder, check=True)
    with pytest.raises(OSError, match="too long"):
        folder_use(str(folder))
    remove(str(folder))
    assert not folder.exists() and DEEPEST < 3000
    remove(str(folder))  # and never raises


def test_folders_closed_to_their_owner(tmp_path: Path) -> None:
    """Their files were not counted, and stayed. Root may look into any."""
    os.chmod(tmp_path, 0o777)
    command = [open_python(), "-c", COUNT_AND_REMOVE, str(tmp_path / "sandbox")]
    prefix = ["setpriv", f"--reuid={ORDINARY}", f"--regid={ORDINARY}", "--clear-groups"] if os.getuid() == 0 else []
    for parent in tmp_path.parents:
        if os.getuid() == 0 and not parent.stat().st_mode & 0o001:
            os.chmod(parent, parent.stat().st_mode | 0o011)
    with readable_copy("data", "launch") as ours:
        done = subprocess.run([*prefix, *command], cwd=ours, env=without_path(), capture_output=True, text=True, check=False)
    assert done.stdout == "True 3 False\n", done.stderr


def test_a_prefix_that_is_a_home_is_not_shown(tmp_path: Path) -> None:
    """`~/.ssh` was, to every program that was judged."""
    for name in ("bin", "lib", ".ssh"):
        (tmp_path / name).mkdir()
    folders, _ = system_folders(str(tmp_path / "bin" / "python3"))
    assert {folder for folder in folders if folder.startswith(str(tmp_path))} == {str(tmp_path / "bin"), str(tmp_path / "lib")}


def test_an_environments_copy_is_not_what_runs(tmp_path: Path) -> None:
    subprocess.run([own_python(), "-m", "venv", "--copies", "--without-pip", str(tmp_path / "venv")], check=True)
    code = "from launch.evaluation.sandbox.levels import own_python; print(own_python())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])}
    done = subprocess.run(
        [str(tmp_path / "venv" / "bin" / "python"), "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout and not done.stdout.startswith(str(tmp_path)), done.stderr
