"""A Slurm of two nodes on this machine, by the real daemons. Needs root and Debian's packages `slurm-wlm` and `munge`."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from launch.ranks.spawn import free_port

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
NODES = ("node1", "node2")
#: Ranks find rank 0 by the name of its node: nodes, and what they start, have a file of hosts of their own.
WITH_HOSTS = 'mount --bind "$1" /etc/hosts && shift && exec "$@"'
CONF = """ClusterName=test
SlurmctldHost={host}
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=20
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports}] CPUs=16 RealMemory=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


def what_lacks() -> str | None:
    """Why there can be no cluster here; None where there can."""
    if os.geteuid():
        return "slurmd has to be root"
    missing = [name for name in ("munged", "slurmctld", "slurmd") if shutil.which(name, path=PATH) is None]
    return f"no {', '.join(missing)} (apt install slurm-wlm munge)" if missing else None


@dataclass
class Cluster:
    """`daemons`: processes by name, `munged`, `slurmctld` and the nodes."""

    folder: Path
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)

    def run(self, *command: object, **env: str) -> str:
        """Its standard output; an assertion where it fails."""
        done = subprocess.run(
            [str(part) for part in command], env={**os.environ, **env, **self.environment}, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}

    def start(self, name: str, *command: object) -> None:
        with (self.folder / f"{name}.out").open("wb") as log:
            words = [str(part) for part in command]
            self.daemons[name] = subprocess.Popen(words, env={**os.environ, **self.environment}, stdout=log, stderr=log)

    def start_node(self, name: str) -> None:
        (self.folder / f"spool_{name}").mkdir(exist_ok=True)
        hosts = self.folder / "hosts"
        hosts.write_text(Path("/etc/hosts").read_text() + "127.0.0.1 " + " ".join(NODES) + "\n")
        self.start(name, "unshare", "--mount", "sh", "-c", WITH_HOSTS, "sh", hosts, "slurmd", "-D", "-N", name)

    def lose_node(self, name: str) -> None:
        """As if its power were cut: its daemon, the daemons of its steps and all tasks of theirs, at once."""
        lost = [self.daemons[name].pid]
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"SLURMD_NODENAME={name}".encode() in (path / "environ").read_bytes().split(b"\0"):
                    lost += [int(path.name), int((path / "stat").read_text().rpartition(")")[2].split()[1])]
        for pid in lost:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.daemons[name].wait()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        return dict(part.split("=", 1) for part in self.run("scontrol", "show", "job", number).split() if "=" in part)

    def wait_for(self, number: str, found: Callable[[dict[str, str]], bool], seconds: float = 150) -> dict[str, str]:
        """The job once it is as `found` wants it."""
        deadline = time.monotonic() + seconds
        while not found(job := self.job(number)):
            assert time.monotonic() < deadline, job
            time.sleep(0.5)
        return job


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Started, with both nodes idle; ended with every job of it."""
    cluster, host = Cluster(folder), socket.gethostname().split(".")[0]
    ports = ",".join(str(free_port()) for _ in NODES)
    (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder, port=free_port(), ports=ports))
    (folder / "state").mkdir()
    (folder / "key").write_bytes(secrets.token_bytes(128))
    (folder / "key").chmod(0o600)
    files = {"socket": "munge.socket", "key-file": "key", "pid-file": "munge.pid", "seed-file": "seed", "log-file": "munge.log"}
    try:
        cluster.start("munged", "munged", "--foreground", "--force", *(f"--{flag}={folder / name}" for flag, name in files.items()))
        cluster.start("slurmctld", "slurmctld", "-D")
        for name in NODES:
            cluster.start_node(name)
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(AssertionError):  # it does not answer yet
                if cluster.run("sinfo", "--noheader", "--format=%t %D").split() == ["idle", str(len(NODES))]:
                    break
            assert time.monotonic() < deadline and cluster.daemons["slurmctld"].poll() is None, (
                folder / "slurmctld.out"
            ).read_text()
            time.sleep(0.5)
        yield cluster
    finally:
        with contextlib.suppress(AssertionError):
            cluster.run("scancel", "--signal=KILL", "--full", "--user=root")
            cluster.run("scancel", "--user=root")
            time.sleep(2)
        for daemon in reversed(cluster.daemons.values()):
            daemon.terminate()
            daemon.wait()
