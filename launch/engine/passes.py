"""Passes over memory that a step makes for nothing: pages that the kernel zeroes again, copies in other types."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from launch.toolchain import trains_on_gpu

#: glibc's names in malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
#: Elements of a gradient that are fp64 at a time: 8 MiB. Each is two parallel regions, whose threads wait for each other.
PIECE = 1 << 20


def after_engine(optimizer: Any) -> None:
    """Of ZeRO 1 and 2; the results stay the same."""
    if not isinstance(optimizer, DeepSpeedZeroOptimizer):
        return
    optimizer._add_to_grad_partition_buffer = _add
    if not trains_on_gpu():
        take_norms_in_pieces(optimizer)


def _add(total: torch.Tensor | None, gradient: torch.Tensor) -> None:
    """DeepSpeed's, which copies the gradient in fp32 before; a GPU's addition reads it as it is."""
    if total is not None:
        total.add_(gradient)


def keep_freed_memory() -> None:
    """On a CPU what is freed stays with this process. By default glibc returns each block of more than 32 MiB to the kernel, and
    gets the next one, which every step wants again, in pages that are zeroed one by one. Another allocator: nothing."""
    if trains_on_gpu():
        return
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def take_norms_in_pieces(optimizer: DeepSpeedZeroOptimizer) -> None:
    """DeepSpeed copies each gradient in fp64 to take its norm. In pieces the copy stays in a CPU's cache; their sum is the same."""
    whole = optimizer.get_grad_norm_direct

    def in_pieces(gradients: Iterable[torch.Tensor], params: Iterable[torch.Tensor], norm_type: float = 2) -> torch.Tensor:
        gradients = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))  # as DeepSpeed does
        pairs = [(piece, p) for g, p in zip(gradients, params, strict=False) for piece in g.flatten().split(PIECE)]
        norm: torch.Tensor = whole([piece for piece, _ in pairs], [p for _, p in pairs], norm_type)
        return norm

    optimizer.get_grad_norm_direct = in_pieces
