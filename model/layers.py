"""Small layers that several parts share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor moved without the host waiting for the device: to a GPU by way of pinned memory."""
    if device.type == "cuda" and x.device.type == "cpu" and not x.is_pinned():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


class ResidualLinear(nn.Linear):
    """A projection without bias that writes into the residual stream; it starts smaller (`_init_weights`)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

    Statistics and product are fp32 and rounded once to x's dtype (Glm4Moe rounds before it multiplies with the
    weight as well; in fp32 the two are the same).
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
