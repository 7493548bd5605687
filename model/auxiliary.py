"""The classical load-balancing loss, for comparison: what balancing by a bias is there to replace.

`coefficient * sum_e f_e P_e` over a micro-batch of a rank (Switch, arXiv 2101.03961, section 2.2, for k experts as in DeepSeek-V2,
arXiv 2405.04434, section 2.1.2): f_e is the share of the routed rows that expert e gets, times E, and P_e the mean of its scores,
normalised, so even routing costs `coefficient`. It is added to the gradient alone: the loss that is logged is the language model's.

Shapes: T tokens, E experts, K experts per token.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable


class AuxiliaryLoss(torch.autograd.Function):
    """Passes weights on, and in the backward gives the auxiliary loss the gradient that the model's loss has.

    So it is as if both had been added, whatever accumulation or a loss scale multiply the loss by, and recomputed blocks need no
    way out for it.
    """

    #: The gradient of the model's loss, for the length of its backward (`follow`); one backward at a time.
    gradient: Tensor | None = None

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return weights_TK.view_as(weights_TK)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor]:
        (gradient_TK,) = gradients
        if AuxiliaryLoss.gradient is None:
            raise RuntimeError("router_aux_loss_coef: a backward without the model's own loss, so its weight is not known")
        return gradient_TK, AuxiliaryLoss.gradient.to(ctx.dtype)

    @staticmethod
    def follow(loss: Tensor) -> None:
        """Call it with the model's loss, whose backward will come."""

        def remember(gradient: Tensor) -> None:
            AuxiliaryLoss.gradient = gradient.detach()
            Variable._execution_engine.queue_callback(forget)  # called when this backward is over

        def forget() -> None:
            AuxiliaryLoss.gradient = None

        if loss.requires_grad:
            loss.register_hook(remember)


def balance_loss(scores_TE: Tensor, counts_E: Tensor) -> Tensor:
    """`sum_e f_e P_e`; 1 where routing is even."""
    share_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
    load_E = counts_E.to(scores_TE.dtype) * scores_TE.shape[1] / counts_E.sum()
    return (load_E * share_TE.mean(dim=0)).sum()
