"""Cross entropy of a chunk of logits: two reads, one write, the gradient in the logits' place.

Shapes: C tokens of a chunk, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Of a row's logits at once.
BLOCK = 4096


@triton.jit
def cross_entropy_kernel(
    logits, targets, scale, losses, vocabulary, z_weight, GRAD: tl.constexpr, IGNORE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    weight = tl.where(target == IGNORE, 0.0, tl.load(scale))
    at = logits + row * vocabulary
    # Before the sums: between here and the gradients, which other threads write in the logits' place, threads wait for each other.
    index = tl.where(target == IGNORE, 0, target)
    # A target past the vocabulary makes the loss no number; what lies there is another row's, or nobody's.
    logit = tl.load(at + index, mask=(index >= 0) & (index < vocabulary), other=float("nan")).to(tl.float32)
    high = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, vocabulary, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        value = tl.load(at + cols, mask=cols < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(high, value)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(high - base) + tl.exp(value - base)
        high = higher
    highest = tl.max(high, axis=0)
    lse = highest + tl.log(tl.sum(total * tl.exp(high - highest), axis=0))
    tl.store(losses + row, weight * (lse - logit + z_weight * lse * lse))
    if GRAD:
        factor = weight * (1 + 2 * z_weight * lse)
        for start in range(0, vocabulary, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            value = tl.load(at + cols, mask=cols < vocabulary, other=float("-inf")).to(tl.float32)
            grad = factor * tl.exp(value - lse) - tl.where(cols == target, weight, 0.0)
            tl.store(at + cols, grad.to(logits.dtype.element_ty), mask=cols < vocabulary)


def cross_entropy_(logits_CV: Tensor, targets_C: Tensor, scale: Tensor, z_weight: float, with_grad: bool, ignore: int) -> Tensor:
    """Each token's share of the loss, fp32 `[C]`; `logits` then holds the gradient, where one is wanted."""
    rows, vocabulary = logits_CV.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits_CV.device)
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    cross_entropy_kernel[(rows,)](
        logits_CV, targets_C, scale, losses, vocabulary, z_weight, GRAD=with_grad, IGNORE=ignore, BLOCK=block, num_warps=8
    )
    return losses
