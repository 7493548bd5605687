"""The experts on a GPU before sm90 where our kernels are switched off: DeepSpeed's Triton kernels, under Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from support import ROOT

FOLDER = ROOT / ".triton"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    if not (FOLDER / "triton").is_dir():
        pytest.skip(f"needs Triton: pip install --no-deps --target {FOLDER.name} triton==3.7.1")
    path = os.pathsep.join([str(ROOT), str(FOLDER)])
    command = [sys.executable, "tests/launch/engine/triton_experts_worker.py"]
    env = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_their_kernels_equal_each_experts_formula(found: dict[str, Any]) -> None:
    """In float64, forward and gradients; ragged runs, experts without rows, all rows to one, none; gate and up apart and joined."""
    assert len(found["errors"]) == 8
    assert {name: error for name, error in found["errors"].items() if not error < 2e-6} == {}


def test_the_backward_keeps_weights_and_no_copies(found: dict[str, Any]) -> None:
    assert all(originals == [True] * 3 for originals in found["originals"].values()), found["originals"]
