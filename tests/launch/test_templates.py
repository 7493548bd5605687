"""The start templates, as far as one machine goes: torchrun with a restart, mpiexec, a hostfile, and Slurm's by a stub `srun`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, metrics

from launch.distributed import free_port

TEMPLATES = ROOT / "launch" / "templates"


@pytest.fixture
def flags(small_shards: Path, small_model: Path, tmp_path: Path) -> list[str]:
    flags = ["--data", small_shards, "--model", small_model, "--output", tmp_path / "run", "--sequence_length", 64]
    flags += ["--max_steps", 3, "--eval_interval", 0, "--wandb", "disabled", "--log_interval", 1]
    return [str(flag) for flag in flags]


def template(name: str, *flags: str, **env: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **env}
    command = ["bash", str(TEMPLATES / name), *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def trained(done: subprocess.CompletedProcess, tmp_path: Path, ranks: int = 2) -> None:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert f"{ranks} ranks, expert parallel {ranks}" in done.stderr + done.stdout
    assert [row["step"] for row in metrics(tmp_path / "run") if "loss" in row] == [1, 2, 3]


@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.sh")), ids=lambda p: p.name)
def test_is_valid_bash(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert os.access(path, os.X_OK)


def test_mpiexec(flags: list[str], tmp_path: Path) -> None:
    trained(template("mpiexec.sh", *flags, RANKS="2"), tmp_path)


def test_hostfile_without_ssh(flags: list[str], tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    environment = {"HOSTFILE": str(hosts), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    trained(template("hostfile.sh", *flags, **environment), tmp_path)


def test_torchrun(flags: list[str], tmp_path: Path) -> None:
    trained(template("torchrun.sh", *flags, GPUS="2"), tmp_path)


SRUN = """#!/usr/bin/env bash
# What srun does here: one task, with Slurm's variables.
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0 exec "$@"
"""


def test_slurm_script_with_a_stub_srun(flags: list[str], tmp_path: Path) -> None:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/usr/bin/env bash\necho localhost\n")):
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    data, output = flags[flags.index("--data") + 1], flags[flags.index("--output") + 1]
    rest = [f for f in flags if f not in ("--data", data, "--output", output)]
    environment = {"DATA": data, "OUTPUT": output, "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": "7"}
    environment["PATH"] = f"{bin_folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment["VENV"] = str(Path(sys.executable).parent.parent)
    trained(template("slurm.sh", *rest, **environment), tmp_path, ranks=1)
