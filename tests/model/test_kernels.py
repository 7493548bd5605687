"""The Triton kernels: numerics under Triton's interpreter against the plain formulas in float64, costs against their shapes.

Triton is not in the main environment, where it would switch DeepSpeed's own paths: `.ci/run` puts it into `.triton/`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from support import ROOT

from model import operators

FOLDER = ROOT / ".triton"
BF16, FP32 = 2, 4


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    folder = [str(FOLDER)] if (FOLDER / "triton").is_dir() else []
    if not folder and find_spec("triton") is None:
        pytest.skip(f"needs Triton: pip install --no-deps --target {FOLDER.name} triton==3.7.1")
    if not folder and (found := version("triton")) < "3.7":
        pytest.skip(f"the interpreter of Triton {found} fails with NumPy 2.4: it makes a number of an array")
    return worker(TRITON_INTERPRET="1", PYTHONPATH=os.pathsep.join([str(ROOT), *folder]))


def worker(*flags: str, **environment: str) -> dict[str, float]:
    command = [sys.executable, "tests/model/kernels_worker.py", *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, float] = json.loads(done.stdout)
    return found


def too_far(errors: dict[str, float]) -> dict[str, float]:
    """bf16 may be off by a rounding of inputs, intermediate sums in fp32, and results."""
    assert len(errors) > 30
    limits = {name: 1e-2 if name.startswith("bfloat16") else 2e-6 for name in errors}
    return {name: value for name, value in errors.items() if not value < limits[name]}


def test_kernels_equal_the_formulas_in_float64(errors: dict[str, float]) -> None:
    """Outputs and gradients."""
    assert too_far(errors) == {}


@pytest.mark.gpu
def test_kernels_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert too_far(worker("--gpu")) == {}


def test_equal_scores_choose_the_lower_index(errors: dict[str, float]) -> None:
    assert errors["ties"] == 0


def test_kernels_are_for_gpus_and_not_for_float64() -> None:
    assert not operators.usable(torch.zeros(1))
    double = torch.empty(1, dtype=torch.float64, device="meta")
    assert not operators.usable(double)


@pytest.mark.parametrize(("value", "here"), [(None, True), ("1", True), ("0", False)])
def test_the_environment_turns_them_off(value: str | None, here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the README tells whoever has odd losses on a GPU alone. Past the cache, which another process begins without."""
    monkeypatch.setattr(operators, "find_spec", lambda name: name)
    monkeypatch.delenv("MOE_KERNELS", raising=False)
    if value is not None:
        monkeypatch.setenv("MOE_KERNELS", value)
    assert operators.has_triton.__wrapped__() is here
