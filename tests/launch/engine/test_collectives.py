"""ZeRO 1 sums gradients once a step, ZeRO 2 at every micro-batch: counted on two ranks that share their experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nursery import Nursery

SMALL = 64  # bytes: flags and norms, not gradients


@pytest.mark.slow
def test_gradients_are_summed_once_a_step_under_zero_1(nursery: Nursery, tmp_path: Path) -> None:
    ranks = nursery.start(2, "tests/launch/engine/collectives_worker.py", tmp_path / "out.json", log=tmp_path / "log")
    assert ranks.wait(180) == [0, 0], ranks.text()[-4000:]
    found = json.loads((tmp_path / "out.json").read_text())
    reduced = {}
    for stage, (*micro_steps, weights) in found.items():
        sums = [sum(size for size in step.get("allreduce_", []) if size > SMALL) for step in micro_steps]
        assert len({len(step["alltoall_base_"]) for step in micro_steps}) == 1  # rows travel all the same
        reduced[stage] = [size / weights["held"][0] for size in sums]
    assert [round(share, 2) for share in reduced["1"]] == [0, 0, 1]
    assert [round(share, 2) for share in reduced["2"]] == [1, 1, 1]
