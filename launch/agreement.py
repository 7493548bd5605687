"""All ranks act or all ranks refuse: small objects over a control group of their own.

The group is gloo even where training runs on NCCL. Saving and converting wait for disks, for minutes with a large model, and
an NCCL collective that waits that long is ended by its watchdog; on the training group an asynchronous save could also meet
a collective of the training loop. A rank that dies is noticed at once (the connection closes), whatever the timeout.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from launch.distributed import AgreedError

T = TypeVar("T")
TIMEOUT = timedelta(hours=12)
#: What can go wrong with files, configurations and DeepSpeed's checks of them. Anything else is a fault of the program.
EXPECTED = (ValueError, OSError, RuntimeError, AssertionError, KeyError)


class Agreement:
    """Collective to make. One process without a process group agrees with itself."""

    def __init__(self) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if self.size > 1 else None

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, by rank, on every rank."""
        if self._group is None:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values  # type: ignore[return-value]

    def on_all(self, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank; all get all results, or all raise `AgreedError` with the first error."""
        result, error = None, None
        try:
            result = action()
        except EXPECTED as caught:
            error = caught
        answers = self.gather((result, None if error is None else _sentence(error)))
        failed = {rank: text for rank, (_, text) in enumerate(answers) if text is not None}
        if failed:
            rank, text = min(failed.items())
            raise AgreedError(text if rank == 0 else f"rank {rank}: {text}") from error
        return [answer for answer, _ in answers]  # type: ignore[misc]

    def on_first(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 alone; all get its result or raise `AgreedError` with its error."""
        return self.on_all(lambda: action() if self.rank == 0 else None)[0]  # type: ignore[return-value]


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


class Background:
    """`action` in a thread of its own; `result` waits for its end and raises what it raised."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint")  # no daemon: an exit waits for the files
        self._thread.start()

    def _run(self) -> None:
        try:
            self._action()
        except Exception as error:  # handed to whoever asks for the result
            self._error = error

    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error
