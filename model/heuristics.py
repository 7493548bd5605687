"""Which way the products by expert go and how much of the loss at a time, by sizes alone: the planner asks too, without torch."""

from collections.abc import Iterable

#: The major compute capabilities of NVIDIA's for which PyTorch's `grouped_mm` is one kernel, in bf16. For any other it copies the
#: runs' ends to the host, which waits for them, and multiplies run by run: torch's `_grouped_mm_cuda` and `_grouped_mm_fallback`
#: (aten/src/ATen/native/cuda/GroupedBlas.cpp, ../GroupedMMUtils.h); pytorch #194227 has it so of sm110 in August 2026.
ONE_KERNEL = (9, 10)


def is_loop(major: int) -> bool:
    """Whether `grouped_mm` multiplies run by run on a GPU of NVIDIA's."""
    return major not in ONE_KERNEL


def fits_kernel(experts: int, widths: Iterable[int]) -> bool:
    """Whether `kernels/grouped.py` is for so many experts on a rank with weights so wide and high: several; sizes of which Triton
    knows that they are aligned, else it reads number by number and spills registers."""
    return experts > 1 and all(width % 16 == 0 for width in widths)


def joining_pays(experts: int, columns: int, rows: int) -> bool:
    """Whether one product with several weights, `columns` in all, moves less than one with each, their copy made at each call.

    A further product reads the rows once more in either direction and adds an input gradient in memory, six passes over them in
    all. Joining copies the weights twice and their gradients apart once, six passes over those.
    """
    return experts * columns < rows


#: A chunk's logits take 256 MiB at most: at V = 49,152 1,365 tokens in fp32, and 2,730 in bf16, in which a kernel leaves them.
CHUNK_BYTES = 256 * 2**20


def chunk_rows(vocabulary: int, hidden: int, logit_bytes: int) -> int:
    """Tokens that the fused loss (`loss.py`) takes through the head at a time.

    No more than 2 H: beyond that, adding a chunk's share to the weight's gradient [V, H] costs little beside its logits, and
    smaller is better for caches (on a CPU at H = 256, V = 4,096 in bf16, 512 tokens a chunk take half the time of 4,096).
    """
    return max(1, min(2 * hidden, CHUNK_BYTES // (logit_bytes * vocabulary)))
