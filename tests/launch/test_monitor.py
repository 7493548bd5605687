"""Sinks for logs may fail: `metrics.jsonl` stays whole lines, W&B down, slow or without a key neither stops nor slows training."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from launch.monitor import JsonLines, redact


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


FILL = """
import resource, signal, sys
from pathlib import Path
from launch.monitor import JsonLines
lines = JsonLines(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for step in range(100):
    lines.write({"step": step, "loss": 1.25})
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
lines.write({"step": 100})
"""


def test_a_full_disk_loses_lines_and_never_halves_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", FILL, str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps[-1] == 100 and steps[:-1] == list(range(len(steps) - 1))
    assert 10 < len(steps) < 60  # the disk was full
    assert done.stderr.count("warning") == 1 and "training goes on" in done.stderr


WANDB = """
import sys, time
from pathlib import Path
from launch.monitor import Monitor
monitor = Monitor(Path(sys.argv[1]), enabled=True, last_step=10)
monitor.start_wandb(Path(sys.argv[1]), mode="online", project="p", run_id="abc", config={"api_key": "hunter2secret"})
start = time.monotonic()
for step in range(3000):
    monitor.log({"step": step, "loss": 1.0, "load": [1.0, 2.0]})
print("logging took", time.monotonic() - start, flush=True)
monitor.close()
print("closing took", time.monotonic() - start, flush=True)
import os; os._exit(0)
"""


def run_wandb(tmp_path: Path, **env: str) -> tuple[float, float, str]:
    pytest.importorskip("wandb", reason="W&B is not installed")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", WANDB, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=100,
        env={**clean, "HOME": str(tmp_path), **env},
    )  # fmt: skip
    logging, closing = (float(line.split()[-1]) for line in done.stdout.splitlines() if "took" in line)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3000
    assert "hunter2secret" not in done.stdout + done.stderr
    return logging, closing, done.stderr


def test_wandb_without_a_key(tmp_path: Path) -> None:
    logging, closing, said = run_wandb(tmp_path)
    assert logging < 20 and closing < 60
    assert said.count("warning: W&B:") == 1 and "metrics.jsonl has everything" in said


def test_wandb_that_never_answers(tmp_path: Path) -> None:
    """The real client against a server that takes the connection and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        logging, closing, _ = run_wandb(tmp_path, WANDB_BASE_URL=address, WANDB_API_KEY="0" * 40)
        server.settimeout(0.1)
        server.accept()  # it did try
    assert logging < 20 and closing < 60


def test_wandb_that_is_down(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    logging, closing, _ = run_wandb(tmp_path, WANDB_BASE_URL=f"http://127.0.0.1:{port}", WANDB_API_KEY="0" * 40)
    assert logging < 20 and closing < 60


def test_wandb_offline_leaves_a_run_to_upload(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="W&B is not installed")
    program = WANDB.replace('mode="online"', 'mode="offline"').replace("3000", "5")
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True, capture_output=True, timeout=100)
    found = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(found) == 1 and found[0].stat().st_size > 200
    assert b"hunter2secret" not in found[0].read_bytes()


def test_secrets_are_redacted_everywhere() -> None:
    config = {
        "api_key": "x",
        "url": "https://me:pw@host/p",
        "args": ["--x", "s3://k:v@b"],
        "n": {"HF_TOKEN": "t"},
        "tokens": 5,
    }
    assert redact(config) == {
        "api_key": "[redacted]", "url": "https://[redacted]@host/p", "args": ["--x", "s3://[redacted]@b"],
        "n": {"HF_TOKEN": "[redacted]"}, "tokens": 5,
    }  # fmt: skip
