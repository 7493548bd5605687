"""Grouped-query attention with learned sinks.

Shapes: B batch, S queries, L keys, N query heads, M key-value heads, D head dim, H hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from .config import MoEGPTConfig
from .decode import attend_one
from .flash import load_kernel, pick_kernel
from .layers import ResidualLinear, RMSNorm, project
from .mask import AttentionMask
from .operators import fills_tile, usable
from .rebuild import rebuildable
from .rope import apply_rope, norm_and_rope
from .sinks import attend_with_sinks


def eager_attention(q_BSND: Tensor, k_BLMD: Tensor, v_BLMD: Tensor, sinks_N: Tensor | None, mask: AttentionMask) -> Tensor:
    """The reference, `[B, S, N, D]`."""
    return attention_and_weights(q_BSND, k_BLMD, v_BLMD, sinks_N, mask)[0]


def attention_and_weights(
    q_BSND: Tensor, k_BLMD: Tensor, v_BLMD: Tensor, sinks_N: Tensor | None, mask: AttentionMask
) -> tuple[Tensor, Tensor]:
    """`(out [B, S, N, D], probabilities [B, N, S, L])`: softmax in fp32, the sink a last column that is dropped again."""
    groups = q_BSND.shape[2] // k_BLMD.shape[2]
    k_BNLD = k_BLMD.transpose(1, 2).repeat_interleave(groups, dim=1)
    v_BNLD = v_BLMD.transpose(1, 2).repeat_interleave(groups, dim=1)
    accumulate = torch.promote_types(q_BSND.dtype, torch.float32)
    scores_BNSL = (q_BSND.transpose(1, 2) @ k_BNLD.mT).to(accumulate) * q_BSND.shape[-1] ** -0.5
    scores_BNSL = scores_BNSL.masked_fill(~mask.allowed_B1SL, -torch.inf)
    if sinks_N is not None:
        sink = sinks_N.to(accumulate)[None, :, None, None].expand(*scores_BNSL.shape[:3], 1)
        scores_BNSL = torch.cat((scores_BNSL, sink), dim=-1)
    probs_BNSL = scores_BNSL.softmax(dim=-1)[..., : k_BNLD.shape[2]]
    probs_BNSL = probs_BNSL.to(v_BNLD.dtype)
    return (probs_BNSL @ v_BNLD).transpose(1, 2), probs_BNSL


def sdpa_attention(q_BSND: Tensor, k_BLMD: Tensor, v_BLMD: Tensor, sinks_N: Tensor | None, mask: AttentionMask) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, whatever kernel it picks. `[B, S, N, D]`."""
    scale = q_BSND.shape[-1] ** -0.5
    if sinks_N is not None:
        return _sdpa_with_sink_key(q_BSND, k_BLMD, v_BLMD, sinks_N, mask, scale)
    allowed_B1SL = None if mask.plain_causal else mask.allowed_B1SL
    return _sdpa(q_BSND, k_BLMD, v_BLMD, allowed_B1SL, mask.plain_causal and mask.queries > 1, scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, allowed_B1SL: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cuda" and (allowed_B1SL is not None or q.dtype == torch.float32):
        # CUDA's flash kernel takes neither, and the next best no grouped heads: all scores `[B, N, S, L]` would be held.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    grouped = k.shape[1] < q.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed_B1SL, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


# Widening every head by 8 keeps the rows aligned as fused kernels want them.
SINK_DIMS = 8


def _sdpa_with_sink_key(
    q_BSND: Tensor, k_BLMD: Tensor, v_BLMD: Tensor, sinks_N: Tensor, mask: AttentionMask, scale: float
) -> Tensor:
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
    if mask.plain_causal and queries > 1:
        return _sdpa(F.pad(q, (0, 0, 0, 0, 1, 0)), k, v, None, True, scale)[:, 1:, :, :dim]
    allowed_B1SL = None if mask.plain_causal else F.pad(mask.allowed_B1SL, (1, 0), value=True)
    return _sdpa(q, k, v, allowed_B1SL, False, scale)[..., :dim]


def flash_attention(
    q_BSND: Tensor, k_BLMD: Tensor, v_BLMD: Tensor, sinks_N: Tensor | None, mask: AttentionMask, kernel: str | None = None
) -> Tensor:
    """The best flash kernel present, or the one named. `[B, S, N, D]`.

    What no flash kernel masks (padded generation, a chunk of queries after cached ones) goes to `sdpa`.
    """
    head_dim = q_BSND.shape[-1]
    found = load_kernel(kernel) if kernel else pick_kernel(q_BSND.device, q_BSND.dtype, head_dim)
    if found is None or not (mask.plain_causal or mask.varlen):
        return sdpa_attention(q_BSND, k_BLMD, v_BLMD, sinks_N, mask)
    scale = head_dim**-0.5
    if mask.plain_causal:
        return attend_with_sinks(q_BSND, k_BLMD, v_BLMD, sinks_N, found, mask, scale)
    q_TND, k_TMD, v_TMD = (x.flatten(0, 1) for x in (q_BSND, k_BLMD, v_BLMD))
    return attend_with_sinks(q_TND, k_TMD, v_TMD, sinks_N, found, mask, scale).view_as(q_BSND)


ATTENTION = {"sdpa": sdpa_attention, "flash": flash_attention}


def product_dtype(x: Tensor) -> torch.dtype:
    """That q, k and v of `x`, or by such weights, have: autocast's where it is on."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else x.dtype


def prepare(implementation: str, x_BSH: Tensor, head_dim: int, mask: AttentionMask) -> None:
    """What every layer asks for and `torch.compile` cannot trace, before the first layer: the kernel and the mask's tensor."""
    kernel = pick_kernel(x_BSH.device, product_dtype(x_BSH), head_dim) if implementation == "flash" else None
    masks_itself = mask.plain_causal or (kernel is not None and mask.varlen)
    if implementation == "eager" or not masks_itself:
        _ = mask.allowed_B1SL


class Attention(nn.Module):
    """Causal self-attention of one layer; parameter names are Glm4Moe's, plus `sinks`."""

    def __init__(self, config: MoEGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        # Reading a configuration's field costs as much as a small kernel, and a new token asks each layer.
        self.qk_norm, self.has_sinks = config.qk_norm, config.attention_sinks
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

    def forward(
        self,
        x_BSH: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: AttentionMask,
        cache: Cache | None = None,
        with_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`(out [B, S, H], probabilities [B, N, S, L] or None)`; whoever wants these gets `eager`, which alone holds them."""
        heads = (*x_BSH.shape[:2], -1, self.head_dim)
        q_BSND, k_BSMD, v_BSMD = (x.view(heads) for x in project(x_BSH, self.q_proj, self.k_proj, self.v_proj))
        q_BSND, k_BSMD = self._turned(q_BSND, k_BSMD, rope)
        if cache is not None:
            k_BSMD, v_BSMD = self._update(cache, k_BSMD, v_BSMD, mask.keys)
        sinks_N = self.sinks if self.has_sinks else None
        weights_BNSL = None
        if with_weights or self.config._attn_implementation == "eager":
            out_BSND, weights_BNSL = attention_and_weights(q_BSND, k_BSMD, v_BSMD, sinks_N, mask)
        elif mask.queries == 1 and not torch.is_grad_enabled():
            out_BSND = attend_one(q_BSND, k_BSMD, v_BSMD, sinks_N, mask)
        else:
            out_BSND = ATTENTION[self.config._attn_implementation](q_BSND, k_BSMD, v_BSMD, sinks_N, mask)
        return self.o_proj(out_BSND.flatten(2)), weights_BNSL

    def _turned(self, q_BSND: Tensor, k_BSMD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """q and k with their norms, where they have any, and positions."""
        weights_D = (self.q_norm.weight, self.k_norm.weight) if self.qk_norm else ()
        # Until the norm is called ZeRO 3 may hold a share of its weight here, and accelerate all of it elsewhere.
        whole = all(weight.numel() == self.head_dim and weight.device == q_BSND.device for weight in weights_D)
        if usable(q_BSND) and whole and fills_tile(self.head_dim):
            return norm_and_rope(q_BSND, k_BSMD, weights_D, *rope, self.config.rms_norm_eps)
        if self.qk_norm:
            q_BSND, k_BSMD = self.q_norm(q_BSND), self.k_norm(k_BSMD)
        if q_BSND.shape[1] == 1 and not torch.is_grad_enabled():  # a new token: the number of calls is what costs
            q, k = apply_rope(torch.cat((q_BSND, k_BSMD), dim=2), *rope).split((q_BSND.shape[2], k_BSMD.shape[2]), dim=2)
            return q, k
        q, k = (apply_rope(x, *rope) for x in (q_BSND, k_BSMD))
        if self.qk_norm:  # else what it was given is kept by nobody, and as large
            rebuildable(q, apply_rope, q_BSND, *rope)
            rebuildable(k, apply_rope, k_BSMD, *rope)
        return q, k

    def _update(self, cache: Cache, k_BSMD: Tensor, v_BSMD: Tensor, keys: int) -> tuple[Tensor, Tensor]:
        """Adds to the cache, which keeps heads before positions, and returns its first `keys` positions.

        A static cache returns all its slots; those beyond the filled ones are not positions. Raises ValueError for a cache that
        has dropped positions (a sliding window): this model attends to all.
        """
        k_BMLD, v_BMLD = cache.update(k_BSMD.transpose(1, 2), v_BSMD.transpose(1, 2), self.layer_idx)
        if k_BMLD.shape[2] < keys:
            raise ValueError(f"the cache keeps {k_BMLD.shape[2]} of {keys} positions, and this model attends to all of them")
        return k_BMLD[:, :, :keys].transpose(1, 2), v_BMLD[:, :, :keys].transpose(1, 2)
