"""A real run to export."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support import OLD


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of a copy, which may be changed."""
    shutil.copytree(OLD / "run", tmp_path / "run")
    return tmp_path / "run/checkpoints/step_6"
