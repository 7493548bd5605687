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
#: Tokens that may all pass every expert in one batched product, where half precision makes each call of its own dear.
BATCH_TOKENS = 16


def attend_one(q_B1ND: Tensor, k_BLMD: Tensor, v_BLMD: Tensor, sinks_N: Tensor | None, mask: AttentionMask) -> Tensor:
    """`[B, 1, N, D]`, softmax in fp32. A kernel without sinks would want a copy of all keys with a sink's among them."""
    if mask.plain_causal and q_B1ND.device.type == "cpu":
        return _attend_one_flash(q_B1ND, k_BLMD, v_BLMD, sinks_N)
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


def _attend_one_flash(q_B1ND: Tensor, k_BLMD: Tensor, v_BLMD: Tensor, sinks_N: Tensor | None) -> Tensor:
    """PyTorch's CPU kernel with the heads that share keys as its queries, so that keys are read once for all of them.

    The sink is `sinks.py`'s rule: exp(lse - logaddexp(lse, sink)) is sigmoid(lse - sink).
    """
    q_BMGD = q_B1ND.view(q_B1ND.shape[0], k_BLMD.shape[2], -1, q_B1ND.shape[-1])
    heads_first = (q_BMGD, k_BLMD.transpose(1, 2), v_BLMD.transpose(1, 2))
    out_BMGD, lse_BMG = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first)
    if sinks_N is not None:
        keep_BMG = (lse_BMG - sinks_N.view(lse_BMG.shape[1:])).sigmoid()
        out_BMGD = (out_BMGD * keep_BMG.unsqueeze(-1)).to(q_B1ND.dtype)
    out: Tensor = out_BMGD.reshape(q_B1ND.shape)
    return out


def takes_few(x_TH: Tensor, indices_TK: Tensor, experts: int) -> bool:
    """Whether `few_experts` is the way: a few tokens on a CPU, whose choice the host reads without waiting."""
    if x_TH.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x_TH.shape[0] <= FEW_TOKENS or _fills_all(x_TH, indices_TK, experts)


def _fills_all(x_TH: Tensor, indices_TK: Tensor, experts: int) -> bool:
    """Whether nearly every expert has a token (on average 86 %), so that a product with all of them reads hardly more."""
    return x_TH.shape[0] <= BATCH_TOKENS and x_TH.dtype.itemsize == 2 and indices_TK.numel() >= 2 * experts


def few_experts(x_TH: Tensor, indices_TK: Tensor, gate_up_EAH: Tensor, down_EHI: Tensor) -> Tensor:
    """`[T, K, H]`: of each token its experts' answers."""
    if _fills_all(x_TH, indices_TK, len(down_EHI)):
        gate, up = (x_TH.expand(len(down_EHI), -1, -1) @ gate_up_EAH.mT).chunk(2, dim=-1)
        out_ETH = (F.silu(gate) * up) @ down_EHI.mT
        return out_ETH[indices_TK, torch.arange(len(x_TH)).unsqueeze(1)]
    return _each_expert(x_TH, indices_TK, gate_up_EAH, down_EHI)


def _each_expert(x_TH: Tensor, indices_TK: Tensor, gate_up_EAH: Tensor, down_EHI: Tensor) -> Tensor:
    """Each expert called once with the rows it was given."""
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
