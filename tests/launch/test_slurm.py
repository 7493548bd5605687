"""`launch/templates/slurm.sh` under a real Slurm: two nodes of it on this machine, a rank on each."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, slurm_cluster, what_lacks
from support import ROOT, metrics

pytestmark = [pytest.mark.slow, pytest.mark.skipif(what_lacks() is not None, reason=str(what_lacks()))]

Submit = Callable[..., tuple[str, Path]]
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def submit(cluster: Cluster, small_shards: Path, small_model: Path, tmp_path: Path) -> Iterator[Submit]:
    """`submit(*flags of training, sbatch=[...])`: the job's number and the run's folder; the log is job.log beside it."""

    def submit(*flags: object, sbatch: tuple[str, ...] = ()) -> tuple[str, Path]:
        command = [
            "sbatch",
            "--parsable",
            f"--chdir={ROOT}",
            f"--output={tmp_path / 'job.log'}",
            "--nodes=2",
            "--ntasks-per-node=1",
        ]
        command += ["--gpus-per-node=0", "--cpus-per-task=1", *sbatch, str(ROOT / "launch" / "templates" / "slurm.sh")]
        command += ["--model", str(small_model), "--sequence_length", "64", "--eval_interval", "0", "--wandb", "disabled"]
        command += ["--deepspeed_config", "ds_configs/cpu_ep2_zero2.json", *(str(flag) for flag in flags)]
        env = {"DATA": str(small_shards), "OUTPUT": str(tmp_path / "run"), "VENV": str(Path(sys.executable).parent.parent)}
        return cluster.run(*command, **env, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1").strip(), tmp_path / "run"

    yield submit
    cluster.run("scancel", "--user=root")


def log_of(run: Path) -> str:
    return (run.parent / "job.log").read_text()


def test_a_run_that_ends_is_not_queued_again(cluster: Cluster, submit: Submit) -> None:
    number, run = submit("--max_steps", 3, "--log_interval", 1)
    job = cluster.wait_for(number, lambda job: job["JobState"] in ENDS)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("COMPLETED", "0", "0:0"), log_of(run)
    assert "2 ranks, expert parallel 2" in log_of(run) and [row["step"] for row in metrics(run) if "loss" in row] == [1, 2, 3]


def test_a_mistake_fails_the_job_with_its_sentence(cluster: Cluster, submit: Submit) -> None:
    number, run = submit("--max_stepz", 3)
    job = cluster.wait_for(number, lambda job: job["JobState"] in ENDS)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "2:0")
    assert "--max_stepz" in log_of(run)


def test_before_every_time_limit_it_saves_and_goes_on_in_another_turn(cluster: Cluster, submit: Submit) -> None:
    """Slurm sends the signal up to half a minute early, and has a job that is queued again wait for two."""
    number, run = submit("--max_steps", 1_000_000, sbatch=("--time=2", "--signal=B:USR1@30"))
    cluster.wait_for(number, lambda job: job["Restarts"] == "2" and job["JobState"] == "PENDING", 600)
    cluster.run("scancel", number)
    first, second = (int(step) for step in re.findall(r"stopped by SIGUSR1 at step (\d+)", log_of(run)))
    assert 0 < first < second and f"resuming from {run}/checkpoints/step_{first} " in log_of(run)


@pytest.mark.parametrize("trains", [True, False], ids=["while it trains", "while it starts"])
def test_a_job_that_another_takes_the_nodes_from_is_queued_again(trains: bool, cluster: Cluster, submit: Submit) -> None:
    """Slurm asks the ranks with SIGTERM, and took the job that ended within the grace time for finished."""
    number, run = submit("--max_steps", 1_000_000, sbatch=("--exclusive",))
    cluster.wait_for(number, lambda job: job["JobState"] == "RUNNING")
    metrics_file = run / "metrics.jsonl"
    cluster.wait_for(number, lambda _: not trains or (metrics_file.exists() and '"loss"' in metrics_file.read_text()))
    urgent = cluster.run(
        "sbatch", "--parsable", "--partition=urgent", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=true"
    )
    job = cluster.wait_for(number, lambda job: job["JobState"] in ("PENDING", *ENDS))
    assert (job["JobState"], job["Restarts"]) == ("PENDING", "1") and ("stopped by SIGTERM at step" in log_of(run)) >= trains
    cluster.wait_for(urgent.strip(), lambda job: job["JobState"] == "COMPLETED")
    cluster.wait_for(number, lambda _: ("resuming from" if trains else "step 1/1000000") in log_of(run), 300)
    cluster.run("scancel", number)
    cluster.wait_for(number, lambda job: job["JobState"] == "CANCELLED")


def test_a_lost_node_queues_the_job_again(cluster: Cluster, submit: Submit) -> None:
    number, run = submit("--max_steps", 1_000_000, "--save_interval", 20)
    cluster.wait_for(number, lambda _: "saved step_20" in log_of(run) if (run.parent / "job.log").exists() else False)
    cluster.lose_node("node2")
    cluster.wait_for(number, lambda job: job["Restarts"] == "1" and job["JobState"] == "PENDING")
    assert re.search(r"died without a word .*: rank 1 at step", log_of(run)), log_of(run)
    cluster.start_node("node2")
    cluster.wait_for(number, lambda _: re.search(r"resuming from .*/step_\d+0 ", log_of(run)) is not None, 300)
    cluster.run("scancel", number)
