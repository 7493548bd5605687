"""Size of the update over the size of the weights, against norms over a group's joined parts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from launch.engine import update_ratio
from launch.engine.update_ratio import UpdateRatio, fp32_weights

pytestmark = pytest.mark.usefixtures("one_rank")


PARTITIONS = {DeepSpeedZeroOptimizer: "single_partition_of_fp32_groups", BF16_Optimizer: "fp32_groups_flat_partition"}


def engine(names: list[str], parts: list[torch.Tensor], kind: type = DeepSpeedZeroOptimizer) -> Any:
    optimizer = object.__new__(kind)
    optimizer.optimizer = SimpleNamespace(param_groups=[{"name": name} for name in names])
    setattr(optimizer, PARTITIONS[kind], parts)
    return SimpleNamespace(optimizer=optimizer, device=torch.device("cpu"))


@pytest.mark.parametrize("kind", PARTITIONS)
def test_ratios_by_group(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_ratio, "CHUNK", 7)  # parts are longer than a chunk
    torch.manual_seed(0)
    parts = [torch.randn(50), torch.randn(20), torch.randn(30), torch.zeros(4)]
    fake = engine(["decay", "no_decay", "decay", "empty"], parts, kind)
    before = [part.clone() for part in parts]
    ratio = UpdateRatio(fake)
    updates = [torch.randn_like(part) * 1e-3 for part in parts]
    for part, update in zip(parts, updates, strict=True):
        part.add_(update)  # in place, as an optimizer does: what was kept must be a copy
    found = ratio.measure()
    for name, numbers in (("decay", (0, 2)), ("no_decay", (1,))):
        moved, size = (torch.cat([tensors[i] for i in numbers]).norm() for tensors in (updates, before))
        assert found[name] == pytest.approx(float(moved / size), rel=1e-4)
    assert set(found) == {"decay", "no_decay"}


def test_groups_without_a_name_are_told_apart() -> None:
    fake = engine(["", ""], [torch.ones(3), torch.ones(2)])
    fake.optimizer.optimizer.param_groups = [{}, {}]
    assert [len(parts) for parts in fp32_weights(fake).values()] == [1, 1]


def test_all_ranks_parts_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank's part of the group, of size 1, stays where it is."""
    monkeypatch.setattr(update_ratio.dist, "all_reduce", lambda sums: sums.add_(torch.tensor([[0.0, 1.0]])))
    part = torch.ones(3)
    ratio = UpdateRatio(engine(["decay"], [part]))
    part += 1
    assert ratio.measure() == {"decay": pytest.approx((3 / 4) ** 0.5)}


def test_zero_3_has_one_group_of_all_parts() -> None:
    optimizer = object.__new__(DeepSpeedZeroOptimizer_Stage3)
    optimizer.fp32_partitioned_groups_flat = parts = [torch.ones(3), torch.full((2,), 2.0)]
    fake: Any = SimpleNamespace(optimizer=optimizer, device=torch.device("cpu"))
    ratio = UpdateRatio(fake)
    parts[1] += 1
    assert ratio.measure() == {"all": pytest.approx((2 / 11) ** 0.5)}


def test_without_zero_there_is_nothing_to_say() -> None:
    fake: Any = SimpleNamespace(optimizer=object(), device=torch.device("cpu"))
    assert fp32_weights(fake) == {} and UpdateRatio(fake).measure() == {}
