"""The command as a person starts it: whoever listens, and whatever becomes of the terminal."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from data_helpers import command, contents, environment, run, write_rows


@pytest.fixture(scope="module")
def flags(corpus: Path, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Files that cannot be used make warnings."""
    folder = tmp_path_factory.mktemp("with_broken")
    for path in corpus.iterdir():
        shutil.copy2(path, folder)
    for number in range(30):
        (folder / f"empty{number}.jsonl").touch()
    return ["--input", folder, "--tokenizer", tokenizer_file, "--workers", 2]


@pytest.fixture(scope="module")
def undisturbed(flags: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    done = run(*flags, "--output", output)
    assert done.returncode == 0 and done.stderr.count("warning") == 20, done.stderr
    return output


@pytest.mark.parametrize("sink", ["a full pipe", "a pipe without a reader", "a full disk", "closed descriptors"])
def test_the_job_finishes_whoever_listens(sink: str, flags: list[object], undisturbed: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    line = command(*flags, "--output", tmp_path / "out")
    if sink == "a full pipe":
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
        os.write(write, bytes(4096))  # full before the job begins: its first word would wait for ever
    elif sink == "a pipe without a reader":
        os.close(read)
    elif sink == "a full disk":
        os.close(write)
        write = os.open("/dev/full", os.O_WRONLY)
    else:
        line = ["bash", "-c", 'exec "$@" >&- 2>&-', "bash", *line]
    process = subprocess.Popen(line, stdout=write, stderr=write, env=environment())
    os.close(write)
    assert process.wait(timeout=120) == 0
    assert contents(tmp_path / "out") == contents(undisturbed)
    if sink != "a pipe without a reader":
        os.close(read)


def test_a_closed_terminal_does_not_end_the_job(corpus: Path, texts: list[str], tokenizer_file: Path, tmp_path: Path) -> None:
    more = write_rows(tmp_path / "more.json.gz", [{"content": f"# {n}\n{text}"} for n in range(60) for text in texts])
    flags = ["--input", more, "--tokenizer", tokenizer_file, "--output", tmp_path / "out", "--workers", 2]
    process = subprocess.Popen(command(*flags), env=environment(), start_new_session=True, stdout=subprocess.DEVNULL)
    while not (tmp_path / "out" / "state.json").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGHUP)  # as the kernel does to all of a session
    assert process.wait(timeout=120) == 0 and (tmp_path / "out" / "manifest.json").exists()


def test_a_fault_of_ours_keeps_its_traceback(corpus: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from data import preprocess; from data.pipeline import job\n"
        "def broken(*_): raise KeyError('weights')\n"
        "job.Job.consume = broken\n"
        "sys.exit(preprocess.main(sys.argv[1:]))\n"
    )
    line = command("--input", corpus, "--tokenizer", tokenizer_file, "--output", tmp_path / "out")
    done = subprocess.run([line[0], "-c", script, *line[2:]], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 1 and "Traceback" in done.stderr and "KeyError: 'weights'" in done.stderr


def test_an_output_that_cannot_be_made_is_one_sentence(corpus: Path, tokenizer_file: Path) -> None:
    done = run("--input", corpus, "--tokenizer", tokenizer_file, "--output", tokenizer_file / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and f"{tokenizer_file}/out: Not a directory" in done.stderr


def test_an_output_name_that_is_too_long_is_one_sentence(corpus: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    done = run("--input", corpus, "--tokenizer", tokenizer_file, "--output", tmp_path / ("x" * 256))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "File name too long" in done.stderr
