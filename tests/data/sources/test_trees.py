"""A file of a tree is a document; what is none is a reason, and a block can be the first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data.sources import blocks
from data.sources.blocks import Fault, Position
from data.sources.discover import find_sources
from data.sources.trees import read_file, tree_blocks


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    monkeypatch.setattr(blocks, "MAX_LINE_BYTES", 1000)


@pytest.mark.usefixtures("small")
def test_every_file_is_a_row_or_a_rejection_and_every_block_can_be_the_first(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i:02d}.py").write_bytes(b"x" * (7 * i))
    (tmp_path / "05.py").unlink()
    os.mkfifo(tmp_path / "05.py")
    (tmp_path / "12.py").write_bytes(b"y" * 1001)
    (source,) = find_sources([f"tree:{tmp_path}"])
    found = list(tree_blocks(source, Position()))
    assert len(found) > 5
    names = [Path(row.name).name for block in found for row in block.rows]
    assert names == [f"{i:02d}.py" for i in range(20) if i not in (5, 12)]
    kinds = {Path(r.name).name: r.kind for block in found for r in block.rejections}
    assert kinds == {"05.py": "not a regular file", "12.py": "file larger than 1000 bytes"}
    for i, block in enumerate(found):
        rest = [row for later in tree_blocks(source, block.after) for row in later.rows]
        assert rest == [row for later in found[i + 1 :] for row in later.rows]


def test_a_file_that_is_gone_is_a_reason(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"cannot be read.*No such file"):
        read_file(str(tmp_path / "gone.py"))
