"""`launch/report.py` as a person calls it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from made_up_runs import CONFIG, Row, healthy_rows, write_run
from support import ROOT

from data.lock import FolderLock

STEPS = 100_000


def report(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/report.py", *(str(argument) for argument in arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


def test_the_page_lies_in_the_runs_folder(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "first")
    done = report(folder)
    assert done.returncode == 0 and str(folder / "report.html") in done.stdout and not done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "metrics.jsonl", "report.html"]


def test_several_runs_of_one_name_into_a_file_elsewhere(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / parent / "run") for parent in ("a", "b")]
    (tmp_path / "e.json").write_text('{"pass@1": 0.25}')
    output = tmp_path / "pages" / "both.html"
    done = report(*folders, "--output", output, "--evaluation", tmp_path / "e.json")
    assert done.returncode == 0, done.stderr
    page = output.read_text()
    assert all(str(folder) in page for folder in folders) and "<td>–</td><td>e.json</td><td>25.0%</td>" in page


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{}"], "is not a run's folder"),
        (["{}/nothing"], "is not a run's folder"),
        (["{}/run", "--output", "{}"], "is a folder; name a file"),
        (["{}/run", "--evaluation", "{}/run/config.json"], "is not a result of launch/evaluate.py"),
        *((["{}/run", "--follow", "--seconds", bad], "--seconds must be at least 1") for bad in ("0", "nan", "1e400")),
        (["{}/run", "--output", "/dev/null"], "/dev/null"),
        (["{}/run", "--output", "{}/run/metrics.jsonl"], "metrics.jsonl exists and is no page"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    write_run(tmp_path / "run")
    done = report(*(argument.format(tmp_path) for argument in arguments))
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_output_that_nobody_reads_is_no_traceback(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "launch/report.py", write_run(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "run" / "report.html").exists()


def test_follow_writes_anew_until_the_run_is_done(tmp_path: Path) -> None:
    rows = healthy_rows()
    folder = write_run(tmp_path / "run", rows[:100])
    command = [sys.executable, "launch/report.py", str(folder), "--follow", "--seconds", "1"]
    page = folder / "report.html"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as follower:
        deadline = time.monotonic() + 60
        while not page.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert '"follow":1.0' in page.read_text() and follower.poll() is None
        log(folder, rows[100:-2])  # the last step; its evaluation and its checkpoint are still to come
        written = {page.stat().st_mtime_ns}
        while len(written) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
            written.add(page.stat().st_mtime_ns)
        assert follower.poll() is None
        log(folder, rows[-2:])
        assert follower.wait(timeout=60) == 0
    text = page.read_text()
    assert '"follow":0' in text and "finished" in text and f"{rows[-2]['val_loss']:.4f}"[:5] in text


def test_ctrl_c_leaves_a_page_that_does_not_load_itself(tmp_path: Path) -> None:
    arguments = {**CONFIG["arguments"], "max_steps": 2000}
    folder = write_run(tmp_path / "run", healthy_rows(every=50), arguments=arguments)
    command = [sys.executable, "launch/report.py", str(folder), "--follow"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` has it ignored
    ) as follower:
        assert follower.stdout is not None and "wrote" in follower.stdout.readline()
        assert '"follow":30.0' in (folder / "report.html").read_text()
        follower.send_signal(signal.SIGINT)
        assert follower.wait(timeout=60) == 130
    assert '"follow":0' in (folder / "report.html").read_text()


def test_a_run_that_was_stopped_is_not_followed(tmp_path: Path) -> None:
    arguments = {**CONFIG["arguments"], "max_steps": 2000}
    folder = write_run(tmp_path / "run", healthy_rows(every=50), arguments=arguments)
    lock = FolderLock(folder)
    lock.take()
    lock.release()
    assert report(folder, "--follow").returncode == 0
    assert "not running" in (folder / "report.html").read_text()


def log(folder: Path, rows: list[Row]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_follow_waits_for_a_run_that_has_only_begun(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").rename(tmp_path / "later")
    (folder / ".lock").write_text("4711 host")
    command = [sys.executable, "launch/report.py", str(folder), "--follow"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as follower:
        assert follower.stderr is not None and "has logged nothing yet" in follower.stderr.readline()
        (tmp_path / "later").rename(folder / "metrics.jsonl")
        assert follower.wait(timeout=60) == 0
    assert "finished" in (folder / "report.html").read_text()


def test_a_start_that_never_came_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("4711 host")
    os.utime(tmp_path / ".lock", (0, 0))
    done = report(tmp_path, "--follow")
    assert done.returncode == 2 and "it has no metrics.jsonl" in done.stderr


def cpu_seconds(start: Callable[[], object]) -> float:
    """Of the child that it starts: this machine may be busy."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_hundred_thousand_steps_take_less_than_twice_what_json_needs_to_read_them(tmp_path: Path) -> None:
    """Of 24 layers, each step logged: some five seconds. The standard library takes seven for the rows alone, on any machine."""
    block = [json.dumps(row) for row in healthy_rows(1000, 1, layers=24) if "loss" in row]
    folder = write_run(tmp_path / "run", [], arguments={**CONFIG["arguments"], "max_steps": STEPS})
    with (folder / "metrics.jsonl").open("w") as file:
        for number in range(STEPS // 1000):
            file.writelines(f'{{"step": {number * 1000 + i}, {line.partition(", ")[2]}\n' for i, line in enumerate(block, 1))
    size = os.path.getsize(folder / "metrics.jsonl")
    seconds = cpu_seconds(lambda: report(folder, timeout=300))
    assert size > 200e6 and "100,000" in (folder / "report.html").read_text()
    code = "import json, sys\nfor line in open(sys.argv[1], 'rb'): json.loads(line)"
    plain = cpu_seconds(lambda: subprocess.run([sys.executable, "-c", code, str(folder / "metrics.jsonl")], check=True))
    assert seconds < 2 * plain
    print(f"{size / 1e6:.0f} MB in {seconds:.1f} s of CPU time, {plain:.1f} by json alone")
