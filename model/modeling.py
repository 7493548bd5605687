"""The model: embedding, pre-norm blocks of attention and mixture of experts, language-model head.

Shapes: B batch, S sequence, H hidden, V vocabulary.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .attention import Attention
from .config import ATTENTION_IMPLEMENTATIONS, MoEGPTConfig
from .layers import ResidualLinear, RMSNorm
from .loss import IGNORE, token_loss
from .moe import Experts, MoE
from .rope import RotaryTable
from .router import Gate, RoutingTape
from .visibility import Visibility, visibility

ROUTER_STD = 0.01


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + moe(norm(x))`."""

    def __init__(self, config: MoEGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = MoE(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BSH: Tensor, rope: tuple[Tensor, Tensor], seen: Visibility, cache: Cache | None = None) -> Tensor:
        x_BSH = x_BSH + self.self_attn(self.input_layernorm(x_BSH), rope, seen, cache)
        return x_BSH + self.mlp(self.post_attention_layernorm(x_BSH))


def run_on_tape(
    block: nn.Module,
    tape: RoutingTape,
    rope: tuple[Tensor, Tensor],
    seen: Visibility,
    cache: Cache | None,
    x_BSH: Tensor,
) -> Tensor:
    """One block's forward; run again on the same tape, as activation checkpointing does, it routes the same."""
    with tape:
        return block(x_BSH, rope, seen, cache)


class MoEGPTPreTrainedModel(PreTrainedModel):
    config: MoEGPTConfig
    config_class = MoEGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - lists, as transformers wants them
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # A bf16 bias would lose the balancer's step of 0.001.
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """Ours are not transformers' attention functions, so its registry is not asked; `flash` by default."""
        chosen = attn_implementation or "flash"
        if chosen not in ATTENTION_IMPLEMENTATIONS:
            valid = ", ".join(ATTENTION_IMPLEMENTATIONS)
            raise ValueError(f"attn_implementation must be one of {valid}, got {chosen!r}")
        return chosen

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        # Each layer adds two branches to the residual stream; this keeps its variance at the end independent of depth.
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        if isinstance(module, ResidualLinear):
            init.normal_(module.weight, std=residual_std)
        elif isinstance(module, nn.Embedding) and not self.config.tie_word_embeddings:
            init.normal_(module.weight, std=self.config.embedding_initializer_range)
        elif isinstance(module, nn.Linear | nn.Embedding):  # tied embeddings are the head's weight as well
            init.normal_(module.weight, std=std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, Gate):
            init.normal_(module.weight, std=ROUTER_STD)
            for buffer in (module.e_score_correction_bias, module.load_E, module.logit_square_sum):
                init.zeros_(buffer)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, std=std)
            init.normal_(module.down_proj, std=residual_std)
        elif isinstance(module, Attention) and self.config.attention_sinks:
            init.normal_(module.sinks, std=std)


class MoEGPTModel(MoEGPTPreTrainedModel):
    """Everything up to the final norm."""

    def __init__(self, config: MoEGPTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryTable(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x_BSH = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        seen = visibility((x_BSH.shape[0], x_BSH.shape[1]), past, x_BSH.device, position_ids, attention_mask)
        rope = self.rotary(position_ids, past, x_BSH.shape[1], x_BSH.device)
        for block in self.layers:
            run_block = partial(run_on_tape, block, RoutingTape(), rope, seen, past_key_values)
            if self.gradient_checkpointing and self.training:
                x_BSH = self._gradient_checkpointing_func(run_block, x_BSH)
            else:
                x_BSH = run_block(x_BSH)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BSH), past_key_values=past_key_values)


class LMHead(nn.Linear):
    """Logits, or the loss without them, in this module's own forward: there ZeRO-3 has gathered its weight."""

    def __init__(self, config: MoEGPTConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.z_loss_weight = config.z_loss_weight

    def forward(self, x_BSH: Tensor, shift_labels_BS: Tensor | None = None, num_items: Tensor | float | None = None) -> Tensor:
        if shift_labels_BS is None:
            return super().forward(x_BSH)
        z_loss_weight = self.z_loss_weight if self.training else 0.0
        return token_loss(x_BSH.flatten(0, 1), self.weight, shift_labels_BS.flatten(), num_items, z_loss_weight)


class MoEGPTForCausalLM(MoEGPTPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers' convention

    def __init__(self, config: MoEGPTConfig) -> None:
        super().__init__(config)
        self.model = MoEGPTModel(config)
        self.lm_head = LMHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Loss where `labels` (shifted here) or `shift_labels` (already shifted) are given, else logits.

        A target of -100 is none. The loss is fp32: the sum over the targets divided by `num_items_in_batch`, or their
        mean where that is None.
        `position_ids` that restart inside a row mark packed documents, and attention stays inside each.
        """
        outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache)
        x_BSH = outputs.last_hidden_state
        if labels is not None and shift_labels is None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
        if shift_labels is not None:
            loss = self.lm_head(x_BSH, shift_labels, num_items_in_batch)
            return CausalLMOutputWithPast(loss=loss, past_key_values=outputs.past_key_values)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # 0 keeps all
        return CausalLMOutputWithPast(logits=self.lm_head(x_BSH[:, keep]), past_key_values=outputs.past_key_values)
