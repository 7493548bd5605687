"""Sinks for logs may fail: `metrics.jsonl` stays whole lines of JSON, each row once."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from launch.run.metrics import JsonLines, Monitor, finite


def test_half_a_line_of_a_killed_run_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    lines = JsonLines(path)
    lines.write({"step": 2})
    lines.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_file_of_one_broken_line_is_emptied(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"st')
    JsonLines(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("half", [b"", b'{"step": 7, "lo'])
def test_of_a_long_file_only_the_half_line_goes(half: bytes, tmp_path: Path) -> None:
    """One of more than the 64 KiB at its end that are looked at."""
    path, whole = tmp_path / "metrics.jsonl", b'{"step": 1, "loss": 2.5}\n' * 4000
    path.write_bytes(whole + half)
    JsonLines(path).close()
    assert path.read_bytes() == whole


FILL = """
import resource, signal, sys
from pathlib import Path
from typing import Any
from data.terminal import drain
from launch.run.metrics import JsonLines
lines = JsonLines(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for step in range(100):
    lines.write({"step": step, "loss": 1.25})
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
lines.write({"step": 100})
drain()
"""


def test_a_full_disk_loses_lines_and_never_halves_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", FILL, str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps[-1] == 100 and steps[:-1] == list(range(len(steps) - 1))
    assert 10 < len(steps) < 60  # the disk was full
    assert done.stderr.count("warning") == 1 and "training goes on" in done.stderr


def rows(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_short_writes_are_written_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, write = JsonLines(tmp_path / "m.jsonl"), os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, bytes(data)[:7]))
    for step in range(3):
        lines.write({"step": step, "loss": 1.25})
    lines.close()
    assert rows(tmp_path / "m.jsonl") == [{"step": step, "loss": 1.25} for step in range(3)]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.write({"step": 1, "loss": math.nan, "load_entropy": [math.nan, 0.5], "nested": {"x": -math.inf}, "n": (1, math.inf)})
    lines.close()
    assert rows(tmp_path / "m.jsonl") == [
        {"step": 1, "loss": None, "load_entropy": [None, 0.5], "nested": {"x": None}, "n": [1, None]}
    ]
    assert finite("NaN") == "NaN" and finite(3) == 3 and finite(True) is True


def test_rows_have_the_time(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, enabled=True, last_step=1)
    before = time.time()
    monitor.log({"step": 1})
    monitor.close()
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert before - 0.01 <= row["time"] <= time.time() + 0.01


def test_a_resumed_run_writes_no_row_twice(tmp_path: Path) -> None:
    """Steps 1 to 6 were logged; a rollback from 3 to 1 has left the skipped steps' rows; the checkpoint is that of step 4."""
    path = tmp_path / "metrics.jsonl"
    old = [
        {"step": 0, "val_loss": 9.0},
        {"step": 1, "samples": 8}, {"step": 2, "samples": 16, "skipped": "spike"}, {"step": 3, "samples": 24, "skipped": "spike"},
        {"step": 2, "samples": 32}, {"step": 3, "samples": 40}, {"step": 4, "samples": 48}, {"step": 4, "val_loss": 8.0},
        {"step": 4, "save_seconds": 0.1}, {"step": 5, "samples": 56}, {"step": 6, "samples": 64}, {"step": 6, "val_loss": 7.0},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in old) + '{"step": 7, "sam')
    monitor = Monitor(tmp_path, enabled=True, last_step=8)
    monitor.begin(4, 48)
    monitor.log({"step": 5, "samples": 56, "again": True})
    monitor.close()
    assert rows(path)[:-1] == old[:9] and rows(path)[-1]["again"]
    assert rows(tmp_path / "metrics.superseded.jsonl") == old[9:]
    Monitor(tmp_path, enabled=True, last_step=8).begin(5, 56)
    assert len(rows(path)) == 10, "nothing more goes"


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    """It evaluates at step 0 again: that row stood twice."""
    path = tmp_path / "metrics.jsonl"
    old = [{"step": 0, "val_loss": 9.0}, {"step": 1, "samples": 8}, {"note": "of somebody else's"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in old))
    Monitor(tmp_path, enabled=True, last_step=8).begin(0, 0)
    assert rows(path) == old[2:] and rows(tmp_path / "metrics.superseded.jsonl") == old[:2]


def test_nothing_is_written_where_nothing_is_superseded(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "samples": 8}\n')
    inode = path.stat().st_ino
    Monitor(tmp_path, enabled=True, last_step=8).begin(1, 8)
    assert path.stat().st_ino == inode and not (tmp_path / "metrics.superseded.jsonl").exists()


def test_a_deleted_file_is_begun_anew(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.write({"step": 1})
    (tmp_path / "metrics.jsonl").unlink()
    log.write({"step": 2})
    log.write({"step": 3})
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [2, 3]


def test_a_disk_too_full_to_move_rows_away_takes_those_that_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log was closed before: its number was that of whatever was opened next, a checkpoint, which got the rows."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "samples": 8}\n{"step": 2, "samples": 16}\n')
    monitor = Monitor(tmp_path, enabled=True, last_step=8)

    def replace_file(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("launch.run.metrics.replace_file", replace_file)
    monitor.begin(1, 8)
    with open(tmp_path / "checkpoint", "wb"):
        monitor.log({"step": 2, "samples": 16})
        monitor.close()
    assert [row["step"] for row in rows(path)] == [1, 2, 2] and not (tmp_path / "checkpoint").read_bytes()


def test_what_is_left_after_a_rollback_is_of_the_steps_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds a step, from 100 to 110 and then back to 90; as if ten steps had been none, each took 22 seconds."""
    now, said = [0.0], list[str]()
    monkeypatch.setattr("launch.run.metrics.time.monotonic", lambda: now[0])
    monkeypatch.setattr("launch.run.metrics.say", said.append)
    monitor = Monitor(tmp_path, enabled=True, last_step=120)
    monitor.begin(100)
    for step in (110, 91, 95):
        if step == 91:
            monitor.count_from(90)
        now[0] += 2.0 * (step - max(s for s in (90, 91, 100) if s < step))
        monitor.progress(step, {}, force=True)
    assert [line.split("ETA ")[1] for line in said] == ["0m20s", "0m58s", "0m50s"]
