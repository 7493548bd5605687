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
class ScalingPoint:
    """One number of GPUs. `breaks` is empty where nothing does."""

    gpus: int
    found: Candidate
    batch: int  # sequences of the job's global batch, which these GPUs may not be able to share out

    @property
    def breaks(self) -> str:
        job, limits = self.found.job, dict(self.found.time.limits)
        if not self.found.fits:
            return f"memory: {self.found.memory.total / 2**30:.0f} GiB"
        if job.global_batch != self.batch:
            return f"batch: needs {job.global_batch} sequences" + (
                ", one a GPU" if self.batch < self.gpus else f", not {self.batch}"
            )
        for name in ("communication", "host"):
            if limits[name] > TOO_MUCH:
                return f"{name}: {limits[name]:.0%} of the step"
        return ""


def curve(job: Job, device: Device) -> list[ScalingPoint]:
    """At the same global batch, or the nearest that every GPU gets as many sequences of; the micro-batch shrinks where it must."""
    # A job on several nodes says how many GPUs one has; one that fits into a node does not say that there are no more.
    in_node = job.ranks_per_node if job.ranks > job.ranks_per_node else max(device.gpus_per_node, job.ranks_per_node)
    return [_point(job, device, gpus, min(gpus, in_node)) for gpus in COUNTS]


def _point(job: Job, device: Device, gpus: int, in_node: int) -> ScalingPoint:
    share = max(1, round(job.global_batch / gpus))
    micro_batch = max(micro_batches(share, job.micro_batch_size))
    scaled = dataclasses.replace(
        job,
        ranks=gpus,
        ranks_per_node=in_node,
        ep_size=job.ep_size if gpus == job.ranks else math.gcd(job.ep_size, in_node),
        micro_batch_size=micro_batch,
        accumulation_steps=share // micro_batch,
    )
    return ScalingPoint(gpus=gpus, found=candidate(scaled, device), batch=job.global_batch)
