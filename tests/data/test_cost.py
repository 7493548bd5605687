"""Memory that does not grow with the input, and the benchmarks' own honesty: both sides do the same work."""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from pathlib import Path

import pytest
from data_helpers import command, environment, write_rows

from launch.benchmarks import data as data_benchmark
from launch.benchmarks import preprocess as preprocess_benchmark


def family(pid: int) -> list[int]:
    try:
        lists = [Path(f"/proc/{pid}/task/{task}/children").read_text() for task in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return [pid]
    children = [int(child) for found in lists for child in found.split()]
    return [pid, *(grandchild for child in children for grandchild in family(child))]


def proportional_mb(pid: int) -> float:
    """Memory of one process, pages shared with others counted in part."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def peak_mb(*arguments: object) -> float:
    process = subprocess.Popen(command(*arguments), env=environment(), stdout=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(map(proportional_mb, family(process.pid))))
        time.sleep(0.05)
    assert process.returncode == 0
    return peak


def test_memory_does_not_grow_with_the_input(tmp_path: Path, texts: list[str], tokenizer_file: Path) -> None:
    """10 and 80 MB with two workers: less than 1.5 GiB altogether, and the same but for noise."""
    path = write_rows(tmp_path / "x.json.gz", [{"content": t} for t in texts] * 25)
    assert sum(len(t.encode()) for t in texts) * 25 > 10e6
    for number in range(7):
        (tmp_path / f"x{number}.json.gz").hardlink_to(path)
    peaks = []
    for inputs in ([path], sorted(tmp_path.glob("*.gz"))):
        usual = ["--tokenizer", tokenizer_file, "--workers", 2, "--dedup", "none", "--shard_tokens", 2_000_000]
        peaks.append(peak_mb("--input", *inputs, *usual, "--output", tmp_path / f"out{len(peaks)}"))
    assert 100 < peaks[0] < 1536 and peaks[1] < 1536
    assert peaks[1] < peaks[0] + 80


def test_preprocess_benchmark_compares_identical_ids(
    corpus: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    preprocess_benchmark.add_arguments(parser)
    files = sorted(map(str, corpus.glob("*.gz")))
    result = preprocess_benchmark.run(parser.parse_args(["--input", *files, "--tokenizer", str(tokenizer_file)]))
    assert result["documents"] == 60 and result["ratio"] > 0
    assert "ids identical on every document" in capsys.readouterr().out


def test_data_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    data_benchmark.add_arguments(parser)
    shards = data_benchmark.make_shards(tmp_path / "small", 1, 1_000_000, sparse=False)
    result = data_benchmark.run(parser.parse_args(["--shards", str(shards), "--batches", "3", "--repeats", "1"]))
    assert result["ours_tokens_per_second"] > 0 and "datasets shuffled" in capsys.readouterr().out
