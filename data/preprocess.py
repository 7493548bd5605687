"""Source code in, shards out:

    python data/preprocess.py --input 'corpus/*.json.gz' --tokenizer bigcode/starcoder2-15b --output shards/
    mpiexec -n 16 python data/preprocess.py ...     # rank 0 reads and writes, the others tokenize

One process reads, workers parse and tokenize, one process writes in document order: the bytes of the output do not depend on the
number of workers or ranks. Killed at any point, the same command goes on from the last durable state.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__" and not __package__:  # or a `data` on PYTHONPATH would come before ours
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.cli import ONE_THREAD, hold_standard_streams
from data.launchers import MPI_SIZES
from data.pipeline.arguments import parse
from data.terminal import exit_code, leave

if TYPE_CHECKING:
    from collections.abc import Mapping

    from data.pipeline.pool import Team

#: Of launchers that may not say how many ranks there are.
LAUNCHER_MARKS = ("MPI_LOCALNRANKS", "PMIX_RANK")
INTERRUPTED = "interrupted; run the same command again, it goes on from what is there"


def main(arguments: list[str]) -> int:
    """Returns the exit code (`data.cli.Exit`)."""
    hold_standard_streams()  # before MPI opens anything
    os.environ.update(ONE_THREAD)  # before numpy is loaded
    if not is_launched(os.environ):
        return lead(arguments)
    from data.pipeline import mpi

    return mpi.run(lambda team: lead(arguments, team))


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether there are other ranks, before MPI itself is loaded: without a launcher to talk to it would end the process.

    A shell that Slurm started has the marks of a rank too (`srun --pty bash`), and is one alone.
    """
    if sizes := [environment[name] for name in MPI_SIZES if name in environment]:
        return any(size != "1" for size in sizes)
    return any(name in environment for name in LAUNCHER_MARKS) and environment.get("SLURM_STEP_NUM_TASKS") != "1"


def lead(arguments: list[str], team: Team | None = None) -> int:
    """The one process that reads and writes; `team` are the MPI ranks that work for it."""
    return exit_code(lambda: work(arguments, team), interrupted=INTERRUPTED)


def work(arguments: list[str], team: Team | None = None) -> None:
    args = parse(arguments)
    from data.pipeline.job import run

    run(args, team)


if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the job goes on when its terminal is closed
    leave(main(sys.argv[1:]))
