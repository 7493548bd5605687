"""What an installed copy has: everything that the code opens beside itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

#: `launch/engine/strategy.py` reads the strategies beside its package.
ROOMS = ("model", "data", "launch", "ds_configs")
#: For people who read the clone.
NOT_CARRIED = {".md", ".png", ".sh", ".py", ".pyc"}


def test_an_installed_copy_has_every_file_that_is_read(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    copy, built = tmp_path / "clone", tmp_path / "built"
    for name in ROOMS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(built)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    kept = {path.relative_to(copy) for name in ROOMS for path in (copy / name).rglob("*") if path.is_file()}
    assert (built / "launch" / "plan.py").is_file()
    wanted = {path for path in kept if path.suffix not in NOT_CARRIED}
    assert len(wanted) > 10 and {path for path in wanted if not (built / path).is_file()} == set()
