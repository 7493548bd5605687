"""Other bytes under the same names and sizes on one of the hosts are seen: by a sample always, by every checksum with --verify."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import OLD

from data.dataset import PackedDataset
from launch.run import shards_check

TOKENS = OLD / "tokens"


def opened(folder: Path) -> PackedDataset:
    return PackedDataset([folder], split="train", sequence_length=32)


@pytest.fixture
def swapped(tmp_path: Path) -> Path:
    """A copy whose shard has its halves swapped."""
    shutil.copytree(TOKENS, tmp_path / "tokens")
    [path] = (tmp_path / "tokens" / "train").glob("*.bin")
    content = path.read_bytes()
    path.write_bytes(content[len(content) // 2 :] + content[: len(content) // 2])
    assert path.stat().st_size == len(content) and path.read_bytes() != content
    return tmp_path / "tokens"


def test_a_copy_is_the_same_and_another_content_is_not(tmp_path: Path, swapped: Path) -> None:
    shutil.copytree(TOKENS, tmp_path / "copy")
    first, copy, other = opened(TOKENS), opened(tmp_path / "copy"), opened(swapped)
    assert first.fingerprint == other.fingerprint, "the manifests say the same"
    assert shards_check.sample_of_bytes(first) == shards_check.sample_of_bytes(copy)
    assert shards_check.sample_of_bytes(first) != shards_check.sample_of_bytes(other)


class Ranks:
    """Rank 1 of 2, whose rank 0 is on another host."""

    rank, size = 1, 2

    def __init__(self, place_of_rank_0: Any) -> None:
        self.other = place_of_rank_0

    def gather(self, value: Any) -> list[Any]:
        return [self.other, value]

    def run_everywhere(self, action: Callable[[], Any]) -> list[Any]:
        return [None, action()]


def test_each_copy_is_verified_by_one_of_its_ranks(swapped: Path) -> None:
    here, same_host = opened(swapped), Ranks(shards_check.place_of(opened(swapped)))
    shards_check.verify_everywhere(here, same_host, print)  # rank 0 does it, there
    verified: list[int] = []
    elsewhere = Ranks(("another host", shards_check.place_of(here)[1]))
    with pytest.raises(ValueError, match=r"host \S+: .*shard_000000"):
        shards_check.verify_everywhere(here, elsewhere, lambda: verified.append(1))
    assert len(verified) == sum(len(stream.shards) for stream in here.streams) + 1  # with the validation split's
    other_copy = Ranks(shards_check.place_of(opened(TOKENS)))  # on this host, but other files: a mount of its own
    with pytest.raises(ValueError, match=r"host \S+: .*shard_000000"):
        shards_check.verify_everywhere(here, other_copy, print)
