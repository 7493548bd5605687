"""Which experts a token goes to: DeepSeek-V3's group-limited top-k.

Shapes: T tokens, E experts, K experts per token, G expert groups.
"""

import torch
from torch import Tensor


def group_limited_topk(biased_TE: Tensor, top_k: int, n_group: int, topk_group: int) -> Tensor:
    """Indices `[T, K]` of the best experts of the best groups, best first; a tie goes to the lower index."""
    open_TE, _ = limit_to_groups(biased_TE, n_group, topk_group)
    return stable_topk(open_TE, top_k)


def limit_to_groups(biased_TE: Tensor, n_group: int, topk_group: int) -> tuple[Tensor, Tensor | None]:
    """`biased_TE` with -inf outside each token's best groups, and the groups' scores `[T, G]`; None of one group.

    A group's score is the sum of its two best. Experts of the other groups get -inf, not 0: with negative biases a
    0 would win against a chosen group's expert.
    """
    if n_group == 1:
        return biased_TE, None
    group_TGE = biased_TE.unflatten(1, (n_group, -1))
    group_scores_TG = group_TGE.topk(2, dim=-1).values.sum(dim=-1)
    chosen = stable_topk(group_scores_TG, topk_group)
    left_out_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, chosen, False)
    return group_TGE.masked_fill(left_out_TG.unsqueeze(-1), -torch.inf).flatten(1), group_scores_TG


def stable_topk(scores: Tensor, k: int) -> Tensor:
    """Indices of the `k` highest along the last dimension, best first, the lower index first among equals.

    `torch.topk` leaves open which of two equals it returns, and answers differently on CPU and GPU.
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
