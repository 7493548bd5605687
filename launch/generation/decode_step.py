"""A whole forward of one new token a row after a cache, on a CPU: the modules' formulas in fewer calls.

At a small model's widths a module's call, a keyword or a view costs as much as a product. What a module may have about it
(adapters, hooks, recording, sharded weights) is looked for once, before the first token.

Shapes: B batch, L keys, N query heads, M key-value heads, P = N + M, D head dim, H hidden, I expert width, E experts, K experts
per token, T tokens, R = T * K routed rows, V vocabulary.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from launch.generation.onednn import linear
from model.attention import Attention
from model.cache import GrowingCache
from model.config import MoEGPTConfig
from model.decode import attend_one, few_experts, takes_few
from model.dispatch import invert, swiglu
from model.grouped import product
from model.head import LMHead
from model.layers import ResidualLinear, ResidualNorm, RMSNorm
from model.mask import AttentionMask, causal_mask
from model.modeling import Block, MoEGPTForCausalLM, MoEGPTModel
from model.moe import Experts, MoE, SharedExpert
from model.rope import RotaryTable
from model.router import Gate, route, router_logits

#: Weights of so many bytes are joined for one product: the copy is small, and above it reading them is what a product costs.
JOINED_BYTES = 1 << 20
#: The modules whose forward is repeated here. Any other (an adapter, AutoEP's layer, a quantized one) keeps the usual way.
KNOWN = {
    *(MoEGPTForCausalLM, MoEGPTModel, Block, Attention, MoE, Gate, Experts, SharedExpert, LMHead, RotaryTable),
    *(RMSNorm, ResidualNorm, ResidualLinear, nn.Linear, nn.Embedding, nn.ModuleList),
}


def can_step(model: nn.Module) -> bool:
    """Whether `DecodeStep` computes what the model would: its own modules as they were made, whole on a CPU, no gradients."""
    if type(model) is not MoEGPTForCausalLM or model.training or torch.is_grad_enabled():
        return False
    if model.config._attn_implementation == "eager" or model.config.output_attentions or model.config.output_hidden_states:
        return False
    return all(_plain(module) for module in model.modules()) and all(
        parameter.device.type == "cpu" and parameter.numel() > 0 for parameter in model.parameters()
    )


def _plain(module: nn.Module) -> bool:
    """No subclass, nothing hooked on, no forward of the instance's own."""
    return type(module) in KNOWN and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class DecodeStep:
    """`step(tokens_B, cache)` gives the model's logits `[B, V]`; made for one generation, in which the weights stay as they are."""

    def __init__(self, model: MoEGPTForCausalLM) -> None:
        self.embedding, self.norm = model.model.embed_tokens.weight, model.model.norm
        self.head, self.rotary = model.lm_head.weight, model.model.rotary
        self.layers = [LayerStep(block, model.config) for block in model.model.layers]

    def __call__(
        self, tokens_B: Tensor, cache: GrowingCache, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """The cache holds the tokens before these, and these too afterwards; mask and positions are the model's."""
        x_BH, past = F.embedding(tokens_B, self.embedding), cache.get_seq_length()
        cos, sin = self.rotary(position_ids, past, 1, x_BH.device)
        rope = cos.unsqueeze(-2), sin.unsqueeze(-2)
        mask = causal_mask((len(x_BH), 1), past, x_BH.device, position_ids, attention_mask)
        for layer, held in zip(self.layers, cast("list[CacheLayerMixin]", cache.layers), strict=True):
            x_BH = layer(x_BH, rope, mask, held)
        return linear(F.rms_norm(x_BH, self.norm.weight.shape, self.norm.weight, self.norm.eps), self.head)


class LayerStep:
    """One block: `x + attention(norm(x))`, then `x + moe(norm(x))`, for `[B, H]`."""

    def __init__(self, block: Block, config: MoEGPTConfig) -> None:
        attention, mlp, shared = block.self_attn, block.mlp, block.mlp.shared_experts
        self.norms, self.eps = (block.input_layernorm.weight, block.post_attention_layernorm.weight), config.rms_norm_eps
        self.qkv = joined(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.qk_norm: Tensor | None = None  # [N + M, D]
        if attention.qk_norm:
            norms = (attention.q_norm.weight.expand(self.heads, -1), attention.k_norm.weight.expand(self.kv_heads, -1))
            self.qk_norm = torch.cat(norms)
        self.sinks, self.o_proj = attention.sinks if attention.has_sinks else None, attention.o_proj.weight
        self.gate, self.bias, self.settings = mlp.gate.weight, mlp.gate.e_score_correction_bias, mlp.gate.settings
        self.experts = mlp.experts.gate_up_proj, mlp.experts.down_proj
        self.gate_up, self.down = joined(shared.gate_proj.weight, shared.up_proj.weight), shared.down_proj.weight

    def __call__(self, x_BH: Tensor, rope: tuple[Tensor, Tensor], mask: AttentionMask, held: CacheLayerMixin) -> Tensor:
        first_H, second_H = self.norms
        x_BH = x_BH + self._attend(F.rms_norm(x_BH, first_H.shape, first_H, self.eps), rope, mask, held)
        return self._mixture(F.rms_norm(x_BH, second_H.shape, second_H, self.eps), x_BH)

    def _attend(self, x_BH: Tensor, rope: tuple[Tensor, Tensor], mask: AttentionMask, held: CacheLayerMixin) -> Tensor:
        sizes = (self.heads + self.kv_heads, self.kv_heads)
        qk_B1PD, v_B1MD = _columns(x_BH, self.qkv).view(len(x_BH), 1, -1, self.head_dim).split(sizes, dim=2)
        q_B1ND, k_B1MD = self._turned(qk_B1PD, rope).split((self.heads, self.kv_heads), dim=2)
        k_BMLD, v_BMLD = held.update(k_B1MD.transpose(1, 2), v_B1MD.transpose(1, 2))
        out_B1ND = attend_one(q_B1ND, k_BMLD.transpose(1, 2), v_BMLD.transpose(1, 2), self.sinks, mask)
        return linear(out_B1ND.flatten(1), self.o_proj)

    def _turned(self, qk_B1PD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """q and k, side by side, with their norms and positions; rounded where the modules round."""
        wide = qk_B1PD.to(torch.promote_types(qk_B1PD.dtype, torch.float32))
        if self.qk_norm is not None:
            normed = F.rms_norm(wide, (self.head_dim,), None, self.eps) * self.qk_norm
            wide = normed.to(qk_B1PD.dtype).to(wide.dtype)
        return torch.addcmul(wide * rope[0], wide.roll(self.head_dim // 2, dims=-1), rope[1]).to(qk_B1PD.dtype)

    def _mixture(self, x_BH: Tensor, residual_BH: Tensor) -> Tensor:
        weights_BK, indices_BK = route(router_logits(x_BH, self.gate), self.bias, **self.settings)
        shared_BH = linear(swiglu(_columns(x_BH, self.gate_up)), self.down)
        if takes_few(x_BH, indices_BK, len(self.gate)):
            few_BKH = few_experts(x_BH, indices_BK, *self.experts)
        else:
            few_BKH = sorted_experts(x_BH, indices_BK, *self.experts)
        return ((few_BKH * weights_BK.unsqueeze(-1)).sum(dim=1) + shared_BH + residual_BH).to(x_BH.dtype)


def joined(*weights: Tensor) -> tuple[Tensor, ...]:
    """Weights of one input as one, where they are small."""
    return (torch.cat(weights),) if sum(weight.nbytes for weight in weights) <= JOINED_BYTES else weights


def _columns(x_BH: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """The products with weights of one input, side by side."""
    products = [linear(x_BH, weight) for weight in weights]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def sorted_experts(x_TH: Tensor, indices_TK: Tensor, gate_up_EAH: Tensor, down_EHI: Tensor) -> Tensor:
    """`[T, K, H]`: of each token its experts' answers, by the products that training takes."""
    experts_R, sorted_R = indices_TK.flatten().sort(stable=True)
    ends_E = torch.searchsorted(experts_R, torch.arange(1, len(down_EHI) + 1), out_int32=True)
    rows_RH = x_TH.index_select(0, sorted_R // indices_TK.shape[1])
    out_RH = product(swiglu(product(rows_RH, gate_up_EAH.mT, ends_E)), down_EHI.mT, ends_E)
    return out_RH.index_select(0, invert(sorted_R)).view(*indices_TK.shape, -1)
