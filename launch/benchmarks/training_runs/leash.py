"""Run a command that does not outlive whoever started it, however that ends, nor do the processes that it starts.

python -m launch.benchmarks.training_runs.leash COMMAND ...

Standard input is the leash. A byte asks the command to save and stop, as Ctrl-C does; the end of the pipe says that the other side
is dead, and ends the command and its descendants at once. (A signal at the parent's death, PR_SET_PDEATHSIG, would reach the
`deepspeed` launcher and none of its ranks.)
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from data.terminal import say
from launch.evaluation.sandbox.inside.system import PR_SET_CHILD_SUBREAPER, prctl
from launch.evaluation.sandbox.inside.warden import kill_descendants


def run_leashed(command: list[str], log: Path) -> int:
    """The exit code; what is said is added to `log`. On Ctrl-C or SIGTERM the command saves and stops before this raises
    KeyboardInterrupt or SystemExit; on a second signal it is ended at once."""
    with log.open("ab") as out, raised_by_sigterm():
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "launch.benchmarks.training_runs.leash", *command],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            start_new_session=True,  # a terminal's Ctrl-C comes to it by the leash alone
        )
        assert process.stdin is not None
        try:
            return process.wait()
        except (KeyboardInterrupt, SystemExit):
            say("the training saves and stops; once more stops at once")
            with contextlib.suppress(BrokenPipeError):
                os.write(process.stdin.fileno(), b"s")
            process.wait()
            raise
        finally:
            process.stdin.close()
            process.wait()


@contextlib.contextmanager
def raised_by_sigterm() -> Iterator[None]:
    """SIGTERM is a SystemExit with its exit code in the block; before and after it is what it was."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(command: list[str]) -> int:
    """What `run_leashed` starts."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # the ranks of a launcher that is gone become children of this process
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    asked = threading.Event()
    threading.Thread(target=_hold, args=(child.pid, asked), daemon=True).start()
    code = child.wait()
    with contextlib.suppress(ChildProcessError):
        while asked.is_set():  # DeepSpeed's launcher does not wait for the ranks, which save
            os.wait()
    return code if code >= 0 else 128 - code


def _hold(group: int, asked: threading.Event) -> None:
    while os.read(0, 1):
        asked.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGINT)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    kill_descendants()
    os._exit(128 + signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
