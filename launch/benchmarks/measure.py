"""What the model's benchmarks share: flags, time and peak memory of a call, and a small table."""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data.cli import sentence
from launch.benchmarks.op_count.live_bytes import LiveBytes
from launch.toolchain import default_device


def add_measuring_flags(parser: argparse.ArgumentParser, *, repeats: int, dtypes: Sequence[str] = ("bfloat16", "float32")) -> None:
    """The flags of whatever times calls; of one that computes in one type alone `dtypes` is empty."""
    parser.add_argument("--device", type=usable_device, default=default_device(), help="cpu, cuda or cuda:N")
    if dtypes:
        parser.add_argument("--dtype", default=dtypes[0], choices=dtypes, help="type of the numbers")
    parser.add_argument("--repeats", type=int, default=repeats, help="repetitions; the best one counts")


def usable_device(text: str) -> str:
    """For argparse: `text` where PyTorch computes on it here."""
    if text.split(":")[0] not in ("cpu", "cuda"):  # of no other are time and memory measured
        raise argparse.ArgumentTypeError(f"{text} is neither cpu nor cuda")
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # AssertionError: of a build without CUDA
        raise argparse.ArgumentTypeError(f"{text} cannot be used here: {sentence(error).split('. ')[0]}") from None
    return text


def settings_of(arguments: argparse.Namespace) -> dict[str, str]:
    """With what was measured, for the figures' file."""
    return {name: str(value) for name, value in vars(arguments).items()}


class PeakBytes(TorchDispatchMode):
    """`most` bytes held at once by tensors made inside it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._live = LiveBytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._live.follow(tensor)
        self.most = max(self.most, self._live.now)
        return out


def seconds_each(calls: Mapping[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Of each call the best of `repeats` after a warm-up. They take turns, so a busy machine is busy for all of them."""
    for call in calls.values():
        call()
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes that one call allocates beyond what was there before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before: int = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    peak = PeakBytes()
    with peak:
        call()
    return peak.most


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table aligned for a terminal; numbers to the right."""
    cells = [list(columns)] + [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    print(title)
    for row in cells:
        first, *rest = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        print("  ".join([first, *rest]))
    with contextlib.suppress(OSError):  # a closed pipe: the figures are still to be written
        if sys.stdout is not None:
            sys.stdout.flush()
