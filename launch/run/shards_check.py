"""The shards as each host has them: a manifest that is the same everywhere says nothing about the bytes below it.

Where the shards lie on the hosts' own disks, one of them may hold other bytes under the same names and sizes: it would train on
other data, and no loss would show it.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

from data.cli import UserError
from data.dataset import PackedDataset
from data.order import ceil_div
from data.shards import MANIFEST
from data.verify import verify
from launch.ranks.control_group import ControlGroup

#: Files that are sampled at most, evenly spaced over all of them, and blocks of each: some 64 MB, less than a second.
SAMPLED_FILES = 128
BLOCKS = 8
BLOCK_BYTES = 1 << 16


def sample_of_bytes(data: PackedDataset) -> str:
    """A hash of all files' names and sizes, and of blocks of them. Differs where a host's bytes do, unless by little."""
    paths = list(files_of(data))
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}:{path.stat().st_size}\n".encode())
    for path in paths[:: ceil_div(len(paths), SAMPLED_FILES)]:
        for block in _blocks(path):
            digest.update(block)
    return digest.hexdigest()


def files_of(data: PackedDataset) -> Iterable[Path]:
    """Every file that training may read, in an order that is the same on all hosts."""
    for stream in data.streams:
        yield stream.folder / MANIFEST
        for shard in stream.shards:
            for suffix in (".bin", ".idx"):
                yield (stream.folder / stream.split / shard["name"]).with_suffix(suffix)


def _blocks(path: Path) -> Iterable[bytes]:
    """The first, the last, and some evenly between."""
    last = max(0, path.stat().st_size - BLOCK_BYTES)
    with open(path, "rb") as file:
        for number in range(BLOCKS):
            file.seek(last * number // (BLOCKS - 1))
            yield file.read(BLOCK_BYTES)


def verify_everywhere(data: PackedDataset, ranks: ControlGroup, on_shard: Callable[[], None]) -> None:
    """Every checksum, count and token id, once for each copy of the shards that the ranks see. Collective.

    Raises AgreedError with the first fault and the host that has it.
    """
    mine = place_of(data)
    places = ranks.gather(mine)
    ranks.run_everywhere(lambda: verify_shards(data, on_shard) if places.index(mine) == ranks.rank else None)


def place_of(data: PackedDataset) -> tuple[str, str]:
    """The host, and which files of it: two ranks with the same place read the same bytes."""
    identities = ((found.st_dev, found.st_ino) for found in map(os.stat, files_of(data)))
    return socket.gethostname(), hashlib.sha256(repr(list(identities)).encode()).hexdigest()


def verify_shards(data: PackedDataset, on_shard: Callable[[], None]) -> None:
    """Raises UserError with the first fault. `on_shard` is called after each, for the watchdog."""
    workers = os.cpu_count() or 1
    faults = [fault for stream in data.streams for fault in verify(stream.folder, workers, on_shard)]
    if faults:
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise UserError(f"host {socket.gethostname()}: {faults[0]}{more}")
