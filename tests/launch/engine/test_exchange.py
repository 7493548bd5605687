"""Rows are read when they have landed: the waits alone, where it is no matter of luck that one is missing. What is computed with
the rows is in `test_moe_layer.py`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from launch.engine import exchange
from launch.engine.exchange import Arrival, Departure, Exchange


class Late:
    """Rows that land when they are waited for: `all_to_all_single` to this rank itself."""

    def __init__(self) -> None:
        self.on_their_way: list[tuple[torch.Tensor, torch.Tensor]] = []

    def all_to_all_single(self, landing: torch.Tensor, rows: torch.Tensor, **_: object) -> SimpleNamespace:
        landing.fill_(torch.nan) if landing.is_floating_point() else landing.fill_(-1)
        self.on_their_way.append((landing, rows.clone()))
        return SimpleNamespace(wait=self.land)

    def land(self) -> None:
        for landing, rows in self.on_their_way:
            landing.copy_(rows)
        self.on_their_way.clear()


def test_rows_and_their_gradients_are_read_when_they_have_landed(monkeypatch: pytest.MonkeyPatch) -> None:
    late = Late()
    monkeypatch.setattr(exchange, "dist", late)
    rows_RH = torch.randn(5, 3, requires_grad=True)
    of_rows = Exchange(torch.tensor([[2, 3]]), group=None)
    of_rows.wait_for_counts()
    assert of_rows.sizes == ([5], [5])
    landing = Departure.apply(rows_RH, of_rows)
    assert late.on_their_way and landing.isnan().all(), "else nothing is late here"
    landed = Arrival.apply(landing, of_rows)
    assert torch.equal(landed, rows_RH) and not late.on_their_way
    weight = torch.randn(5, 3)
    (landed * weight).sum().backward()
    assert torch.equal(rows_RH.grad, weight) and not late.on_their_way
