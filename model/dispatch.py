"""The way of the rows through a mixture of experts: into expert order, through the experts' products, back to their tokens.

Each operation keeps for its backward what it cannot rebuild cheaply, and moves each row once. Where nobody wants a gradient it is
one plain function, else an autograd function around it; both take the kernels (`ops`) where those are `usable`.

    x_TH ── gather_beside ── grouped_linears ── swiglu ── grouped_linear ── combine ── out_TH
    weights_TK ── tally, without values ──────────┘                            │
        └──────── detached ────────────────────────────────────────────────────┘

    drow    <- combine: weight * dout; from there it goes back through the products
    dweight <- tally <- SwiGLU.backward: <hidden, dhidden> of each row, over its weight. Nothing of it comes from combine
    dx      <- gather_beside: the sum of a token's rows, and what came to x from the shared expert

Shapes: T tokens, H hidden, I expert width, E experts, K experts per token, R = T * K routed rows, A and B any widths.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .grouped import OURS, Products, has_kernel
from .heuristics import joining_pays
from .operators import ops, usable
from .rebuild import rebuildable


def expert_order(indices_TK: Tensor) -> tuple[Tensor, Tensor]:
    """`(sorted [R], inverse [R])`: row r holds assignment `sorted[r]` = t * K + k, assignment a lies at row `inverse[a]`."""
    sorted_R = indices_TK.flatten().argsort(stable=True)
    return sorted_R, invert(sorted_R)


def invert(sorted_R: Tensor) -> Tensor:
    """The inverse of a permutation."""
    return torch.empty_like(sorted_R).scatter_(0, sorted_R, torch.arange(sorted_R.numel(), device=sorted_R.device))


def gather_rows(x: Tensor, index_R: Tensor, inverse_R: Tensor, copies: int) -> Tensor:
    """`x[index // copies]` for a permutation `index` of the rows' copies; the gradient gathers by its inverse.

    Autograd's own backward of an index sums with a sort on CUDA and one row at a time on a CPU.
    """
    if not torch.is_grad_enabled():
        return gathered(x, index_R, inverse_R, copies)
    rows: Tensor = GatherRows.apply(x, index_R, inverse_R, copies)  # type: ignore[no-untyped-call]
    return rows


class GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index_R: Tensor, inverse_R: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.copies = copies
        return gathered(x, index_R, inverse_R, copies)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_R,) = ctx.saved_tensors
        if usable(dout):
            return ops.collect(dout, inverse_R, ctx.copies, None, None), None, None, None
        dx = dout.index_select(0, inverse_R)
        return dx.unflatten(0, (-1, ctx.copies)).sum(dim=1) if ctx.copies > 1 else dx, None, None, None


def gathered(x: Tensor, index_R: Tensor, inverse_R: Tensor, copies: int) -> Tensor:
    if usable(x):
        rows: Tensor = ops.spread(x, inverse_R, copies, None)
        return rows
    return x.index_select(0, index_R // copies if copies > 1 else index_R)


def gather_beside(x: Tensor, index_R: Tensor, inverse_R: Tensor, copies: int) -> tuple[Tensor, Tensor, Tensor]:
    """`gather_rows`, and x twice for others: on a GPU one pass then adds up all of x's gradient."""
    if usable(x):
        rows, first, second = GatherBeside.apply(x, index_R, inverse_R, copies)  # type: ignore[no-untyped-call]
    else:
        rows, first, second = gather_rows(x, index_R, inverse_R, copies), x, x
    return rebuildable(rows, partial(gathered, copies=copies), x, index_R, inverse_R), first, second


class GatherBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index_R: Tensor, inverse_R: Tensor, copies: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(inverse_R)
        ctx.copies = copies
        ctx.set_materialize_grads(False)
        return gathered(x, index_R, inverse_R, copies), x.view_as(x), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, drows: Tensor | None, first: Tensor | None, second: Tensor | None) -> tuple[Tensor | None, ...]:
        (inverse_R,) = ctx.saved_tensors
        if drows is None:
            beside = [x for x in (first, second) if x is not None]
            return sum(beside[1:], beside[0]) if beside else None, None, None, None
        return ops.collect(drows, inverse_R, ctx.copies, first, second), None, None, None


def tally(weights_TK: Tensor, inverse_R: Tensor) -> Tensor | None:
    """`[R]` without a value: by what `swiglu` gives it as its gradient, the weights have theirs, which `combine` does not give.

    What the loss sees of a row is `weight * W hidden`, so the weight's gradient is `<hidden, dhidden> / weight`. The hidden
    activations are there in the backward anyway; the experts' output, as wide as the model, need not be kept for it. arXiv
    2512.14080 has it so.
    """
    if not torch.is_grad_enabled() or not weights_TK.requires_grad:
        return None
    tally_R: Tensor = Tally.apply(weights_TK, inverse_R)  # type: ignore[no-untyped-call]
    return tally_R


