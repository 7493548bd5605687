# SPDX-License-Identifier: Apache-2.0
"""moe_gpt for transformers 5, vLLM and lm-eval: Glm4Moe with a learned attention sink per query head.

Attention goes through transformers' `ALL_ATTENTION_FUNCTIONS` with the sinks as `s_aux`, so every backend that takes sinks runs
it. transformers' `sdpa` takes none, so `eager` is the default here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeAttention,
    Glm4MoeForCausalLM,
    Glm4MoeModel,
    Glm4MoePreTrainedModel,
    Glm4MoeTopkRouter,
    apply_rotary_pos_emb,
    repeat_kv,
)

from .configuration_moe_gpt import MoEGPTConfig

FLASH_WITH_SINKS = ("kernels-community/vllm-flash-attn3", "kernels-community/flash-attn4", "flash_attention_4")


def drops_sinks(implementation: str) -> bool:
    """transformers hands `s_aux` to its sdpa, and to a flash kernel without a place for it in its signature, and drops it there
    without a word. A name with a slash is a kernel of the hub's, which transformers takes whatever the class supports."""
    name = implementation.removeprefix("paged|").split("@")[0].split(":")[0]
    return name == "sdpa" or (("/" in name or name.startswith("flash_attention")) and name not in FLASH_WITH_SINKS)


def eager_attention_with_sinks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """`softmax([scores, sink])` in fp32 with the sink's column dropped; [batch, heads, queries, head_dim] in."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = torch.matmul(query, key.transpose(2, 3)).float() * scaling
    if attention_mask is not None:
        # bool where a caller made it, otherwise what is added: 0 and the dtype's lowest number
        added = attention_mask.dtype != torch.bool
        scores = scores + attention_mask.float() if added else scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        sink = s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]].to(value.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class MoEGPTAttention(Glm4MoeAttention):
    """Glm4Moe's attention with sinks. vLLM reads this source: one call of the interface, `s_aux` a parameter of `self`."""

    def __init__(self, config: MoEGPTConfig, layer_idx: int | None = None) -> None:
        super().__init__(config, layer_idx)
        self.sinks = nn.Parameter(torch.empty(config.num_attention_heads))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        cache: Any = None,  # its name from transformers 5.24 on
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if drops_sinks(self.config._attn_implementation):  # set past transformers' own check
            raise ValueError(f"{self.config._attn_implementation} would drop this model's attention sinks; use eager")
        if not isinstance(cache, Cache | None):  # the pages of `generate_batch`, which its attention fills itself
            kwargs["cache"], cache = cache, None
        cache = past_key_values if cache is None else cache
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query_states = self.q_proj(hidden_states).view(hidden_shape)
        key_states = self.k_proj(hidden_states).view(hidden_shape)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        if self.use_qk_norm:
            query_states, key_states = self.q_norm(query_states), self.k_norm(key_states)
        query_states, key_states = query_states.transpose(1, 2), key_states.transpose(1, 2)
        cos, sin = position_embeddings
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
        if cache is not None:
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx)
        attention_interface: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_with_sinks
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            s_aux=self.sinks,
            **kwargs,
        )
        return self.o_proj(attn_output.reshape(*input_shape, -1).contiguous()), attn_weights


class MoEGPTRouter(Glm4MoeTopkRouter):
    """Glm4Moe's router with softmax scores, or with a single expert, of which it would take the two best: groups by the sum of
    their two best, then the best experts of those."""

    def __init__(self, config: MoEGPTConfig) -> None:
        super().__init__(config)
        self.softmax = config.scoring_func == "softmax"

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden_states = hidden_states.view(-1, self.hidden_dim)
        router_logits = F.linear(hidden_states.type(torch.float32), self.weight.type(torch.float32))
        scores = router_logits.softmax(dim=-1) if self.softmax else router_logits.sigmoid()
        biased = (scores + self.e_score_correction_bias).view(-1, self.num_group, self.num_experts // self.num_group)
        group_scores = biased.topk(min(2, biased.shape[-1]), dim=-1)[0].sum(dim=-1)
        chosen = torch.topk(group_scores, k=self.topk_group, dim=-1, sorted=False)[1]
        left_out = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, chosen, False)
        biased = biased.masked_fill(left_out.unsqueeze(-1), float("-inf")).view(-1, self.num_experts)
        indices = torch.topk(biased, k=self.top_k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, indices)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return router_logits, weights * self.routed_scaling_factor, indices


class MoEGPTPreTrainedModel(Glm4MoePreTrainedModel):
    config: MoEGPTConfig
    config_class = MoEGPTConfig
    _supports_sdpa = False  # see drops_sinks
    _supports_flash_attn = False
    # Glm4MoeExperts has the decorator of `experts_implementation`, which transformers looks for in this file's own text.
    _can_set_experts_implementation_cached_value = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, MoEGPTAttention):
            init.normal_(module.sinks, mean=0.0, std=self.config.initializer_range)


class MoEGPTModel(MoEGPTPreTrainedModel, Glm4MoeModel):
    def __init__(self, config: MoEGPTConfig) -> None:
        super().__init__(config)
        self.embed_tokens.padding_idx = None  # it would stop the gradient of the padding token's row, which training does not
        for index, layer in enumerate(self.layers):
            if config.attention_sinks:
                layer.self_attn = MoEGPTAttention(config, index)
            if config.scoring_func == "softmax" or config.n_routed_experts == 1:
                layer.mlp.gate = MoEGPTRouter(config)  # type: ignore[union-attr]
        self.post_init()  # type: ignore[no-untyped-call]


class MoEGPTForCausalLM(MoEGPTPreTrainedModel, Glm4MoeForCausalLM):
    def __init__(self, config: MoEGPTConfig) -> None:
        Glm4MoePreTrainedModel.__init__(self, config)
        self.model = MoEGPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]
