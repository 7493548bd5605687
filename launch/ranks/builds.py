"""Extensions compiled at a first start: none that nobody needs, and no endless wait for a builder that has died."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

#: After which a builder's lock that no process here holds open is nobody's.
STALE_SECONDS = 120.0


def compile_nothing() -> None:
    """Keep DeepSpeed from compiling its shared-memory operator at the first start of ranks on CPUs.

    The build fails without a compiler, a process killed meanwhile leaves a lock on which every later run hangs, and gloo reduces as
    fast (tiny: 5,000 tokens/s with either).
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def wait_for_builds(root: Path) -> None:
    """Wait while another process compiles an extension, and remove the lock that a killed one left.

    PyTorch's lock is a file that its owner creates and holds open. A process killed in the middle leaves it, and every later
    one waits for ever, without a word. One that no process here holds open is stale; the age spares a builder on another host
    that shares the folder.
    """
    for lock in root.glob("**/lock"):
        if _may_be_held(lock):
            print(f"waiting for {lock}, which another process may hold", file=sys.stderr, flush=True)
        while held := _may_be_held(lock):
            time.sleep(0.5)
        if held is not None:  # where it is gone, one that is there now is the next builder's
            print(f"removing {lock}: the process that compiled there is gone", file=sys.stderr, flush=True)
            lock.unlink(missing_ok=True)


def _may_be_held(lock: Path) -> bool | None:
    """None where it is gone."""
    try:
        age = time.time() - lock.stat().st_mtime  # below 0 where a clock was set back, or another host's is ahead
    except FileNotFoundError:
        return None
    return _is_open(lock) or abs(age) < STALE_SECONDS


def _is_open(path: Path) -> bool:
    """Does a process on this host have the file open? One of another user does not show, and counts as no."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(descriptor) == str(path.resolve()):
                return True
    return False
