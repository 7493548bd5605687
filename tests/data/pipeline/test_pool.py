"""Workers give the bytes of one process, and die with their job."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from data_helpers import command, contents, environment, run


@pytest.mark.parametrize("workers", [2, 3])
def test_bytes_do_not_depend_on_workers(expected: Path, flags: list[object], tmp_path: Path, workers: int) -> None:
    done = run(*flags, "--output", tmp_path / "out", "--workers", workers)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(expected)


def test_workers_die_with_a_killed_job_and_a_killed_worker_is_a_sentence(flags: list[object], tmp_path: Path) -> None:
    def children(pid: int) -> list[int]:
        found = []
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        return found

    def alive(pid: int) -> bool:
        status = Path(f"/proc/{pid}/stat")
        return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"

    for victim in ("job", "worker"):
        # A worker's start takes some 0.5 s: long enough to be found in it.
        process = subprocess.Popen(
            command(*flags, "--output", tmp_path / victim, "--workers", 2), env=environment(), stderr=subprocess.PIPE, text=True
        )
        while len(found := children(process.pid)) < 2 and process.poll() is None:
            time.sleep(0.01)
        assert len(found) >= 2
        os.kill(process.pid if victim == "job" else found[-1], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        deadline = time.monotonic() + 20
        while any(map(alive, found)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(alive, found))
        if victim == "worker":
            assert process.returncode == 2 and "a worker process was killed" in err and "Traceback" not in err


@pytest.mark.parametrize("workers", [1, 2])
def test_running_out_of_memory_is_a_sentence(workers: int, tmp_path: Path, corpus: Path, tokenizer_file: Path) -> None:
    script = (
        "import sys; from data import preprocess; from data.pipeline import worker\n"
        "def out_of_memory(*_): raise MemoryError\n"
        "worker.Worker.select = out_of_memory\n"
        "sys.exit(preprocess.main(sys.argv[1:]))\n"
    )
    line = command("--input", corpus, "--tokenizer", tokenizer_file, "--output", tmp_path / "out", "--workers", workers)
    done = subprocess.run([line[0], "-c", script, *line[2:]], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 2 and "not enough memory for a block of" in done.stderr and "Traceback" not in done.stderr
