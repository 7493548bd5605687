"""Next-token cross entropy fused with the output projection: no `[tokens, vocabulary]` tensor ever exists.

Shapes: T tokens, H hidden, V vocabulary, C tokens of one chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.utils.generic import maybe_autocast

from .heuristics import chunk_rows
from .operators import ops, usable

IGNORE = -100


def token_loss(
    x_TH: Tensor,
    head_VH: Tensor,
    targets_T: Tensor,
    num_items: Tensor | float | None = None,
    z_loss_weight: float = 0.0,
) -> Tensor:
    """Sum over the targets of `cross entropy + z_loss_weight * logsumexp^2`, over `num_items`; fp32 scalar.

    A target of -100 is none. `num_items` None divides by the number of targets, so the result is their mean; a
    global count makes micro-batches and ranks add up to the mean over the global batch.
    z-loss: PaLM, arXiv 2204.02311, section 5.
    """
    device = x_TH.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        narrow = torch.get_autocast_dtype(device)
        x_TH, head_VH = x_TH.to(narrow), head_VH.to(narrow)
    if num_items is None:
        num_items = (targets_T != IGNORE).sum().clamp(min=1)
    if not isinstance(num_items, Tensor):
        num_items = torch.full((), float(num_items), device=x_TH.device)  # a fill: a copy from the host would wait for it
    scale = num_items.to(x_TH.device, torch.promote_types(x_TH.dtype, torch.float32)).reciprocal()
    with_grad = torch.is_grad_enabled() and (x_TH.requires_grad or head_VH.requires_grad)
    with maybe_autocast(device, enabled=False):  # its products name their results, which have a dtype of their own
        loss: Tensor = FusedLoss.apply(x_TH, head_VH, targets_T, scale, z_loss_weight, with_grad)  # type: ignore[no-untyped-call]
    return loss


def loss_of_logits(logits_TV: Tensor, targets_T: Tensor, num_items: Tensor | float | None, z_loss_weight: float) -> Tensor:
    """`token_loss` where the logits are there already."""
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    kept_T = targets_T != IGNORE
    lse_T = logits_TV.logsumexp(dim=-1)
    loss_T = lse_T - logits_TV.gather(1, targets_T.where(kept_T, 0).unsqueeze(1)).squeeze(1) + z_loss_weight * lse_T.square()
    return (loss_T * kept_T).sum() / (kept_T.sum().clamp(min=1) if num_items is None else num_items)


class FusedLoss(torch.autograd.Function):
    """Computes the gradients in the forward, chunk by chunk, so the logits are made once and thrown away.

    The idea is Liger-Kernel's fused linear cross entropy (arXiv 2410.10989). Ours adds the z-loss, accumulates the
    weight's gradient in fp32, and is plain PyTorch, so it runs on any device. `torch.nn.functional.linear_cross_entropy`
    (2.13, chunked) has no z-loss.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, head_VH: Tensor, targets_T: Tensor, scale: Tensor, z_weight: float, with_grad: bool
    ) -> Tensor:
        # fp16 has no numbers as small as a softmax over the tokens of a step, and a loss scale comes only in the backward: there
        # the gradients are the sum's, and wait for both.
        waits = x_TH.dtype == torch.float16
        weight = torch.ones_like(scale) if waits else scale
        total = torch.zeros((), dtype=scale.dtype, device=x_TH.device)
        dx_TH = torch.empty_like(x_TH) if with_grad else None
        dhead_VH = torch.zeros(head_VH.shape, dtype=scale.dtype, device=x_TH.device) if with_grad else None
        logit = x_TH.element_size() if usable(x_TH) else scale.element_size()
        rows = chunk_rows(head_VH.shape[0], head_VH.shape[1], logit)
        for start in range(0, x_TH.shape[0], rows):
            chunk = slice(start, start + rows)
            loss, dlogits_CV = chunk_loss(x_TH[chunk], head_VH, targets_T[chunk], weight, z_weight, with_grad)
            total = total + loss  # torch 2.11's dynamo takes an input changed in place and returned for one without a gradient
            if dx_TH is not None and dhead_VH is not None and dlogits_CV is not None:
                torch.mm(dlogits_CV, head_VH, out=dx_TH[chunk])
                accumulate_outer(dhead_VH, dlogits_CV, x_TH[chunk])
            del dlogits_CV  # or the next chunk's would lie beside it
        if dhead_VH is not None:
            ctx.save_for_backward(dx_TH, dhead_VH if waits else dhead_VH.to(head_VH.dtype), scale if waits else None)
        return total * scale if waits else total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx_TH, dhead_VH, waiting = ctx.saved_tensors
        dloss = dloss if waiting is None else dloss * waiting
        # Out of place, so that a second backward over a retained graph is right as well.
        return dx_TH * dloss, (dhead_VH * dloss).to(dx_TH.dtype), None, None, None, None


def chunk_loss(
    x_CH: Tensor, head_VH: Tensor, targets_C: Tensor, scale: Tensor, z_weight: float, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """One chunk's share of the loss in fp32, and its gradient by the logits `[C, V]` in x's dtype."""
    logits_CV = F.linear(x_CH, head_VH)
    if usable(logits_CV):
        loss_C = ops.cross_entropy_(logits_CV, targets_C, scale, z_weight, with_grad, IGNORE)
        return loss_C.sum(), logits_CV if with_grad else None
    logits_CV = logits_CV.to(scale.dtype)
    kept_C = targets_C != IGNORE
    index_C1 = targets_C.where(kept_C, 0).unsqueeze(1)
    # In place from here on: a pass over [C, V] costs about as much as a fifth of its matrix product on a CPU.
    highest_C1 = logits_CV.amax(dim=1, keepdim=True)
    logit_C1 = logits_CV.sub_(highest_C1).gather(1, index_C1)
    exp_CV = logits_CV.exp_()
    sum_C1 = exp_CV.sum(dim=1, keepdim=True)
    loss_C1 = sum_C1.log() - logit_C1
    lse_C1 = sum_C1.log() + highest_C1
    if z_weight:
        loss_C1 = loss_C1 + z_weight * lse_C1.square()
    weight_C1 = kept_C.unsqueeze(1) * scale
    loss = (loss_C1 * weight_C1).sum()
    if not with_grad:
        return loss, None
    # d cross entropy = softmax - one hot; d lse^2 = 2 lse softmax
    softmax_weight_C1 = weight_C1 * (1 + 2 * z_weight * lse_C1) if z_weight else weight_C1
    dlogits_CV = exp_CV.mul_(softmax_weight_C1 / sum_C1).scatter_add_(1, index_C1, -weight_C1)
    return loss, dlogits_CV.to(x_CH.dtype)


def accumulate_outer(total_VH: Tensor, dlogits_CV: Tensor, x_CH: Tensor) -> None:
    """`total += dlogits^T x`, the sum in total's precision."""
    if total_VH.dtype == x_CH.dtype:
        total_VH.addmm_(dlogits_CV.T, x_CH)
    else:
        total_VH += dlogits_CV.T @ x_CH
