"""Shards are cut where they are full."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.pipeline.writer import SplitWriter
from data.shards import read_index


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_a_shard_is_closed_by_the_document_that_fills_it(tmp_path: Path, batch: int) -> None:
    sizes = np.array([4, 3, 5, 20, 1, 1, 8, 2, 10, 1], np.int32)
    tokens = np.arange(sizes.sum(), dtype=np.uint16)
    ends = np.cumsum(sizes)
    writer = SplitWriter(tmp_path, "uint16", 10)
    for at in range(0, len(sizes), batch):
        upto = min(at + batch, len(sizes))
        part = tokens[ends[at] - sizes[at] : ends[upto - 1]]
        writer.add(part, sizes[at:upto], sizes[at:upto].astype(np.int64) * 3)
    writer.close_shard()
    assert [s["tokens"] for s in writer.shards] == [12, 20, 10, 12, 1]
    assert [s["text_bytes"] for s in writer.shards] == [36, 60, 30, 36, 3]
    written = b"".join((tmp_path / f"{s['name']}.bin").read_bytes() for s in writer.shards)
    assert written == tokens.tobytes()
    found = [read_index(tmp_path / f"{s['name']}.idx").sizes.tolist() for s in writer.shards]
    assert found == [[4, 3, 5], [20], [1, 1, 8], [2, 10], [1]]
