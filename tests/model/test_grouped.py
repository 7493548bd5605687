"""Half precision's products of an expert's rows on a CPU: the right ones, at lengths that come again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from model import grouped
from model.grouped import leaves_idle, outer, product, recurring, zero_idle


class Products(TorchDispatchMode):
    """The rows of each matrix product, which are the first dimension in `product` and the second in `outer`."""

    def __init__(self, dimension: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dimension, self.rows = dimension, list[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.startswith("mm."):
            self.rows.append(args[0].shape[self.dimension])
        return func(*args, **(kwargs or {}))


def test_idle_experts_have_a_gradient_of_zero() -> None:
    """Whatever a GPU's product leaves there."""
    gradient = torch.full((5, 2, 3), float("nan"))
    gradient[[1, 3]] = 1.0
    found = zero_idle(gradient, torch.tensor([0, 4, 4, 9, 9], dtype=torch.int32))
    assert found.sum(dim=(1, 2)).tolist() == [0, 6, 0, 6, 0]


def test_where_a_gpu_leaves_idle_experts_they_are_zeroed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "leaves_idle", lambda device: True)
    monkeypatch.setattr(grouped.F, "grouped_mm", lambda *_, **__: torch.full((2, 8, 4), torch.nan))
    found = outer(torch.randn(4, 8), torch.randn(4, 4), torch.tensor([0, 4], dtype=torch.int32))
    assert not found[0].any() and found[1].isnan().all()


@pytest.mark.parametrize(("major", "expected"), [(8, False), (9, False), (10, True), (12, False)])
def test_which_gpus_leave_idle_experts(major: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
    assert leaves_idle(torch.device("cuda", 0)) is expected and not leaves_idle(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", "7.0")  # AMD's numbers mean other GPUs
    assert not leaves_idle(torch.device("cuda", 0))


def test_lengths_that_recur() -> None:
    assert all(rows <= recurring(rows) <= max(rows + 7, rows * 17 / 16) for rows in range(10_000))
    assert len({recurring(rows) for rows in range(4096)}) < 100


@pytest.mark.parametrize("counts", [[300, 0, 141, 71], [0, 0, 3, 5], [0, 131, 0, 0], [0, 0, 0, 0], [517]])
def test_products_at_recurring_lengths(counts: list[int]) -> None:
    """Also of runs that end where no rows are left to fill up with, and of the gradient of experts without rows."""
    x, dout = torch.randn(sum(counts), 24).bfloat16(), torch.randn(sum(counts), 16).bfloat16()
    weight = torch.randn(len(counts), 24, 16).bfloat16()
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    with Products(0) as forward:
        out = product(x, weight, ends)
    with Products(1) as backward:
        gradient = outer(dout, x, ends)
    assert sum(forward.rows) >= sum(counts) and all(rows == recurring(rows) for rows in forward.rows + backward.rows)
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    torch.testing.assert_close(out.double(), torch.einsum("ra,rab->rb", x.double(), weight.double()[expert]), rtol=1e-2, atol=1e-2)
    for number, found in enumerate(gradient):
        mine = expert == number
        torch.testing.assert_close(found.double(), dout[mine].double().T @ x[mine].double(), rtol=1e-2, atol=1e-2)


def test_fake_rows_have_products_too() -> None:
    """As who counts or exports has them: how long their runs are nobody can say."""
    with FakeTensorMode():
        x, dout, weight = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((8, 16), (8, 24), (2, 16, 24)))
        ends = torch.empty(2, dtype=torch.int32)
        assert product(x, weight, ends).shape == (8, 24) and outer(dout, x, ends).shape == (2, 24, 16)


def test_rows_are_no_other_experts() -> None:
    """What is not finite stays with its expert, though products reach over its rows."""
    x, weight = torch.randn(60, 16).bfloat16(), torch.randn(3, 16, 8).bfloat16()
    x[20:41] = torch.nan
    ends = torch.tensor([20, 41, 60], dtype=torch.int32)
    out, gradient = product(x, weight, ends), outer(torch.randn(60, 8).bfloat16(), x, ends)
    assert out.isnan().all(dim=1).nonzero().flatten().tolist() == list(range(20, 41)) and not out[41:].isnan().any()
    assert [bool(of_expert.isnan().any()) for of_expert in gradient] == [False, True, False]
