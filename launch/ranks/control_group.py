"""All ranks act or all ranks refuse: small objects over a process group of their own.

The group is gloo even where training runs on NCCL. Saving and converting wait for disks, for minutes with a large model, and
an NCCL collective that waits that long is ended by its watchdog; on the training group an asynchronous save could also meet
a collective of the training loop. A rank that dies is noticed at once (the connection closes), whatever the timeout.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Generic, TypeVar, cast

import torch.distributed as dist

from data.cli import as_user_error, sentence
from launch.cli import AgreedError, RankFailedError

T = TypeVar("T")
TIMEOUT = timedelta(hours=12)


class _Answer(Generic[T]):
    """What became of an action on one rank. The exception itself does not travel: it may not pickle, and has its frames here."""

    def __init__(self) -> None:
        self.result: T | None = None
        self.mistake = self.fault = ""
        self.error: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "error": None}


class ControlGroup:
    """Collective to make. One process without a process group agrees with itself."""

    def __init__(self) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if self.size > 1 else None

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, by rank, on every rank."""
        if self._group is None:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def run_everywhere(self, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank; all get all results, or all raise.

        Raises AgreedError on all ranks with the first user mistake. After a fault of the program the rank raises it as it is,
        traceback and all, and the others RankFailedError, which names that rank.
        """
        answer: _Answer[T] = _Answer()
        try:
            answer.result = action()
        except Exception as error:
            answer.error, mistake = error, as_user_error(error)
            answer.mistake = sentence(mistake) if mistake else ""
            answer.fault = "" if mistake else f"{type(error).__name__}: {sentence(error)}"
        answers = self.gather(answer)
        for rank, other in enumerate(answers):
            if other.fault:
                own = answer.error if answer.fault else None
                raise own or RankFailedError(f"rank {rank} failed: {other.fault}")
        for rank, other in enumerate(answers):
            if other.mistake:
                raise AgreedError(f"rank {rank}: {other.mistake}" if rank else other.mistake) from answer.error
        return cast("list[T]", [other.result for other in answers])

    def run_on_rank0(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 alone; all get its result or raise as `run_everywhere` does."""
        return cast("T", self.run_everywhere(lambda: action() if self.rank == 0 else None)[0])