class Tally(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(weights_TK, inverse_R)
        return weights_TK.new_empty(1).expand(inverse_R.shape[0])

    @staticmethod
    def backward(ctx: Any, products_R: Tensor) -> tuple[Tensor, None]:
        weights_TK, inverse_R = ctx.saved_tensors
        if usable(products_R):
            return ops.weight_gradient(products_R, inverse_R, weights_TK), None
        products_TK = products_R.index_select(0, inverse_R).view_as(weights_TK)
        # The score of an expert that has underflowed has no gradient either.
        return torch.where(weights_TK > 0, products_TK / weights_TK, 0), None


def swiglu(*gate_up: Tensor, tally_R: Tensor | None = None) -> Tensor:
    """`silu(gate) * up`, of packed `[R, 2I]` or of gate and up; keeps what it is given, and nothing that follows from it.

    The gradient of `tally_R` is `<hidden, dhidden>` of each row.
    """
    if not torch.is_grad_enabled():
        gate, up = _halves(gate_up)
        return F.silu(gate) * up
    hidden: Tensor = rebuildable(SwiGLU.apply(tally_R, *gate_up), _activated, *gate_up)  # type: ignore[no-untyped-call]
    return hidden


def _activated(*gate_up: Tensor) -> Tensor:
    if usable(gate_up[0]):
        return ops.swiglu(gate_up)  # type: ignore[no-any-return]
    gate, up = _halves(gate_up)
    return F.silu(gate) * up


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tally_R: Tensor | None, *gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(*gate_up)
        ctx.products = None if tally_R is None else tally_R.dtype
        return _activated(*gate_up)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once: a checkpoint recomputes for one answer
        if usable(dout):
            *gradients, products_R = ops.swiglu_backward(dout, saved, ctx.products is not None)
            return products_R if ctx.products is not None else None, *gradients
        gate, up = _halves(saved)
        if torch.compiler.is_compiling():  # which writes to no halves, and joins them in the same pass
            dgate, dup = torch.ops.aten.silu_backward(dout * up, gate), F.silu(gate) * dout
            gradients = [dgate, dup] if len(saved) == 2 else [torch.cat((dgate, dup), dim=-1)]
        else:
            gradients = [torch.empty_like(x) for x in saved]  # packed again, so that no pass joins them
            dgate, dup = _halves(tuple(gradients))
            torch.mul(F.silu(gate), dout, out=dup)
            torch.ops.aten.silu_backward.grad_input(dout * up, gate, grad_input=dgate)
        # <silu(gate) * up, dout> is <up, dup>
        return None if ctx.products is None else row_dots(up, dup, ctx.products), *gradients


def _halves(gate_up: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return gate_up if len(gate_up) == 2 else gate_up[0].chunk(2, dim=-1)


def grouped_linear(x_RA: Tensor, ends_E: Tensor, weight_EBA: Tensor) -> Tensor:
    """`[R, B]`: each expert's weight on its own run of rows.

    `ends_E` holds the int32 ends of the runs; the host is not asked for them. An expert without rows gets a gradient of 0.
    """
    (out_RB,) = grouped_linears(x_RA, ends_E, weight_EBA)
    return out_RB


def grouped_linears(x_RA: Tensor, ends_E: Tensor, *weights: Tensor, by: Products = OURS) -> tuple[Tensor, ...]:
    """`grouped_linear` of several weights `[E, Bi, A]`: what each makes of the rows, or all of it side by side in one tensor.

    Kept for the backward are the rows and the weights themselves, no copy of them; `by` says whose products are taken where our
    kernel has none.
    """
    if not torch.is_grad_enabled():
        return products(x_RA, ends_E, weights, by)
    out: tuple[Tensor, ...] = GroupedLinears.apply(x_RA, ends_E, by, *weights)  # type: ignore[no-untyped-call]
    return out


def products(x_RA: Tensor, ends_E: Tensor, weights: Sequence[Tensor], by: Products) -> tuple[Tensor, ...]:
    if has_kernel(x_RA, weights):
        return (ops.grouped_product(x_RA, ends_E, weights),)
    return tuple(by.product(x_RA, weight.mT, ends_E) for weight in joined(weights, x_RA.shape[0]))


class GroupedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RA: Tensor, ends_E: Tensor, by: Products, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_RA, ends_E, *weights)
        ctx.by = by
        return products(x_RA, ends_E, weights, by)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        x_RA, ends_E, *weights = ctx.saved_tensors
        if has_kernel(x_RA, weights):
            (dout_RB,) = douts
            dx_RA = ops.grouped_product_backward(dout_RB, ends_E, weights) if ctx.needs_input_grad[0] else None
            return dx_RA, None, None, *ops.grouped_weight_gradient(dout_RB, x_RA, ends_E, len(weights))
        whole = joined(weights, x_RA.shape[0])
        dx_RA = None
        if ctx.needs_input_grad[0]:
            first, *others = (ctx.by.product(dout, weight, ends_E) for dout, weight in zip(douts, whole, strict=True))
            dx_RA = first if not others else first.add_(others[0])
        dwhole = [ctx.by.outer(dout, x_RA, ends_E) for dout in douts]
        if len(whole) < len(weights):
            dwhole = list(dwhole[0].split([weight.shape[1] for weight in weights], dim=1))
        return dx_RA, None, None, *dwhole


def joined(weights: Sequence[Tensor], rows: int) -> list[Tensor]:
    """The weights as they multiply so many rows: several `[E, Bi, A]` as one `[E, sum of Bi, A]` on a GPU, where that moves less.

    A CPU has the rows in its cache. They cannot lie side by side for good: they are AutoEP's `w1` and `w3`, and another order in
    ZeRO's flat buffer would make the optimizer states of older checkpoints those of other weights.
    """
    experts, columns = weights[0].shape[0], sum(weight.shape[1] for weight in weights)
    pays = weights[0].device.type != "cpu" and len(weights) > 1 and joining_pays(experts, columns, rows)
    return [torch.cat(tuple(weights), dim=1)] if pays else list(weights)


def combine(
    out_RH: Tensor,
    sorted_R: Tensor,
    inverse_R: Tensor,
    weights_TK: Tensor,
    shared_TH: Tensor | None = None,
    residual_TH: Tensor | None = None,
) -> Tensor:
    """`residual + (sum over k of weight * row + shared)`, `[T, H]`: one sum in fp32, rounded once. The weights' gradient is not
    given here but by `tally`."""
    if not torch.is_grad_enabled():
        return combined(out_RH, inverse_R, weights_TK, shared_TH, residual_TH)
    total: Tensor = Combine.apply(out_RH, sorted_R, inverse_R, weights_TK.detach(), shared_TH, residual_TH)  # type: ignore[no-untyped-call]
    return total


def combined(out_RH: Tensor, inverse_R: Tensor, weights_TK: Tensor, shared_TH: Tensor | None, residual_TH: Tensor | None) -> Tensor:
    if usable(out_RH):
        return ops.combine(out_RH, inverse_R, weights_TK, shared_TH, residual_TH)  # type: ignore[no-any-return]
    sum_TH = weighted_sum(out_RH, inverse_R, weights_TK)
    if shared_TH is not None:
        sum_TH += shared_TH
    if residual_TH is not None:
        sum_TH += residual_TH
    return sum_TH.to(out_RH.dtype)


class Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        out_RH: Tensor,
        sorted_R: Tensor,
        inverse_R: Tensor,
        weights_TK: Tensor,
        shared_TH: Tensor | None,
        residual_TH: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(sorted_R, inverse_R, weights_TK)
        return combined(out_RH, inverse_R, weights_TK, shared_TH, residual_TH)

    @staticmethod
    def backward(ctx: Any, dout_TH: Tensor) -> tuple[Tensor | None, ...]:
        sorted_R, inverse_R, weights_TK = ctx.saved_tensors
        dshared, dresidual = (dout_TH if ctx.needs_input_grad[i] else None for i in (4, 5))
        top_k = weights_TK.shape[1]
        if usable(dout_TH):
            drow_RH = ops.spread(dout_TH, inverse_R, top_k, weights_TK)
        else:
            drow_RH = dout_TH.index_select(0, sorted_R // top_k)
            drow_RH = scale_rows(drow_RH, weights_TK.flatten().index_select(0, sorted_R))
        return drow_RH, None, None, None, dshared, dresidual


#: Rows of one pass of the plain sums below: their fp32 copies then stay in a CPU's cache.
CHUNK = 256


def weighted_sum(out_RH: Tensor, inverse_R: Tensor, weights_TK: Tensor) -> Tensor:
    """Of each token the weighted sum of its K rows, `[T, H]` in the weights' dtype."""
    tokens, top_k = weights_TK.shape
    inverse_TK = inverse_R.view(tokens, top_k)
    total = out_RH.new_empty((tokens, out_RH.shape[1]), dtype=torch.promote_types(out_RH.dtype, weights_TK.dtype))
    for rows in chunks(tokens, out_RH):
        out_CKH = out_RH.index_select(0, inverse_TK[rows].flatten()).unflatten(0, (-1, top_k))
        torch.sum(out_CKH * weights_TK[rows].unsqueeze(-1), dim=1, out=total[rows])
    return total


def row_dots(a_RH: Tensor, b_RH: Tensor, dtype: torch.dtype) -> Tensor:
    """`[R]` in `dtype`: of each row the product with its partner."""
    dots = a_RH.new_empty(a_RH.shape[0], dtype=dtype)
    for rows in chunks(a_RH.shape[0], a_RH):
        torch.sum(a_RH[rows].to(dtype) * b_RH[rows], dim=1, out=dots[rows])
    return dots


def scale_rows(x_RH: Tensor, scale_R: Tensor) -> Tensor:
    """`x * scale` in place, the product in the scale's precision."""
    for rows in chunks(x_RH.shape[0], x_RH):
        x_RH[rows] = x_RH[rows] * scale_R[rows].unsqueeze(1)
    return x_RH


def chunks(rows: int, like: Tensor) -> list[slice]:
    """The slices of a plain pass over `rows`; one on a GPU, where each is a kernel."""
    whole = like.device.type != "cpu" or torch.compiler.is_compiling()
    step = max(rows, 1) if whole else CHUNK
    return [slice(start, start + step) for start in range(0, rows, step)]
