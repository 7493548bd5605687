"""What a call of an operator of `model/operators.py` costs on a GPU beside reading its inputs and writing its outputs.

Shapes: R routed rows, E experts, A inputs, B outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from model.operators import POSITIONS, PROGRAMS, SHARES


def kernels_and_bytes(name: str, arguments: Sequence[Any], outputs: Sequence[Tensor]) -> tuple[int, int]:
    """`(kernels, bytes beside reading each input and writing each output once)` of a call."""
    fp32 = 4
    if name == "norm_rope_backward" and not arguments[4]:  # without weights nothing is summed, and neither q nor k is read
        return 1, -sum(x.numel() * x.element_size() for x in arguments[2:4])
    if name in ("norm_backward", "norm_rope_backward"):  # partial sums written and read
        return 2, 2 * fp32 * min(PROGRAMS, arguments[0].shape[0]) * outputs[-1].numel()
    if name == "route":  # and zeroed counts
        return 2, 0
    if name == "route_backward":  # dlogits written and read; x read again; partial sums
        logits, dweight = outputs[0].shape[0] * outputs[1].shape[0], outputs[1].numel()
        return 3, 2 * fp32 * logits + 2 * fp32 * SHARES * dweight
    if name == "add_lift_":  # the bins are written as well; they stay in the cache between a token's and the next
        return 1, arguments[0].numel() * arguments[0].element_size()
    if name == "sink_gradient":
        batch, length, heads, _ = arguments[0].shape
        return 2, 2 * fp32 * batch * -(-length // POSITIONS) * heads
    if name == "cross_entropy_":  # a second read and the write, of the gradient
        logits, with_grad = arguments[0], arguments[4]
        return 1, 2 * logits.numel() * logits.element_size() if with_grad else 0
    return 1, 0


def product_of(name: str, inputs: Sequence[Tensor]) -> tuple[int, int, int, int] | None:
    """Of a call that is a matrix product `(rows, contraction, columns, experts)`: twice the first three are its FLOPs."""
    if name == "grouped_weight_gradient":
        dout_RB, x_RA, ends_E = inputs
        return dout_RB.shape[1], x_RA.shape[0], x_RA.shape[1], ends_E.shape[0]
    if name in ("grouped_product", "grouped_product_backward"):
        rows, ends_E, *weights = inputs
        columns = sum(w.shape[1] for w in weights) if name == "grouped_product" else weights[0].shape[2]
        return rows.shape[0], rows.shape[1], columns, ends_E.shape[0]
    return None
