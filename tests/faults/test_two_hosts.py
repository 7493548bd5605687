"""Two network namespaces, a rank in each: `tests/faults/two_hosts.py` as a test. Two minutes, so in `make soak`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

NOT_PERMITTED = 77


@pytest.mark.slow
def test_a_cut_link_ends_both_sides_and_a_restart_resumes(small_shards: Path, small_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "tests/faults/two_hosts.py", str(small_shards), str(small_model), str(tmp_path / "hosts")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode == NOT_PERMITTED:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "losses equal to those of one host to the bit" in done.stdout
    assert done.stdout.count("link cut at step") == 2
    assert "link back: resuming from" in done.stdout
