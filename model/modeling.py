"""The model: embedding, pre-norm blocks of attention and mixture of experts, language-model head.

Shapes: B batch, S sequence, H hidden, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .attention import Attention, prepare
from .auxiliary import AuxiliaryLoss
from .config import ATTENTION_ALIASES, MoEGPTConfig
from .config_json import ATTENTION_IMPLEMENTATIONS
from .head import LMHead, head_loss
from .keywords import check_export, check_keywords, given_cache, note_documents
from .layers import ResidualLinear, ResidualNorm, RMSNorm
from .loss import IGNORE
from .mask import AttentionMask, causal_mask
from .moe import Experts, MoE
from .rebuild import rebuilding
from .replay import RouterReplay
from .rope import RotaryTable
from .router import Gate

logger = logging.get_logger(__name__)


class Block(GradientCheckpointingLayer):
    """`x + attention(norm(x))`, then `x + moe(norm(x))`.

    The base class checkpoints `forward` where that is switched on. Its caller makes a new `replay` for each forward, so that a
    recomputation, which gets the same one again, routes every token as before. Where `rebuilds`, nothing is recomputed, and
    what a cheap pass can make again is not saved.
    """

    rebuilds = False
    _checkpoints = False

    def __init__(self, config: MoEGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = MoE(config)
        self.input_layernorm = ResidualNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = ResidualNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def gradient_checkpointing(self) -> bool:
        """As switched, but never without gradients: the base class would only take the cache away, from `generate` too."""
        return self._checkpoints and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self._checkpoints = on

    def forward(
        self,
        x_BSH: Tensor,
        *,
        rope: tuple[Tensor, Tensor],
        mask: AttentionMask,
        replay: RouterReplay,
        past_key_values: Cache | None = None,
        with_weights: bool = False,
    ) -> Tensor:
        with rebuilding(self.rebuilds):
            x_BSH, normed_BSH = self.attend(x_BSH, rope, mask, past_key_values, with_weights)
            with replay:
                out_BSH: Tensor = self.mlp(normed_BSH, x_BSH)  # which adds x_BSH
                return out_BSH

    def attend(
        self, x_BSH: Tensor, rope: tuple[Tensor, Tensor], mask: AttentionMask, cache: Cache | None, with_weights: bool
    ) -> tuple[Tensor, Tensor]:
        """`x + attention(norm(x))` and its norm: all of a block up to its experts, which `torch.compile` takes as one graph."""
        x_BSH, normed_BSH = self.input_layernorm(x_BSH)
        attended_BSH, _ = self.self_attn(normed_BSH, rope, mask, cache, with_weights)
        stream_BSH, normed_BSH = self.post_attention_layernorm(x_BSH, attended_BSH)
        return stream_BSH, normed_BSH


class MoEGPTPreTrainedModel(PreTrainedModel):
    config: MoEGPTConfig
    config_class = MoEGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - lists, as transformers wants them
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    # A bf16 bias would lose the balancer's step of 0.001.
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}  # noqa: RUF012

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """Ours are not transformers' attention functions, so its registry is not asked; `flash` by default."""
        chosen = attn_implementation or "flash"
        chosen = ATTENTION_ALIASES.get(chosen, chosen)
        if chosen not in ATTENTION_IMPLEMENTATIONS:
            valid = ", ".join(ATTENTION_IMPLEMENTATIONS)
            raise ValueError(f'Specified `attn_implementation="{chosen}"` is not supported; it must be one of {valid}')
        return chosen

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        # Each layer adds two branches to the residual stream; this keeps its variance at the end independent of depth.
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        if isinstance(module, ResidualLinear):  # a marker class: o_proj and the shared expert's down_proj
            init.normal_(module.weight, std=residual_std)
        elif isinstance(module, nn.Embedding) and not self.config.tie_word_embeddings:
            init.normal_(module.weight, std=self.config.embedding_initializer_range)
        elif isinstance(module, nn.Linear | nn.Embedding):  # tied embeddings are the head's weight as well
            init.normal_(module.weight, std=std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, Gate):
            init.normal_(module.weight, std=self.config.router_initializer_range)
            for buffer in module.buffers(recurse=False):
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
        self.post_init()  # type: ignore[no-untyped-call]

    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        given = given_cache(past_key_values, kwargs)
        check_keywords(kwargs, position_ids)
        x_BSH = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        check_export(x_BSH.dtype)
        past_key_values = self._cache(given, use_cache)
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        shape, cached = (x_BSH.shape[0], x_BSH.shape[1]), given is not None and past_key_values is not None
        mask = causal_mask(shape, past, x_BSH.device, position_ids, attention_mask, cached=cached)
        if past_key_values is not None:
            note_documents(past_key_values, past, packed=mask.document_BS is not None)
        rope = self.rotary(position_ids, past, x_BSH.shape[1], x_BSH.device)
        prepare(self.config._attn_implementation, x_BSH, self.config.head_dim, mask)
        with_weights = bool(kwargs.get("output_attentions", self.config.output_attentions))
        for block in self.layers[: self.config.num_hidden_layers]:  # fewer where `generate(assistant_early_exit=...)` drafts
            shared = {"rope": rope, "mask": mask, "past_key_values": past_key_values, "with_weights": with_weights}
            x_BSH = block(x_BSH, replay=RouterReplay(), **shared)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BSH), past_key_values=past_key_values)

    def _cache(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache to fill: `use_cache` None means the configuration's answer, but none in training, where it only costs memory.

        A recomputed block would write its keys a second time, so checkpointing drops the cache where there are gradients. Raises
        ValueError where a filled one would be lost.
        """
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if given is not None and int(given.get_seq_length()) > 0:
                raise ValueError("past_key_values with tokens in it cannot be used while activation checkpointing trains")
            if use_cache or given is not None:
                logger.warning_once("no cache while activation checkpointing trains: recomputing would fill it twice")
            return None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return DynamicCache(config=self.config) if use_cache and given is None else given


class MoEGPTForCausalLM(MoEGPTPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers' convention

    def __init__(self, config: MoEGPTConfig) -> None:
        super().__init__(config)
        self.model = MoEGPTModel(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size)
        self.post_init()  # type: ignore[no-untyped-call]

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Takes any linear layer without a bias, as `resize_token_embeddings` makes one, and gives its weight a head like ours."""
        if not isinstance(new_embeddings, LMHead):
            new_embeddings = LMHead.around(new_embeddings)
        self.lm_head = new_embeddings

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """`generate` asks for this before a step with a static cache: `model/mask.py` makes its own mask of the padding."""
        return attention_mask

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Loss where `labels` (shifted here) or the keyword `shift_labels` (already shifted) are given, else logits.

        With `labels` outside training the logits come as well, for whoever computes metrics; in training they would be the
        largest tensor of all and are never made.
        A target of -100 is none. The loss is fp32: the sum over the targets divided by `num_items_in_batch`, or their
        mean where that is None.
        `position_ids` that restart inside a row mark packed documents, and attention stays inside each.
        `output_attentions` makes this one forward run `eager`, the only implementation that holds the probabilities.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # a name with "label" in it would make Trainer.evaluate want it
        with_logits = shift_labels is None and (labels is None or not self.training)
        if shift_labels is None and labels is not None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
        if shift_labels is not None and use_cache is None:
            use_cache = False
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, return_dict=True, **kwargs
        )
        x_BSH = outputs.last_hidden_state
        loss = None
        if shift_labels is not None:
            z_loss_weight = self.config.z_loss_weight if self.training else 0.0
            loss = head_loss(self.lm_head, x_BSH, shift_labels, num_items_in_batch, z_loss_weight)
            if self.training and self.config.router_aux_loss_coef:
                AuxiliaryLoss.follow(loss)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # 0 keeps all
        return CausalLMOutputWithPast(
            loss=loss,
            logits=self.lm_head(x_BSH[:, keep]) if with_logits else None,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
