"""The start templates, as far as one machine goes: torchrun with a restart, mpiexec, a hostfile, and Slurm's by a stub `srun`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support import ROOT, metrics

from launch.ranks.spawn import environment_of_no_rank, free_port

TEMPLATES = ROOT / "launch" / "templates"


@pytest.fixture
def flags(small_shards: Path, small_model: Path, tmp_path: Path) -> list[str]:
    flags = ["--data", small_shards, "--model", small_model, "--output", tmp_path / "run", "--sequence_length", 64]
    flags += ["--max_steps", 3, "--eval_interval", 0, "--wandb", "disabled", "--log_interval", 1]
    return [str(flag) for flag in flags]


def template(name: str, *flags: str, **env: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # A test that made an engine before, in this process, left it a rank of one.
    environment = {**environment_of_no_rank(), "PATH": path, "OMP_NUM_THREADS": "1", **env}
    command = ["bash", str(TEMPLATES / name), *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def trained(done: subprocess.CompletedProcess, tmp_path: Path, ranks: int = 2) -> None:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert f"{ranks} rank{'s' * (ranks != 1)}, expert parallel {ranks}" in done.stderr + done.stdout
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


def test_a_hostfile_that_is_not_there_is_refused(flags: list[str], tmp_path: Path) -> None:
    """The deepspeed command warns, and trains on this host alone."""
    done = template("hostfile.sh", *flags, HOSTFILE=str(tmp_path / "none"))
    assert done.returncode == 2 and f"no hostfile {tmp_path}/none; write one" in done.stderr and not (tmp_path / "run").exists()


def test_torchrun(flags: list[str], tmp_path: Path) -> None:
    trained(template("torchrun.sh", *flags, GPUS="2"), tmp_path)


def test_torchrun_starts_again_after_a_rank_was_killed(flags: list[str], tmp_path: Path) -> None:
    """Its own store kept the addresses of the ranks before: each start after the first ended, or waited for ever."""
    flags[flags.index("--max_steps") + 1] = "40"
    killed: list[int] = []

    def kill_a_rank() -> None:
        while not (tmp_path / "run" / "checkpoints" / "latest").exists():
            time.sleep(0.1)
        killed.append(min(ranks_of(tmp_path / "run")))
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_a_rank, daemon=True)
    thread.start()
    done = template("torchrun.sh", *flags, "--save_interval", "5", GPUS="2")
    assert done.returncode == 0 and killed, done.stderr[-3000:]
    assert "resuming from" in done.stderr and "finished at step 40" in done.stderr, done.stderr[-3000:]
    assert {row["step"] for row in metrics(tmp_path / "run") if "loss" in row} == set(range(1, 41))


def ranks_of(run: Path) -> list[int]:
    """The processes that train in this folder; a launcher has the script behind its own name."""
    words = {int(path.parent.name): path.read_bytes().split(b"\0") for path in Path("/proc").glob("[0-9]*/cmdline")}
    return [pid for pid, said in words.items() if os.fsencode(run) in said and b"launch/train.py" in said[1:3]]


SRUN = """#!/usr/bin/env bash
# What srun does here: one task, with Slurm's variables, and every signal that it gets passed on to the task.
echo "$@ on ${SRUN_CPUS_PER_TASK:-1} cores" >>"$STUB_LOG"
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0 "$@" &
task=$!
trap 'kill -USR1 $task' USR1
while kill -0 $task 2>/dev/null; do code=0; wait $task || code=$?; done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$STUB_LOG"
[ "$2" = hostnames ] && { echo localhost; seq -f 'node%.0f' 5000; }
[ "$2" = job ] && echo "JobId=7 PreemptEligibleTime=2026-11-30T11:29:58 PreemptTime=${STUB_PREEMPTED:-None}"
true
"""
SBATCH = """
# What Slurm does with a batch script: reads its #SBATCH lines, runs it, and sends the signal that they ask for, where they ask
# for it: `B:` to the batch shell alone, without it to the steps alone.
import re, signal, subprocess, sys, time
from pathlib import Path
script, log, metrics = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
asked = re.search(r"^#SBATCH --signal=(B:)?([A-Z0-9]+)@\\d+$", Path(script).read_text(), re.MULTILINE)
job = subprocess.Popen(["bash", script, *sys.argv[4:]], start_new_session=True)
deadline = time.monotonic() + 200
while not (metrics.exists() and '"loss"' in metrics.read_text()):
    assert job.poll() is None and time.monotonic() < deadline, "no step"
    time.sleep(0.05)
