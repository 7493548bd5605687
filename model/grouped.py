"""Products of rows that lie by expert, each run with its expert's matrix, and the gradient of those matrices.

Shapes: R rows, E experts, A and B any widths. `ends_E` holds the int32 ends of the runs.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .heuristics import fits_kernel, is_loop
from .operators import ops, usable


class Products(NamedTuple):
    """Somebody's kernels in the place of `product` and `outer`, with their arguments and results."""

    product: Callable[[Tensor, Tensor, Tensor], Tensor]
    outer: Callable[[Tensor, Tensor, Tensor], Tensor]


def has_kernel(x_RA: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether `kernels/grouped.py` is for these rows and weights: several experts on a GPU whose `grouped_mm` is a loop that
    waits for the device. It takes one weight `[E, B, A]`, or two of one size."""
    alike = len(weights) <= 2 and len({weight.shape for weight in weights}) == 1 and weights[0].dtype == x_RA.dtype
    experts, *widths = weights[0].shape
    return alike and fits_kernel(experts, widths) and usable(x_RA) and lacks_grouped_mm(x_RA.device)


def lacks_grouped_mm(device: torch.device) -> bool:
    """A GPU of NVIDIA's where it `is_loop`, asked so that dynamo knows the answer; under a name that whoever counts or tests can
    replace."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return is_loop(torch.cuda.get_device_properties(device.index).major)


def product(x_RA: Tensor, weight_EAB: Tensor, ends_E: Tensor) -> Tensor:
    """`[R, B]`, row by row the product with the matrix of the row's expert; a GPU's host is not asked how long the runs are."""
    if _wants_recurring_shapes(x_RA):
        return _recurring_product(x_RA, weight_EAB, ends_E)
    if weight_EAB.shape[0] == 1:
        return x_RA @ weight_EAB[0]
    if _is_untraceable(x_RA, weight_EAB.shape[2]):
        return ops.expert_product(x_RA, weight_EAB, ends_E)  # type: ignore[no-any-return]
    if _fits_grouped_mm(x_RA, weight_EAB.shape[2]):
        return F.grouped_mm(x_RA, weight_EAB, offs=ends_E)
    # The two are bit-equal on a CPU.
    return torch.cat([x_RA[a:b] @ weight for (a, b), weight in zip(_runs(ends_E), weight_EAB.unbind(), strict=True)])


def outer(dout_RB: Tensor, x_RA: Tensor, ends_E: Tensor) -> Tensor:
    """`[E, B, A]`, the weights' gradient: of each expert `dout^T x` over its run of rows."""
    if _wants_recurring_shapes(x_RA):
        return _recurring_outer(dout_RB, x_RA, ends_E)
    if ends_E.numel() == 1:
        return (dout_RB.mT @ x_RA).unsqueeze(0)
    if _is_untraceable(x_RA, dout_RB.shape[1]):
        return ops.expert_outer(dout_RB, x_RA, ends_E)  # type: ignore[no-any-return]
    if _fits_grouped_mm(x_RA, dout_RB.shape[1]):
        out_EBA = F.grouped_mm(dout_RB.mT, x_RA, offs=ends_E)
        return zero_idle(out_EBA, ends_E) if leaves_idle(x_RA.device) else out_EBA
    return torch.stack([dout_RB[a:b].mT @ x_RA[a:b] for a, b in _runs(ends_E)])


def _is_untraceable(x_RA: Tensor, columns: int) -> bool:
    """While `torch.compile` traces: its fake tensors have a `grouped_mm` in bf16 alone (torch 2.13), and nowhere a run's length."""
    return torch.compiler.is_compiling() and not (x_RA.dtype == torch.bfloat16 and _fits_grouped_mm(x_RA, columns))


@torch.library.custom_op("moe_gpt::expert_product", mutates_args=(), tags=torch.Tag.cudagraph_unsafe)
def _expert_product(x_RA: Tensor, weight_EAB: Tensor, ends_E: Tensor) -> Tensor:
    """`product` as one node of a graph."""
    return product(x_RA, weight_EAB, ends_E)


@_expert_product.register_fake
def _(x_RA: Tensor, weight_EAB: Tensor, ends_E: Tensor) -> Tensor:
    return x_RA.new_empty(x_RA.shape[0], weight_EAB.shape[2])


@torch.library.custom_op("moe_gpt::expert_outer", mutates_args=(), tags=torch.Tag.cudagraph_unsafe)
def _expert_outer(dout_RB: Tensor, x_RA: Tensor, ends_E: Tensor) -> Tensor:
    """`outer` as one node of a graph."""
    return outer(dout_RB, x_RA, ends_E)


@_expert_outer.register_fake
def _(dout_RB: Tensor, x_RA: Tensor, ends_E: Tensor) -> Tensor:
    return x_RA.new_empty(ends_E.shape[0], dout_RB.shape[1], x_RA.shape[1])


def leaves_idle(device: torch.device) -> bool:
    """Whether `grouped_mm` may leave of an expert without rows what lay in its memory: pytorch #172439 of sm100, open in November
    2026."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_properties(device.index).major == 10


def zero_idle(out_EBA: Tensor, ends_E: Tensor) -> Tensor:
    """In place, and the host does not learn which."""
    idle_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
    return out_EBA.masked_fill_(idle_E[:, None, None], 0)


def _runs(ends_E: Tensor) -> list[tuple[int, int]]:
    return list(pairwise([0, *ends_E.tolist()]))


def _fits_grouped_mm(x_RA: Tensor, columns: int) -> bool:
    """What `grouped_mm` takes: no float64, at least one row, both widths aligned to 16 bytes."""
    aligned = all(size * x_RA.element_size() % 16 == 0 for size in (x_RA.shape[1], columns))
    return aligned and x_RA.shape[0] > 0 and x_RA.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _wants_recurring_shapes(x_RA: Tensor) -> bool:
    """On a CPU oneDNN compiles half precision's products for each shape, 0.3 to 0.6 ms a time, and runs hardly ever have the
    length that others had: at 1,000 rows of 256 x 128 that is three times the product itself."""
    if type(x_RA) is not Tensor or torch.compiler.is_compiling():  # a fake one, whose runs have no length
        return False
    return x_RA.dtype in (torch.bfloat16, torch.float16) and x_RA.device.type == "cpu"


def recurring(rows: int) -> int:
    """The next of sixteen lengths from one power of two to the next, multiples of 8 below 128: at most 6 % more rows."""
    step = max(8, 1 << max(0, rows.bit_length() - 5))
    return -(-rows // step) * step


def _recurring_product(x_RA: Tensor, weight_EAB: Tensor, ends_E: Tensor) -> Tensor:
    out_RB = x_RA.new_empty(x_RA.shape[0], weight_EAB.shape[2])
    for (start, end), weight in zip(_runs(ends_E), weight_EAB.unbind(), strict=True):
        longer = slice(start, start + recurring(end - start))
        if longer.stop <= x_RA.shape[0]:
            torch.mm(x_RA[longer], weight, out=out_RB[longer])  # the next run's own results come over what is too much
        elif end > start:
            out_RB[start:end] = (_padded(x_RA[start:end]) @ weight)[: end - start]
    return out_RB


def _recurring_outer(dout_RB: Tensor, x_RA: Tensor, ends_E: Tensor) -> Tensor:
    out_EBA = x_RA.new_empty(ends_E.numel(), dout_RB.shape[1], x_RA.shape[1])
    for (start, end), out_BA in zip(_runs(ends_E), out_EBA.unbind(), strict=True):
        torch.mm(_padded(dout_RB[start:end]).mT, _padded(x_RA[start:end]), out=out_BA)
    return out_EBA


def _padded(x_RA: Tensor) -> Tensor:
    """With rows of 0 up to a recurring length."""
    return F.pad(x_RA, (0, 0, 0, recurring(x_RA.shape[0]) - x_RA.shape[0]))


#: This file's own.
OURS = Products(product, outer)
