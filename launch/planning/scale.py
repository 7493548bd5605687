"""The same job on 1 to 512 GPUs: what it reaches, and what breaks first. EP stays inside a node, data parallelism goes across."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from launch.planning.devices import Device
from launch.planning.job import Job, micro_batches
from launch.planning.search import Candidate, candidate

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
#: A share of the step from which a cost counts as what breaks the scaling.
TOO_MUCH = 0.25


@dataclass(frozen=True, kw_only=True)
class Point:
    """One number of GPUs. `breaks` is empty where nothing does."""

    gpus: int
    found: Candidate
    batch_grew: bool

    @property
    def breaks(self) -> str:
        job, limits = self.found.job, dict(self.found.time.limits)
        if not self.found.fits:
            return f"memory: {self.found.memory.total / 2**30:.0f} GiB"
        if self.batch_grew:
            return f"batch: needs {job.global_batch} sequences, one a GPU"
        for name in ("communication", "host"):
            if limits[name] > TOO_MUCH:
                return f"{name}: {limits[name]:.0%} of the step"
        return ""


def curve(job: Job, device: Device) -> list[Point]:
    """At the same global batch as long as every GPU gets a sequence; the micro-batch shrinks where it must."""
    return [_point(job, device, gpus) for gpus in COUNTS]


def _point(job: Job, device: Device, gpus: int) -> Point:
    in_node = min(gpus, device.gpus_per_node)
    share = job.global_batch // gpus if job.global_batch % gpus == 0 else 0
    micro_batch = max(micro_batches(share, job.micro_batch), default=1)
    scaled = dataclasses.replace(
        job,
        ranks=gpus,
        ranks_per_node=in_node,
        expert_ranks=math.gcd(job.expert_ranks, in_node),
        micro_batch=micro_batch,
        accumulation=max(1, share // micro_batch),
    )
    return Point(gpus=gpus, found=candidate(scaled, device), batch_grew=scaled.global_batch > job.global_batch)
