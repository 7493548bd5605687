"""The progress line: it fits, keeps what matters, and has colours on a terminal only."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from launch.run.progress import coloured, progress_line
from launch.words import step_of_last

VALUES = {
    "loss": "loss 4.123",
    "norm": "norm 1.23",
    "tokens/s": "316k tok/s",
    "MFU": "MFU 36%",
    "memory": "28GB",
    "max_vio": "max_vio 0.31",
}
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_everything_fits_into_80_columns() -> None:
    line = progress_line(step_of_last(99_999, 100_000), VALUES, "4d03h", 79)  # tqdm leaves the last column free
    assert len(line) <= 79
    assert all(text in line for text in VALUES.values()) and line.startswith("99999/100k ") and line.endswith(" ETA 4d03h")


@pytest.mark.parametrize("width", range(20, 121))
def test_what_matters_stays(width: int) -> None:
    line = progress_line("120/400", VALUES, "3h05m", width)
    assert len(line) <= width and line.startswith("120/400")
    if width >= 30:
        assert "loss 4.123" in line and "ETA 3h05m" in line
    if width < 60:
        assert "28GB" not in line  # what goes first


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert ESCAPE.sub("", coloured("1/2 loss 3")) == "1/2 loss 3" != coloured("1/2 loss 3")
    monkeypatch.setenv("NO_COLOR", "1")
    assert coloured("1/2 loss 3") == "1/2 loss 3"


SCRIPT = """
import sys, time
from pathlib import Path
from data.terminal import drain
from launch.run.metrics import Monitor
monitor = Monitor(Path(sys.argv[1]), enabled=True, last_step=3)
monitor.begin(0)
for step in (1, 2, 3):
    monitor.progress(step, {"loss": "loss 4.123", "norm": "norm 1.23", "tokens/s": "316k tok/s"}, force=step == 3)
    time.sleep(0.6)
monitor.close()
drain()
"""


def on_terminal(folder: Path, **settings: str) -> str:
    """What the script writes to a terminal of 80 columns."""
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80", **settings}
    with subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], cwd=ROOT, stdout=slave, stderr=slave, env=env) as process:
        os.close(slave)
        written = b""
        while True:
            try:
                block = os.read(master, 4096)
            except OSError:  # the other end was closed
                break
            if not block:
                break
            written += block
    os.close(master)
    assert process.returncode == 0, written
    return written.decode()


def test_on_a_terminal_and_without_one(tmp_path: Path) -> None:
    shown = on_terminal(tmp_path)
    assert "\x1b[1m3/3\x1b[0m" in shown and "loss 4.123" in shown and "316k tok/s" in shown
    assert max(len(ESCAPE.sub("", line)) for line in re.split(r"[\r\n]", shown)) <= 80
    plain = on_terminal(tmp_path, NO_COLOR="1")
    assert "3/3" in plain and "\x1b[1m" not in plain
    piped = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "\x1b" not in piped.stderr and "\r" not in piped.stderr
    assert "step 3/3  loss 4.123  norm 1.23  316k tok/s  ETA 0m00s" in piped.stderr
