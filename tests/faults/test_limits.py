"""Limits of the system on a process (`ulimit`, a batch system's, a container's): a sentence or a save, never a traceback."""

from __future__ import annotations

import errno
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from nursery import ROOT
from runs import PAUSING, Site, assert_same, last_saved, lost_bytes, struck
from support import process_stat

from data.cli import as_user_error
from launch.ranks.join import MOST_OPEN_FILES, raise_open_files
from launch.run.folder import write_config


@contextmanager
def limited(what: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(what)
    resource.setrlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def test_too_few_open_files_are_said_before_anything_is_read() -> None:
    """At 24 PyTorch's store could not begin, at 40 a file was left half copied: a traceback each."""
    command = [sys.executable, "launch/train.py", "--data", "nowhere", "--output", "nowhere"]
    few = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40)),
        check=False,
    )
    struck("limit: open files")
    assert few.returncode == 2
    assert few.stderr == "error: this process may open 40 files and needs 64; raise the limit (ulimit -n)\n"


def test_a_soft_limit_of_open_files_is_raised() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with limited(resource.RLIMIT_NOFILE, 40):
        raise_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == (MOST_OPEN_FILES if hard == -1 else min(hard, MOST_OPEN_FILES))
    struck("limit: open files")


def test_a_tokenizer_that_cannot_be_copied_is_a_sentence(tmp_path: Path, small_shards: Path) -> None:
    """shutil.copytree's error is a text about errors, which nobody can take for a full disk."""
    run = tmp_path / "run"
    run.mkdir()
    with limited(resource.RLIMIT_FSIZE, 2000), pytest.raises(OSError, match="File too large") as raised:
        write_config(run, {}, small_shards / "tokenizer")
    struck("limit: size of a file")
    assert raised.value.errno == errno.EFBIG and "tokenizer.json" in str(as_user_error(raised.value))
    assert not (run / "tokenizer").exists() and not (run / "config.json").exists()
    write_config(run, {}, small_shards / "tokenizer")
    for file in (small_shards / "tokenizer").iterdir():
        assert (run / "tokenizer" / file.name).read_bytes() == file.read_bytes()


def test_cpu_time_that_runs_out_on_one_rank_saves(site: Site, whole: Path, tmp_path: Path) -> None:
    """The kernel's SIGXCPU killed the rank, and the steps since the last save were lost."""
    run = tmp_path / "run"
    running = site.start(run, script=PAUSING, pause_at="0/6/loading data")
    running.until_paused(0, " at step 6")
    pid = running.pids[1]
    fields = process_stat(pid)
    used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    resource.prlimit(pid, resource.RLIMIT_CPU, (max(math.floor(used), 1), resource.RLIM_INFINITY))
    running.signal(signal.SIGCONT, [0])
    assert running.wait() == [0, 0], running.text()[-3000:]
    struck("limit: CPU time of one rank", lost_bytes(run))
    assert "stopped by another rank at step" in running.text() and last_saved(run) != "step_12"
    site.finish(run)
    assert_same(run, whole)
