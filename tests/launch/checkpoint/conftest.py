"""A run with three checkpoints of a stub engine, and a real one."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from stub_engine import StubEngine, manager, state
from support import OLD


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A run with step_1, step_2, step_3, each of another engine."""
    run = tmp_path_factory.mktemp("runs") / "run"
    for step in (1, 2, 3):
        manager(run).save(StubEngine(seed=step), state(step))
    return run


@pytest.fixture
def run(three, tmp_path):
    shutil.copytree(three, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def real(tmp_path):
    """A copy of a checkpoint of two ranks, ZeRO 2, EP 2."""
    return Path(shutil.copytree(OLD / "run/checkpoints/step_6", tmp_path / "checkpoints/step_6"))


@pytest.fixture
def memory(tmp_path):
    """A folder in memory where there is one: hundreds of fsyncs of a busy disk take minutes, and the order is what counts."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)
