"""One new token after a cache, without gradients: its attention and its experts with nothing moved that need not move.

Shapes: B batch, N query heads, M key-value heads, G = N / M heads of a group, L keys, D head dim, T tokens, H hidden,
I expert width, E experts, K experts per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .mask import AttentionMask

#: Tokens whose experts are taken one by one: with more of them sorting the rows costs less than the calls (counted at 1 to 8).
FEW_TOKENS = 2


def attend_one(q_B1ND: Tensor, k_BLMD: Tensor, v_BLMD: Tensor, sinks_N: Tensor | None, mask: AttentionMask) -> Tensor:
    """`[B, 1, N, D]`, softmax in fp32. A kernel without sinks would want a copy of all keys with a sink's among them."""
    batch, _, heads, dim = q_B1ND.shape
    q_BMGD = q_B1ND.view(batch, k_BLMD.shape[2], -1, dim)
    accumulate = torch.promote_types(q_B1ND.dtype, torch.float32)
    scores_BMGL = (q_BMGD @ k_BLMD.permute(0, 2, 3, 1)).to(accumulate) * dim**-0.5
    if not mask.plain_causal:
        scores_BMGL = scores_BMGL.masked_fill(~mask.allowed_B1SL, -torch.inf)
    keys = scores_BMGL.shape[-1]
    if sinks_N is not None:
        sinks_MG1 = sinks_N.to(accumulate).view(*q_BMGD.shape[1:3], 1)
        scores_BMGL = torch.cat((scores_BMGL, sinks_MG1.expand(batch, -1, -1, -1)), dim=-1)
    probs_BMGL = scores_BMGL.softmax(dim=-1)[..., :keys].to(v_BLMD.dtype)
    out: Tensor = probs_BMGL @ v_BLMD.transpose(1, 2)
    return out.view(batch, 1, heads, dim)


def takes_few(x_TH: Tensor) -> bool:
    """Whether `few_experts` is the way: a few tokens on a CPU, whose choice the host reads without waiting."""
    few = x_TH.shape[0] <= FEW_TOKENS and x_TH.device.type == "cpu"
    return few and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def few_experts(x_TH: Tensor, indices_TK: Tensor, gate_up_EAH: Tensor, down_EHI: Tensor) -> Tensor:
    """`[T, K, H]`: of each token its experts' answers, each expert called once with the rows it was given."""
    top_k = indices_TK.shape[1]
    rows: dict[int, list[int]] = {}
    for row, expert in enumerate(indices_TK.flatten().tolist()):
        rows.setdefault(expert, []).append(row)
    outs: list[Tensor] = [x_TH] * (len(x_TH) * top_k)
    for expert, mine in rows.items():
        x = x_TH if len(x_TH) == 1 else x_TH[[row // top_k for row in mine]]
        gate, up = F.linear(x, gate_up_EAH[expert]).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, down_EHI[expert])
        for row, one in zip(mine, out, strict=True):
            outs[row] = one
    return torch.stack(outs).view(len(x_TH), top_k, -1)
