"""How far a step moves the weights: |update| / |weights| of each parameter group, from ZeRO's fp32 weights.

Around 1e-3 is usual under AdamW at its peak rate. Every rank holds another part of a group (ZeRO splits it over the ranks that
share its parameters, and experts live on different ranks), so the sums of squares of all ranks add up to the group's.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

CHUNK = 1 << 24  # numbers that are compared at a time: 64 MB, and twice that in float64


def fp32_weights(engine: DeepSpeedEngine) -> dict[str, list[Tensor]]:
    """This rank's fp32 weights by the name of their group; empty without ZeRO."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return {"all": list(optimizer.fp32_partitioned_groups_flat)}
    if isinstance(optimizer, BF16_Optimizer):  # ZeRO 1 in bf16
        partitions = optimizer.fp32_groups_flat_partition
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        partitions = optimizer.single_partition_of_fp32_groups
    else:
        return {}
    found: dict[str, list[Tensor]] = {}
    parts = zip(optimizer.optimizer.param_groups, partitions, strict=True)
    for number, (group, partition) in enumerate(parts):
        found.setdefault(str(group.get("name", f"group_{number}")), []).append(partition)
    return found


class UpdateRatio:
    """Made before an optimizer step; `measure` after it. Collective.

    The copy of the weights that it keeps in between lies on the host: a device that is nearly full has no room for it.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.engine = engine
        self.before = {name: [part.detach().to("cpu", copy=True) for part in parts] for name, parts in fp32_weights(engine).items()}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """By group, summed over all ranks; without the groups that are all zero."""
        names = sorted(self.before)
        if not names:
            return {}
        now = fp32_weights(self.engine)
        sums = torch.zeros(len(names), 2, dtype=torch.float64, device=self.engine.device)
        for row, name in zip(sums, names, strict=True):
            for old, new in zip(self.before[name], now[name], strict=True):
                for was, is_now in zip(old.flatten().split(CHUNK), new.detach().flatten().split(CHUNK), strict=True):
                    was = was.to(is_now.device)
                    row[0] += (is_now - was).double().square().sum()
                    row[1] += was.double().square().sum()
        dist.all_reduce(sums)
        return {name: math.sqrt(moved / size) for name, (moved, size) in zip(names, sums.tolist(), strict=True) if size}
