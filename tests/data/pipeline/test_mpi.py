"""The same job over MPI ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data_helpers import contents, environment, run, write_rows
from support import ROOT

from data.cli import UserError
from data.launchers import MPI_SIZES
from data.pipeline import mpi
from data.preprocess import is_launched
from data.terminal import drain


def mpiexec() -> str:
    found = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not found:
        pytest.skip("no mpiexec (pip install mpich)")
    return found


def test_a_fault_of_rank_0_is_every_rank_s() -> None:
    """They wait for its options, and for its exit code."""
    heard: list[Any] = []
    comm = SimpleNamespace(Get_size=lambda: 2, bcast=lambda value, root: heard.append(value))

    def fault(_: Any) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        mpi.lead(comm, fault)
    assert mpi.lead(comm, lambda _: 2) == 2 and heard == [None, 1, None, 2]


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
        ({"MV2_COMM_WORLD_SIZE": "2"}, True),  # mpirun_rsh: each rank would have done the job by itself
        ({"MV2_COMM_WORLD_SIZE": "1"}, False),
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


def test_ranks_that_mpi_does_not_join_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each would have begun the whole job, and the folder's lock ended all but one."""
    alone = SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=SimpleNamespace(Get_size=lambda: 1)))
    monkeypatch.setitem(sys.modules, "mpi4py", alone)
    for name in MPI_SIZES:
        monkeypatch.delenv(name, raising=False)
    assert mpi.run(lambda team: 7 if team is None else 1) == 7
    monkeypatch.setenv("MV2_COMM_WORLD_SIZE", "2")
    assert mpi.run(lambda team: 0) == 2
    drain()
    assert "the launcher started 2 ranks and MPI sees 1" in capsys.readouterr().err


class Comm:
    """Rank 1's, to which rank 0 has sent its options."""

    aborted: int | None = None

    def bcast(self, value: Any, root: int) -> Any:
        return object()

    def Get_rank(self) -> int:
        return 1

    def Abort(self, code: int) -> None:
        self.aborted = code
        raise SystemExit(code)


def test_a_rank_that_cannot_start_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: object) -> None:
        raise UserError("no tokenizer here")

    monkeypatch.setitem(sys.modules, "mpi4py.futures", SimpleNamespace(MPICommExecutor=None))  # the real one starts MPI here
    monkeypatch.setattr(mpi, "start_worker", fail)
    for name in ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "8")
    comm = Comm()
    with pytest.raises(SystemExit):
        mpi.serve(comm)
    assert comm.aborted == 2 and os.environ["RAYON_NUM_THREADS"] == "1"


def test_one_rank_works_by_itself() -> None:
    """A launcher's variables with one rank behind them."""
    mpiexec()
    code = "from data.pipeline import mpi; raise SystemExit(mpi.run(lambda team: 7 if team is None else 1))"
    environ = {**environment(), "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environ, cwd=ROOT, timeout=60).returncode == 7
