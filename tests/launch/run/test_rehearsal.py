"""A step at full size that leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch.cli import AgreedError
from launch.ranks.control_group import ControlGroup
from launch.run import rehearsal


def test_a_rehearsal_leaves_no_count_no_draw_and_no_loss_scale() -> None:
    """fp16's scale counts steps without an overflow: with one more it would grow a step early."""
    scaler = SimpleNamespace(cur_scale=2.0**16, cur_iter=5, last_overflow_iter=-1)
    counters = dict.fromkeys(rehearsal.ENGINE_COUNTERS, 3)
    engine = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler), **counters)
    health = SimpleNamespace(data_seconds=0.25)
    trainer: Any = SimpleNamespace(engine=engine, balancer=SimpleNamespace(reset=lambda: None), health=health)
    before, drawn = dict(vars(scaler)), torch.get_rng_state()
    with rehearsal._without_trace(trainer):
        scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = 2.0**15, 6, 5
        vars(engine).update(dict.fromkeys(rehearsal.ENGINE_COUNTERS, 4))
        torch.rand(3)
        health.data_seconds = 30.0
    assert health.data_seconds == 0.25, "the first row's, of the first steps alone"
    assert vars(scaler) == before and all(getattr(engine, name) == 3 for name in counters)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_room_is_asked_for_where_the_checkpoints_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`checkpoints` may be a link to another disk."""
    asked: list[Path] = []
    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda path: (asked.append(path), SimpleNamespace(free=10))[1])
    monkeypatch.setattr(rehearsal, "state_bytes", lambda _: 11)
    folder = tmp_path / "checkpoints"
    saving = SimpleNamespace(checkpoints=SimpleNamespace(folder=SimpleNamespace(path=folder)))
    trainer: Any = SimpleNamespace(engine=None, arguments=SimpleNamespace(output=tmp_path), saving=saving)
    for place in (tmp_path, folder):
        with pytest.raises(AgreedError, match=f"a checkpoint takes about 0.0 MB and {place} has"):
            rehearsal.check_space(trainer, ControlGroup())
        folder.mkdir(exist_ok=True)
    assert asked == [tmp_path, folder]
