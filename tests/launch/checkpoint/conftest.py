"""A run with three checkpoints of a stub engine."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from stub_engine import StubEngine, manager, state


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
def memory(tmp_path):
    """A folder in memory where there is one: hundreds of fsyncs of a busy disk take minutes, and the order is what counts."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)
