"""`--help` of every command: at once, examples first, nothing that says nothing."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
from support import ROOT

COMMANDS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("data", "launch")
    for path in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)
SECONDS = 0.5  # of CPU time: a wall clock says how busy the machine is
WIDTH = 132  # of an example, which is typed as one line; everything else is as wide as a terminal


def test_the_commands_were_found() -> None:
    assert {"data/preprocess.py", "launch/train.py", "launch/generate.py", "launch/plan.py", "launch/benchmark.py"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS
    lines = done.stdout.splitlines()
    assert lines[2] == "examples:" and command in done.stdout.split("usage:")[0]
    assert "default: None" not in done.stdout and "==SUPPRESS==" not in done.stdout
    assert max(map(len, lines)) <= WIDTH
