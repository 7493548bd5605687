"""Whatever becomes of the terminal, pipe or log under standard output and error: training goes on and saves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from nursery import ROOT
from runs import TRAIN, Site, last_saved, rows, struck
from support import fill_pipe


@pytest.mark.parametrize(
    "sink", ["closed pipe", pytest.param("full pipe", marks=pytest.mark.slow), pytest.param("full disk", marks=pytest.mark.slow)]
)
def test_a_sink_that_fails(site: Site, tmp_path: Path, sink: str) -> None:
    """Closed: `train.py ... 2>&1 | head -2`. Full pipe: a terminal on hold. Full disk: a redirected log."""
    reader, writer = os.pipe()
    if sink == "full pipe":
        fill_pipe(writer)
    elif sink == "full disk":
        os.close(writer)
        writer = os.open("/dev/full", os.O_WRONLY)
    else:
        os.close(reader)
    one = Site(nursery=site.nursery, shards=site.shards, model=site.model, folder=tmp_path, ranks=1)
    command = [sys.executable, TRAIN, *one.flags(tmp_path / "run", stop_after=3, eval_interval=0)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=writer, stderr=writer, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.wait(240) == 0
    assert last_saved(tmp_path / "run") == "step_3"
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == [1, 2, 3]
    os.close(writer)
    struck(f"{sink} under standard error")
