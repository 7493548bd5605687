"""Starts the workers that need Triton, which is not in the main environment: there it would switch DeepSpeed's own paths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import distributions
from typing import Any

import pytest
from support import ROOT

FOLDER = ROOT / ".triton"
PLACES = [str(FOLDER)] if (FOLDER / "triton").is_dir() else []


def triton_version() -> str:
    """Of the one that a worker imports; skips where there is none."""
    found = next((one.version for one in distributions(name="triton", path=PLACES or sys.path)), "")
    if not found:
        pytest.skip(f"needs Triton: pip install --no-deps --target {FOLDER.name} triton==3.7.1")
    return found


def run_interpreted(script: str, *flags: str) -> dict[str, Any]:
    """Kernels in Triton's interpreter, on a CPU."""
    if (old := triton_version()) < "3.7":
        pytest.skip(f"the interpreter of Triton {old} fails with NumPy 2.4: it makes a number of an array")
    return run_worker(script, *flags, TRITON_INTERPRET="1")


def run_worker(script: str, *flags: str, **environment: str) -> dict[str, Any]:
    """What `tests/model/SCRIPT` prints as JSON."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *PLACES]), **environment}
    command = [sys.executable, f"tests/model/{script}", *flags]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found
