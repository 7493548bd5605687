"""Where there are no namespaces: a process beside the program that ends all of its descendants, also those that left its group."""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress

from launch.evaluation.sandbox.inside.system import PR_SET_CHILD_SUBREAPER, PR_SET_DUMPABLE, exit_code, prctl

ROUNDS = 1000  # of killing; each finds what was started during the one before
BLIND_SECONDS = 0.01  # until the next look where children are left that the last one did not find


def parents() -> dict[int, int]:
    """The parent of every process in /proc. Empty where there is no /proc."""
    found = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        with suppress(OSError, ValueError):  # no process, or one that has just ended
            number = int(name)
            with open(f"/proc/{number}/stat", "rb") as file:
                found[number] = int(file.read().rpartition(b")")[2].split()[1])
    return found


def kill_descendants() -> None:
    """Whoever is killed leaves its children to this process (it is their reaper), where the next round finds them.

    That none is left is the kernel's word: /proc cannot be read while no file can be opened.
    """
    for _ in range(ROUNDS):
        children = []
        with suppress(OSError):
            children = [process for process, parent in parents().items() if parent == os.getpid()]
        for child in children:
            with suppress(OSError):
                os.kill(child, signal.SIGKILL)
        for child in children:
            with suppress(OSError):
                os.waitpid(child, 0)
        if not children:
            try:
                os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            time.sleep(BLIND_SECONDS)


def watch(leash: int) -> None:
    """Returns in the program's process. The other one stays until that has ended or nobody holds the leash's other end."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_DUMPABLE, 0)  # it holds the judge's pipes too
    program = os.fork()
    if program == 0:
        os.setsid()
        os.close(leash)
        return
    ended = [os.pidfd_open(program)] if hasattr(os, "pidfd_open") else []
    ready, _, _ = select.select([leash, *ended], [], [])
    code = 0
    if set(ready) & set(ended):
        code = exit_code(os.waitpid(program, 0)[1])
    with suppress(OSError):
        os.killpg(program, signal.SIGKILL)  # all there is to do without a /proc
    kill_descendants()
    os._exit(code)
