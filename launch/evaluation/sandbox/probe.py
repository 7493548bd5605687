"""Which walls hold on this machine: tried, not assumed."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.cli import UserError
from launch.evaluation.sandbox.levels import Level, levels
from launch.evaluation.sandbox.limits import Limits
from launch.evaluation.sandbox.process import start

WALLS = ("files", "network", "processes", "memory", "environment")
ANSWER_SECONDS = 30.0
DEATH_SECONDS = 5.0  # after which a process that should be gone counts as alive


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """A level and which of WALLS hold there. reason: why stronger levels did not start."""

    level: Level
    holds: dict[str, bool]
    reason: str

    @property
    def complete(self) -> bool:
        return all(self.holds.values())

    def describe(self) -> dict[str, Any]:
        """For the result's JSON."""
        return {"level": self.level.name, **self.holds}


def find_isolation(asked: str = "auto", limits: Limits | None = None) -> Isolation:
    """The first level that starts here, with what holds there. Raises UserError if the one that was asked for does not."""
    reasons = []
    for level in levels(asked):
        try:
            holds = probe(level, limits or Limits())
        except OSError as error:
            reasons.append(f"{level.name}: {error}")
            continue
        return Isolation(level=level, holds=holds, reason="; ".join(reasons))
    raise UserError(f"no isolation called {asked} starts on this machine: {'; '.join(reasons) or 'it is not installed'}")


def probe(level: Level, limits: Limits) -> dict[str, bool]:
    """Each of WALLS: does it hold? Raises OSError if nothing can be started at this level."""
    with targets() as extra:
        extra |= {"most_processes": limits.processes, "most_memory": limits.memory, "caller": os.getpid()}
        read, write = os.pipe()
        os.set_blocking(read, False)
        confined = start(
            level,
            limits,
            role="probe",
            slot=os.getpid(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            descriptors=(write,),
            extra=extra,
        )
        os.close(write)
        try:
            found = answer(confined.process)
        finally:
            confined.end()
            died = all_closed(read)
            os.close(read)
    return {wall: bool(found[wall]) and (died or wall != "processes") for wall in WALLS}


def answer(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    try:
        output, errors = process.communicate(timeout=ANSWER_SECONDS)
        return dict(json.loads(output))
    except subprocess.TimeoutExpired:
        raise OSError(f"no answer within {ANSWER_SECONDS:.0f} seconds") from None
    except ValueError:
        lines = errors.decode(errors="replace").strip().splitlines()
        raise OSError(lines[-1] if lines else f"it ended with {process.returncode}") from None


@contextmanager
def targets() -> Iterator[dict[str, Any]]:
    """What the probe tries to reach: a file, a folder where everybody may write, sockets that listen or take datagrams."""
    name = f"\0sandbox-probe-{os.getpid()}"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="probe-")))
        folder.chmod(0o755)
        secret, opened, file = folder / "secret", folder / "open", folder / "socket"
        secret.write_text("read from the sandbox")
        opened.mkdir()
        opened.chmod(0o777)
        inet = stack.enter_context(socket.socket())
        inet.bind(("127.0.0.1", 0))
        inet.listen()
        with suppress(OSError):  # abstract names are Linux's alone
            unix = stack.enter_context(socket.socket(socket.AF_UNIX))
            unix.bind(name)
            unix.listen()
        with suppress(OSError):  # a path too long for a socket: it is not tried
            stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)).bind(str(file))
            file.chmod(0o777)
        yield {
            "secret_file": str(secret),
            "open_folder": str(opened),
            "port": inet.getsockname()[1],
            "abstract_name": name,
            "socket_file": str(file),
        }


def all_closed(pipe: int) -> bool:
    """Whether nobody is left who holds the other end open."""
    while select.select([pipe], [], [], DEATH_SECONDS)[0]:
        if not os.read(pipe, 4096):
            return True
    return False
