"""For tests: stops (SIGSTOP) a rank when it comes to a place, so that a fault can strike it there.

`PAUSE_AT=RANK/STEP/PHASE` in the environment says where; the phase may be its beginning. `PAUSE_SETTLE`: seconds before, in which
what is being written in the background can end. As a script it is `launch/train.py`.
"""

from __future__ import annotations

import os
import signal
import time

from launch.cli import run_command
from launch.ranks.watchdog import Watchdog
from launch.train import main


def install() -> None:
    """Wrap what tells the watchdog where this rank is."""
    waiting, inner = os.environ.get("PAUSE_AT"), Watchdog.at

    def at(self: Watchdog, step: int, phase: str) -> None:
        nonlocal waiting
        inner(self, step, phase)
        if waiting is not None and f"{self.rank}/{step}/{phase}".startswith(waiting):
            waiting = None
            time.sleep(float(os.environ.get("PAUSE_SETTLE", "0")))
            os.write(2, f"rank {self.rank} pauses at step {step}, {phase}\n".encode())
            os.kill(os.getpid(), signal.SIGSTOP)

    Watchdog.at = at  # type: ignore[method-assign]


if __name__ == "__main__":
    install()
    run_command(main)
