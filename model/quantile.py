"""Quantile balancing: the correction bias that would have sent each expert its share of a step's tokens.

A token's `bias_lift` d of an expert is by how much that expert's bias would have to rise to be level with the best that the token
leaves out; below 0 it is chosen. So bias + (the k/E quantile of d over the step's tokens) is the bias with which a share k/E of
them chooses the expert (Su, kexue.fm/archives/11619; Kimi K3, section 2.3.3 and appendix D). The tokens of all ranks and
micro-batches meet in a histogram, whose counts add up exactly, in any order.

**Groups.** A token chooses an expert if two things hold: the expert's biased score x is above the cutoff, the (k+1)-th within the
chosen groups, and its group's score is above that of the best group left out. The group's score is a sum of two biased scores: if
all biases of a group rise by d, x rises by d and the group's score by 2 d. So expert and group both pass from

    d = max(cutoff - x, (score of the best group left out - score of the expert's group) / 2)

on. Where no quantile is above or below 0, no expert has more than its share k/E, so each has just that; and a group's load is its
experts'. Without groups bias + d is the published `cutoff - score`. Where all experts of the chosen groups are chosen there is no
cutoff, and the groups alone are balanced.

**Bins** are spaced by the cube of their number around no lift, over the range that a lift can have. K3 spaces 1,000 evenly over
[min(bias) - 1, max(bias) + 1], 0.002 each: half a softmax score of 256 experts. In a simulation of those (8 chosen in 4 of 8
groups, 4,096 tokens a step) the fullest expert had 6.5 times the mean with even bins, 1.8 times with these.

Shapes: T tokens, E experts, G expert groups, N bins.
"""

import torch
from torch import Tensor

from .choice import limit_to_groups

BINS = 1000


def bias_lift(scores_TE: Tensor, bias_E: Tensor, *, top_k: int, n_group: int = 1, topk_group: int = 1) -> Tensor:
    """`[T, E]`: by how much an expert's bias, its group's with it, would have to rise to be level with the best left out."""
    biased_TE = scores_TE + bias_E
    experts = biased_TE.shape[1]
    open_TE, group_scores_TG = limit_to_groups(biased_TE, n_group, topk_group)
    lift_TE = torch.full_like(biased_TE, -torch.inf)
    if top_k < experts // n_group * topk_group:
        lift_TE = open_TE.topk(top_k + 1, dim=-1).values[:, -1:] - biased_TE
    if group_scores_TG is not None and topk_group < n_group:
        left_out_T1 = group_scores_TG.topk(topk_group + 1, dim=-1).values[:, -1:]
        group_lift_TG = (left_out_T1 - group_scores_TG) / 2
        lift_TE = torch.maximum(lift_TE, group_lift_TG.repeat_interleave(experts // n_group, dim=1))
    return lift_TE


def reach(bias: Tensor) -> Tensor:
    """The largest lift there can be, `[..., 1]`: scores lie between 0 and 1, biases as far apart as they are."""
    return bias.amax(dim=-1, keepdim=True) - bias.amin(dim=-1, keepdim=True) + 1


def add_to_histogram(histogram_EN: Tensor, lift_TE: Tensor, bias_E: Tensor) -> None:
    """Counts each lift into its expert's row, in place. No host synchronisation. One that is no number lands in some bin: the
    loss is none either, and whoever trains skips the step."""
    part_TE = (lift_TE / reach(bias_E)).clamp(-1, 1)
    root_TE = part_TE.abs().pow(1 / 3).copysign(part_TE)
    bins_TE = ((root_TE + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
    index = (bins_TE + torch.arange(len(bias_E), device=bias_E.device) * BINS).flatten()
    histogram_EN.view(-1).scatter_add_(0, index, torch.ones_like(index))


def histogram_quantile(histogram: Tensor, bias: Tensor, share: float) -> Tensor:
    """`[..., E]` in fp64: the lift that `share` of an expert's tokens lie below, tokens spread evenly within their bin.

    `histogram [..., E, N]` was counted under `bias [..., E]`. A row without a token needs no lift.
    """
    total = histogram.sum(dim=-1).double()
    up_to = histogram.cumsum(dim=-1).double()
    wanted = (total * share).unsqueeze(-1)
    number = (up_to < wanted).sum(dim=-1, keepdim=True).clamp(max=BINS - 1)
    inside = histogram.gather(-1, number).double()
    part = (wanted - up_to.gather(-1, number) + inside) / inside.clamp(min=1)
    lower, upper = ((edge * (2 / BINS) - 1) ** 3 for edge in (number.double(), number + 1.0))
    lift = (lower + part * (upper - lower)).squeeze(-1) * reach(bias.double())
    return torch.where(total > 0, lift, torch.zeros_like(lift))


def quantile_step(bias: Tensor, histogram: Tensor, share: float, average: float = 0.0) -> Tensor:
    """The next bias `[..., E]`, zero-mean; of the old one a part `average` stays (a moving average).

    Only the bias itself goes from step to step, so a checkpoint needs nothing else.
    """
    wanted = bias.double() + histogram_quantile(histogram, bias, share)
    centred = wanted - wanted.mean(dim=-1, keepdim=True)
    return (average * bias.double() + (1 - average) * centred).to(bias.dtype)