number = getattr(signal, "SIG" + asked[2])
children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
for pid in [job.pid] if asked[1] else map(int, children):
    subprocess.run(["kill", f"-{number}", str(pid)], check=True)
sys.exit(job.wait(200))
"""


@pytest.fixture
def slurm(flags: list[str], tmp_path: Path) -> tuple[list[str], dict[str, str], Path]:
    """Flags for the template, an environment with stubs of Slurm's commands, and the log of how they were called."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    data, output = flags[flags.index("--data") + 1], flags[flags.index("--output") + 1]
    rest = [f for f in flags if f not in ("--data", data, "--output", output)]
    log = tmp_path / "stub.log"
    environment = {"DATA": data, "OUTPUT": output, "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": "7", "STUB_LOG": str(log)}
    environment["PATH"] = f"{bin_folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment["SLURM_CPUS_PER_TASK"] = "8"
    environment["VENV"] = str(Path(sys.executable).parent.parent)
    return rest, environment, log


def test_slurm_a_run_that_finishes_is_not_queued_again(slurm: tuple, tmp_path: Path) -> None:
    rest, environment, log = slurm
    trained(template("slurm.sh", *rest, **environment, GPUS_PER_TASK="1"), tmp_path, ranks=1)  # its list has 5,001 hosts
    assert "--gpus-per-task=1 python launch/train.py" in log.read_text() and "requeue" not in log.read_text()
    assert " on 8 cores" in log.read_text()  # since 22.05 srun does not take over what sbatch was asked for


def test_slurm_the_signal_saves_and_queues_again(slurm: tuple, tmp_path: Path) -> None:
    rest, environment, log = slurm
    rest[rest.index("--max_steps") + 1] = "100000"
    sbatch = [sys.executable, "-c", SBATCH, str(TEMPLATES / "slurm.sh"), str(log), str(tmp_path / "run" / "metrics.jsonl"), *rest]
    done = subprocess.run(
        sbatch, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, timeout=400,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "stopped by SIGUSR1 at step" in done.stderr
    assert (tmp_path / "run" / "checkpoints" / "latest").exists()
    assert log.read_text().count("scontrol requeue 7") == 1
    assert "--gpus-per-task" not in log.read_text()


def test_slurm_a_job_that_another_took_the_nodes_from_is_queued_again(slurm: tuple) -> None:
    """Slurm had the ranks save, within the grace time, and takes a job that ends by then for finished."""
    rest, environment, log = slurm
    done = template("slurm.sh", *rest, **environment, STUB_PREEMPTED="2026-11-30T11:30:03")
    assert done.returncode == 0 and log.read_text().count("scontrol requeue 7") == 1, done.stderr[-2000:]


@pytest.mark.parametrize(
    "code, preempted, again", [(143, "2026-11-30T11:30:03", 1), (143, "None", 0), (1, "2026-11-30T11:30:03", 0)]
)
def test_slurm_what_ends_before_it_trains(code: int, preempted: str, again: int, slurm: tuple) -> None:
    """Ranks that Slurm asks while they join end with 143; a fault is none of its business."""
    rest, environment, log = slurm
    fake = f'#!/usr/bin/env bash\n[ "$1" = show ] || exit {code}\n'
    srun = Path(environment["PATH"].split(os.pathsep)[0]) / "srun"
    srun.write_text(fake)
    done = template("slurm.sh", *rest, **environment, STUB_PREEMPTED=preempted)
    assert done.returncode == code and log.read_text().count("scontrol requeue 7") == again


def test_slurm_a_crash_is_left_to_requeue(slurm: tuple, tmp_path: Path) -> None:
    rest, environment, log = slurm
    done = template("slurm.sh", *rest, "--epochs", "3", **environment)
    assert done.returncode == 2 and "unrecognized arguments" in done.stderr
    assert "requeue" not in log.read_text()
