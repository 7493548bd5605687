"""A step at full size that leaves nothing behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

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
