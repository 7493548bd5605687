"""What the probe tries from within: each line that succeeds is a wall that does not hold. Harmless where it succeeds."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

ORPHAN_SECONDS = 20.0  # that a process of the probe lives which nobody ends


def succeeds(action: Callable[[], object]) -> bool:
    try:
        action()
    except (OSError, MemoryError, AttributeError):  # AttributeError: what this system lacks
        return False
    return True


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(4096)


def write(path: str) -> None:
    with open(path, "x") as file:
        file.write("written from the sandbox")


def change(path: str) -> None:
    """Mode, times and length. Judged by the file's state afterwards: a call that did nothing may say that it did."""
    before = os.stat(path)
    with suppress(OSError):
        os.chmod(path, before.st_mode ^ 0o100)
    with suppress(OSError):
        os.utime(path, (1, 1))
    with suppress(OSError):
        os.truncate(path, before.st_size + 1)
    after = os.stat(path)
    if (after.st_mode, after.st_mtime, after.st_size) == (before.st_mode, before.st_mtime, before.st_size):
        raise PermissionError(path)


def connect(family: int, address: Any) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        connection.connect(address)


def send(socket_file: str) -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other:
        one.sendto(b"sent from the sandbox", socket_file)


def files(config: dict[str, Any]) -> bool:
    """The host's files can be neither read, written nor changed in mode, times and length; a folder of one's own can be."""
    secret = config["secret_file"]
    outside = [os.path.join(config["open_folder"], "written"), "/written", "/dev/shm/written", "/usr/written"]
    reached = any(succeeds(partial(action, secret)) for action in (read, change))
    reached |= any(succeeds(partial(write, path)) for path in outside)
    return not reached and succeeds(lambda: write(os.path.join(config["folder"], "own")))


def network(config: dict[str, Any]) -> bool:
    return not (
        succeeds(lambda: connect(socket.AF_INET, ("127.0.0.1", config["port"])))
        or succeeds(lambda: connect(socket.AF_UNIX, config["abstract_name"]))
        or succeeds(lambda: send(config["socket_file"]))
    )


def fork_many(most: int) -> int:
    """How many children can live at once, up to `most`; all are gone afterwards."""
    children: list[int] = []
    with suppress(OSError):
        while len(children) < most:
            child = os.fork()
            if child == 0:
                time.sleep(ORPHAN_SECONDS)
                os._exit(0)
            children.append(child)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return len(children)


def leave_orphan(descriptor: int) -> None:
    """A process of another session that holds `descriptor` open for as long as it lives."""
    child = os.fork()
    if child == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(descriptor, b"alive")
            time.sleep(ORPHAN_SECONDS)
        os._exit(0)
    os.waitpid(child, 0)


def processes(config: dict[str, Any]) -> bool:
    """Others can be neither signalled nor limited, and there cannot be many of one's own.

    (The caller sees whether the orphan dies.)
    """
    most, caller = config["most_processes"], config["caller"]
    reached = succeeds(lambda: os.kill(caller, 0)) or succeeds(lambda: resource.prlimit(caller, resource.RLIMIT_NOFILE))
    return not reached and fork_many(most + 1) <= most


def memory(config: dict[str, Any]) -> bool:
    return not succeeds(lambda: bytearray(config["most_memory"] + (64 << 20)))


def seen_processes() -> list[int]:
    with suppress(OSError):
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return []


def environment(config: dict[str, Any]) -> bool:
    """Neither this process has variables nor any that can be looked into (PWD aside, which bubblewrap sets)."""
    shown = ["/proc/self/environ", *(f"/proc/{number}/environ" for number in seen_processes())]
    texts = [read(path) for path in shown if succeeds(partial(read, path))]
    variables = [variable for text in texts for variable in text.split(b"\0") if variable and not variable.startswith(b"PWD=")]
    return not variables and not os.environ


def main(config: dict[str, Any]) -> None:
    found = {attempt.__name__: attempt(config) for attempt in (files, network, processes, memory, environment)}
    leave_orphan(config["descriptors"][0])
    os.write(1, json.dumps({**found, "user": os.getuid()}).encode())
