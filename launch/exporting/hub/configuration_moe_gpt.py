# SPDX-License-Identifier: Apache-2.0
"""Configuration of moe_gpt for transformers 5, vLLM and lm-eval: Glm4Moe's fields and three of its own."""

from typing import Any

from transformers import Glm4MoeConfig


class MoEGPTConfig(Glm4MoeConfig):
    """Glm4Moe without its dense first layers, multi-token prediction and partial rotary positions.

    attention_sinks: one learned logit per query head in the softmax's denominator.
    scoring_func: `sigmoid`, as Glm4Moe scores experts, or `softmax`.
    """

    model_type = "moe_gpt"
    base_model_tp_plan = {  # noqa: RUF012 - transformers reads it as a plain class attribute
        **Glm4MoeConfig.base_model_tp_plan,
        "layers.*.self_attn.sinks": "colwise",
        "layers.*.self_attn": "local_params",
        # each rank's gradient is of its own heads, and Glm4Moe's plan sums none
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
    }

    head_dim: int | None = None
    attention_sinks: bool = True
    scoring_func: str = "sigmoid"
    first_k_dense_replace: int = 0
    num_mtp_layers: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.scoring_func not in ("sigmoid", "softmax"):
            raise ValueError(f"scoring_func must be sigmoid or softmax, got {self.scoring_func!r}")
        kwargs.setdefault("partial_rotary_factor", 1.0)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
