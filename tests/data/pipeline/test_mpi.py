"""The same job over MPI ranks."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from data_helpers import contents, run, write_rows

from data.cli import drain
from data.pipeline import mpi
from data.preprocess import is_launched


def mpiexec() -> str:
    found = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not found:
        pytest.skip("no mpiexec (pip install mpich)")
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_do_not_depend_on_mpi_ranks(expected: Path, flags: list[object], tmp_path: Path, ranks: int) -> None:
    done = run(*flags, "--output", tmp_path / "out", prefix=(mpiexec(), "-n", str(ranks)))
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(expected)


def test_a_mistake_under_mpi_is_one_sentence_and_no_hang(tokenizer_file: Path, tmp_path: Path) -> None:
    done = run("--input", tmp_path / "no", "--output", tmp_path / "o", "--tokenizer", tokenizer_file, prefix=(mpiexec(), "-n", "2"))
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr


def test_an_error_in_the_middle_under_mpi_ends_all_ranks(tmp_path: Path, tokenizer_file: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"content": "a = 1\n"}, {"content": 5}])
    flags = ["--input", path, "--tokenizer", tokenizer_file, "--output", tmp_path / "out", "--on_error", "fail"]
    done = run(*flags, prefix=(mpiexec(), "-n", "3"))
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "x.jsonl line 2" in done.stderr


@pytest.mark.parametrize(
    ("environment", "launched"),
    [
        ({}, False),
        ({"PMI_SIZE": "4", "MPI_LOCALNRANKS": "1"}, True),  # one rank a host
        ({"PMI_SIZE": "1", "MPI_LOCALNRANKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "1"}, True),  # mpirun below srun --pty bash
        ({"PMIX_RANK": "0"}, True),
        ({"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
    ],
)
def test_one_process_alone_needs_no_mpi(environment: dict[str, str], launched: bool) -> None:
    """In Slurm's interactive shells each command ended in MPI_Init, `--help` too."""
    assert is_launched(environment) is launched


def test_mpi_that_cannot_be_loaded_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert mpi.run(lambda team: 0) == 2
    drain()
    assert "variables are set and MPI cannot be loaded" in capsys.readouterr().err
