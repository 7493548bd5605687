"""Grouped-query attention with learned sinks.

Shapes: B batch, S queries, L keys, N query heads, M key-value heads, D head dim, H hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from .config import MoEGPTConfig
from .kernels import Spans, load_kernel, pick_kernel
from .layers import ResidualLinear, RMSNorm
from .rope import apply_rope
from .sinks import FlashWithSinks
from .visibility import Visibility


def eager_attention(q_BSND: Tensor, k_BLMD: Tensor, v_BLMD: Tensor, sinks_N: Tensor | None, seen: Visibility) -> Tensor:
    """The reference: scores and softmax in fp32, the sink a last column that is dropped again. `[B, S, N, D]`."""
    groups = q_BSND.shape[2] // k_BLMD.shape[2]
    k_BNLD = k_BLMD.transpose(1, 2).repeat_interleave(groups, dim=1)
    v_BNLD = v_BLMD.transpose(1, 2).repeat_interleave(groups, dim=1)
    accumulate = torch.promote_types(q_BSND.dtype, torch.float32)
    scores_BNSL = (q_BSND.transpose(1, 2) @ k_BNLD.mT).to(accumulate) * q_BSND.shape[-1] ** -0.5
    scores_BNSL = scores_BNSL.masked_fill(~seen.mask_B1SL, -torch.inf)
    if sinks_N is not None:
        sink = sinks_N.to(accumulate)[None, :, None, None].expand(*scores_BNSL.shape[:3], 1)
        scores_BNSL = torch.cat((scores_BNSL, sink), dim=-1)
    probs_BNSL = scores_BNSL.softmax(dim=-1)[..., : k_BNLD.shape[2]]
    return (probs_BNSL.to(v_BNLD.dtype) @ v_BNLD).transpose(1, 2)


def sdpa_attention(q_BSND: Tensor, k_BLMD: Tensor, v_BLMD: Tensor, sinks_N: Tensor | None, seen: Visibility) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, whatever kernel it picks. `[B, S, N, D]`."""
    scale = q_BSND.shape[-1] ** -0.5
    if sinks_N is not None:
        return _sdpa_with_sink_key(q_BSND, k_BLMD, v_BLMD, sinks_N, seen, scale)
    mask = None if seen.plain_causal else seen.mask_B1SL
    return _sdpa(q_BSND, k_BLMD, v_BLMD, mask, seen.plain_causal and seen.queries > 1, scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


# Widening every head by 8 keeps the rows aligned as fused kernels want them.
SINK_DIMS = 8


def _sdpa_with_sink_key(q_BSND: Tensor, k_BLMD: Tensor, v_BLMD: Tensor, sinks_N: Tensor, seen: Visibility, scale: float) -> Tensor:
    """The sink as a key of its own: value 0, and a logit that extra head dimensions carry.

    Every q gets `sink / scale` in an extra dimension, the sink's key 1 there and 0 elsewhere, the other keys 0.
    The sum is split in a high and a low part, or bf16 would round a sink of 20 by 0.06. A query of zeros before
    the first keeps the causal diagonal in place. Autograd then gives exact gradients, the sinks' included.
    """
    batch, queries, heads, dim = q_BSND.shape
    logit_N = sinks_N.to(torch.promote_types(q_BSND.dtype, torch.float32)) / scale
    high_N = logit_N.to(q_BSND.dtype)
    low_N = (logit_N - high_N).to(q_BSND.dtype)
    extra_ND = F.pad(torch.stack((high_N, low_N), dim=-1), (0, SINK_DIMS - 2))
    q = torch.cat((q_BSND, extra_ND.expand(batch, queries, heads, SINK_DIMS)), dim=-1)
    sink_key = k_BLMD.new_zeros(dim + SINK_DIMS)
    sink_key[dim : dim + 2] = 1
    sink_key = sink_key.expand(batch, 1, k_BLMD.shape[2], -1)
    k = torch.cat((sink_key, F.pad(k_BLMD, (0, SINK_DIMS))), dim=1)
    v = F.pad(v_BLMD, (0, SINK_DIMS, 0, 0, 1, 0))
    if seen.plain_causal and queries > 1:
        return _sdpa(F.pad(q, (0, 0, 0, 0, 1, 0)), k, v, None, True, scale)[:, 1:, :, :dim]
    mask = None if seen.plain_causal else F.pad(seen.mask_B1SL, (1, 0), value=True)
    return _sdpa(q, k, v, mask, False, scale)[..., :dim]


def flash_attention(
    q_BSND: Tensor, k_BLMD: Tensor, v_BLMD: Tensor, sinks_N: Tensor | None, seen: Visibility, kernel: str | None = None
) -> Tensor:
    """The best flash kernel present, or the one named. `[B, S, N, D]`.

    What no flash kernel masks (padded generation, a chunk of queries after cached ones) goes to `sdpa`.
    """
    head_dim = q_BSND.shape[-1]
    found = load_kernel(kernel) if kernel else pick_kernel(q_BSND.device, q_BSND.dtype, head_dim)
    if found is None or not (seen.plain_causal or (seen.lengths is not None and seen.padding_BL is None)):
        return sdpa_attention(q_BSND, k_BLMD, v_BLMD, sinks_N, seen)
    spans = Spans(head_dim**-0.5, seen.queries > 1, seen.lengths, seen.cumulative_lengths)
    if seen.lengths is None:
        return FlashWithSinks.apply(q_BSND, k_BLMD, v_BLMD, sinks_N, found, spans)
    q_TND, k_TMD, v_TMD = (x.flatten(0, 1) for x in (q_BSND, k_BLMD, v_BLMD))
    return FlashWithSinks.apply(q_TND, k_TMD, v_TMD, sinks_N, found, spans).view_as(q_BSND)


ATTENTION = {"eager": eager_attention, "sdpa": sdpa_attention, "flash": flash_attention}


class Attention(nn.Module):
    """Causal self-attention of one layer; parameter names are Glm4Moe's, plus `sinks`."""

    def __init__(self, config: MoEGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = ResidualLinear(width, config.hidden_size)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        if config.attention_sinks:
            self.sinks = nn.Parameter(torch.empty(config.num_attention_heads))

    def forward(self, x_BSH: Tensor, rope: tuple[Tensor, Tensor], seen: Visibility, cache: Cache | None = None) -> Tensor:
        heads = (*x_BSH.shape[:2], -1, self.head_dim)
        q_BSND, k_BSMD = self.q_proj(x_BSH).view(heads), self.k_proj(x_BSH).view(heads)
        v_BSMD = self.v_proj(x_BSH).view(heads)
        if self.config.qk_norm:
            q_BSND, k_BSMD = self.q_norm(q_BSND), self.k_norm(k_BSMD)
        q_BSND, k_BSMD = apply_rope(q_BSND, *rope), apply_rope(k_BSMD, *rope)
        if cache is not None:
            # The cache keeps heads before positions.
            k, v = cache.update(k_BSMD.transpose(1, 2), v_BSMD.transpose(1, 2), self.layer_idx)
            k_BSMD, v_BSMD = k.transpose(1, 2), v.transpose(1, 2)
        sinks_N = self.sinks if self.config.attention_sinks else None
        attend = ATTENTION[self.config._attn_implementation]
        return self.o_proj(attend(q_BSND, k_BSMD, v_BSMD, sinks_N, seen).flatten(2))
