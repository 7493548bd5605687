"""What a confined program may use."""

from __future__ import annotations

from dataclasses import dataclass

from data.cli import UserError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one program and all that it starts. Sizes in bytes, times in seconds.

    seconds: processor time of each process, which does not depend on what else the machine does; the time on the clock is at most
    twice that.
    memory: address space of each process, and resident memory of all of them together.
    processes: processes and threads, those of the sandbox itself (two or three) counted.
    """

    seconds: int = 10
    memory: int = 2 << 30
    processes: int = 24
    open_files: int = 64
    file_size: int = 16 << 20
    temporary_size: int = 64 << 20
    temporary_files: int = 10_000

    def __post_init__(self) -> None:
        for name in ("seconds", "memory", "processes", "open_files", "file_size", "temporary_size", "temporary_files"):
            if getattr(self, name) <= 0:
                raise UserError(f"the sandbox's {name} must be above 0, not {getattr(self, name)}")

    @property
    def wall_seconds(self) -> int:
        return 2 * self.seconds
