"""SIGKILL at the n-th file operation of something that is done in a forked child."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from launch.checkpoint import publish
from launch.manifest import HashingFile


class KilledAt:
    """In a forked child: SIGKILL at the n-th operation on the run's folder (open, mkdir, rename, remove, write, fsync, ...)."""

    def __init__(self, folder: Path, moment: int) -> None:
        self.folder, self.moment, self.count = str(folder), moment, 0
        sys.addaudithook(self.audit)
        fsync, write, exchange = os.fsync, HashingFile.write, publish.exchange
        os.fsync = lambda descriptor: (self.tick(), fsync(descriptor))[1]
        HashingFile.write = lambda file, data: (self.tick(), write(file, data))[1]
        publish.exchange = lambda one, other: (self.tick(), exchange(one, other), self.tick())[1]

    def audit(self, event: str, arguments: tuple) -> None:
        if event.split(".")[0] in ("open", "os", "shutil") and self.folder in str(arguments[:2]):
            self.tick()

    def tick(self) -> None:
        if self.count == self.moment:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


def in_child(folder: Path, moment: int, action: Callable[[], object]) -> int | None:
    """The signal that ended the child, or None where it finished before that moment."""
    pid = os.fork()
    if pid == 0:
        try:
            KilledAt(folder, moment)
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
