"""Rotary positions with YaRN (Peng et al., arXiv 2309.00071): pure functions, and a table that stays fp32.

Shapes: B batch, S sequence, L positions in the table, D head dim, C = D / 2 frequencies, N heads.
"""

import math
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from .config import ROPE_TYPES, MoEGPTConfig, RopeParameters
from .layers import to_device
from .operators import ops
from .rebuild import rebuildable


def yarn_frequencies(rope: RopeParameters, head_dim: int) -> Tensor:
    """Angular frequencies `[C]` in radians per position, float64, fastest first.

    A dimension that turns more than `beta_fast` times within the original context keeps its frequency
    (extrapolation), one that turns less than `beta_slow` times is slowed down by `factor` (interpolation), and
    between the two a linear ramp over the dimension index blends them. Section 3.2 of the paper; the ramp's ends
    are rounded outwards as in its published code.
    """
    exponent_C = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    plain_C: Tensor = rope["rope_theta"] ** -exponent_C
    factor = rope.get("factor", 1.0)
    if rope["rope_type"] == "default" or factor == 1.0:
        return plain_C
    low, high = _ramp_ends(rope, head_dim)
    index_C = torch.arange(head_dim // 2, dtype=torch.float64)
    interpolate_C = ((index_C - low) / max(high - low, 1e-3)).clamp(0, 1)
    return plain_C * (1 - interpolate_C) + plain_C / factor * interpolate_C


def _ramp_ends(rope: RopeParameters, head_dim: int) -> tuple[int, int]:
    """The frequency indices where interpolation begins and where it is complete."""

    def index_turning(times: float) -> float:
        """The (fractional) frequency index that turns `times` times within the original context."""
        period_ratio = rope["original_max_position_embeddings"] / (times * 2 * math.pi)
        return head_dim * math.log(period_ratio) / (2 * math.log(rope["rope_theta"]))

    low = math.floor(index_turning(rope.get("beta_fast", 32.0)))
    high = math.ceil(index_turning(rope.get("beta_slow", 1.0)))
    return max(low, 0), min(high, head_dim - 1)


def yarn_concentration(rope: RopeParameters) -> float:
    """Factor on cos and sin (so its square is on the logits): 0.1 ln(factor) + 1, and 1.0 without extension."""
    if rope["rope_type"] == "default":  # where transformers reads nothing of YaRN's, whatever stands beside it
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    factor = rope.get("factor", 1.0)
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0


def rope_table(rope: RopeParameters, head_dim: int, length: int) -> tuple[Tensor, Tensor]:
    """`(cos_LD, sin_LD)` of positions 0..length-1 in fp32, for `apply_rope`: the first half of sin is negative.

    The angles are float64: at position 8,191 an fp32 angle is already off by up to 5e-4 radians.
    """
    angle_LC = torch.arange(length, dtype=torch.float64)[:, None] * yarn_frequencies(rope, head_dim)
    cos_LC, sin_LC = angle_LC.cos() * yarn_concentration(rope), angle_LC.sin() * yarn_concentration(rope)
    return torch.cat((cos_LC, cos_LC), dim=-1).float(), torch.cat((-sin_LC, sin_LC), dim=-1).float()


def apply_rope(x_BSND: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    """Rotates the pairs (d, d + D/2), GPT-NeoX's layout, in the tables' fp32; returned in x's dtype."""
    x = x_BSND.to(torch.promote_types(x_BSND.dtype, cos_BSD.dtype))
    cos, sin = cos_BSD.unsqueeze(-2), sin_BSD.unsqueeze(-2)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x_BSND.dtype)


def norm_and_rope(
    q_BSND: Tensor, k_BSMD: Tensor, weights_D: tuple[Tensor, ...], cos_BSD: Tensor, sin_BSD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """On a GPU, in one pass: q and k normed by head with the two weights, if there are any, and rotated."""
    given = q_BSND, k_BSMD, cos_BSD, sin_BSD, *weights_D
    turned = NormAndRope.apply(eps, *given)  # type: ignore[no-untyped-call]
    q, k = rebuildable(turned, partial(_normed_and_turned, eps), *given) if weights_D else turned
    return q, k


def _normed_and_turned(
    eps: float, q_BSND: Tensor, k_BSMD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor, *weights_D: Tensor
) -> tuple[Tensor, Tensor]:
    tables = cos_BSD.flatten(0, 1), sin_BSD.flatten(0, 1)
    q, k = ops.norm_rope(q_BSND.flatten(0, 1), k_BSMD.flatten(0, 1), weights_D, *tables, eps)
    return q.view(q_BSND.shape), k.view(k_BSMD.shape)


class NormAndRope(torch.autograd.Function):
    """Keeps what it is given."""

    @staticmethod
    def forward(
        ctx: Any, eps: float, q_BSND: Tensor, k_BSMD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor, *weights_D: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q_BSND, k_BSMD, cos_BSD, sin_BSD, *weights_D)
        ctx.eps = eps
        return _normed_and_turned(eps, q_BSND, k_BSMD, cos_BSD, sin_BSD, *weights_D)

    @staticmethod
    def backward(ctx: Any, dq_BSND: Tensor, dk_BSMD: Tensor) -> tuple[Tensor | None, ...]:
        q_BSND, k_BSMD, cos_BSD, sin_BSD, *weights_D = ctx.saved_tensors
        rows = [x.flatten(0, 1) for x in (dq_BSND, dk_BSMD, q_BSND, k_BSMD)]
        dq, dk, dweights = ops.norm_rope_backward(*rows, weights_D, cos_BSD.flatten(0, 1), sin_BSD.flatten(0, 1), ctx.eps)
        dweights_D = (dweights[i].to(weight.dtype) for i, weight in enumerate(weights_D))
        return None, dq.view(q_BSND.shape), dk.view(k_BSMD.shape), None, None, *dweights_D


class RotaryTable(nn.Module):
    """cos and sin for given positions. No parameters and no buffers, so nothing can cast it to bf16 or save it."""

    def __init__(self, config: MoEGPTConfig) -> None:
        super().__init__()
        rope_type = (config.rope_parameters or {}).get("rope_type")
        if rope_type not in ROPE_TYPES:  # a configuration refuses it as well, but its fields can be changed afterwards
            raise ValueError(f"rope_parameters.rope_type must be one of {', '.join(ROPE_TYPES)}, got {rope_type!r}")
        self.rope, self.head_dim = cast("RopeParameters", config.rope_parameters), config.head_dim
        self.table: tuple[Tensor, Tensor] | None = None

    def _table(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.table is None or self.table[0].device != device or self.table[0].shape[0] < length:
            rounded = 1 << max(length - 1, 255).bit_length()  # grows in powers of two, so generation rebuilds it rarely
            with torch.device("cpu"), torch.inference_mode(False):
                cos_LD, sin_LD = rope_table(self.rope, self.head_dim, rounded)
                self.table = (cos_LD.to(device), sin_LD.to(device))
        return self.table

    def forward(self, position_ids_BS: Tensor | None, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """fp32 `(cos, sin)`, `[B, S, D]` for given positions or `[1, S, D]` for `start .. start + length - 1`."""
        if position_ids_BS is None:
            cos_LD, sin_LD = self._table(start + length, device)
            return cos_LD[None, start : start + length], sin_LD[None, start : start + length]
        # The host waits for the maximum where the positions are on a GPU: whoever trains leaves them on the host.
        cos_LD, sin_LD = self._table(int(position_ids_BS.max()) + 1, device)
        position_ids_BS = to_device(position_ids_BS, device)
        return cos_LD[position_ids_BS], sin_LD[position_ids_BS]
