"""transformers' Glm4Moe is this model without sinks: the two configurations, one into the other.

Parameter names and shapes are the same, but that a stock folder keeps each expert's three matrices apart.
"""

import re
from typing import Any

from torch import Tensor
from transformers import Glm4MoeConfig

from .config import MoEGPTConfig

# What Glm4Moe can be and this model cannot: (field, its only possible value here, Glm4MoeConfig's own default).
ONLY = (
    ("first_k_dense_replace", 0, 1),  # dense layers before the first mixture of experts
    ("attention_bias", False, False),
    ("attention_dropout", 0.0, 0.0),
    ("hidden_act", "silu", "silu"),
)


def to_glm4_moe(config: MoEGPTConfig) -> Glm4MoeConfig:
    """The configuration under which `Glm4MoeForCausalLM` computes the same. Raises ValueError with what Glm4Moe lacks."""
    if config.attention_sinks:
        raise ValueError("this model has attention sinks, which Glm4Moe has not")
    if config.scoring_func != "sigmoid":
        raise ValueError(f"Glm4Moe scores experts by sigmoid, this model by {config.scoring_func}")
    if config.n_routed_experts == 1:
        raise ValueError("Glm4Moe takes the two best experts of a group, and this model has one")
    known = Glm4MoeConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version", "dtype"}
    fields = {name: value for name, value in config.to_dict().items() if name in known}
    fields.update(
        head_dim=config.head_dim,  # no field of Glm4MoeConfig, but read by its attention and by vLLM
        use_qk_norm=config.qk_norm,
        first_k_dense_replace=0,
        num_mtp_layers=0,
        rope_parameters={**(config.rope_parameters or {}), "partial_rotary_factor": 1.0},
    )
    return Glm4MoeConfig(**fields)


def from_glm4_moe(fields: dict[str, Any]) -> MoEGPTConfig:
    """From the fields of a stock folder's config.json. Raises ValueError with what this model lacks."""
    for name, possible, default in ONLY:
        if fields.get(name, default) != possible:
            raise ValueError(f"{name} of a glm4_moe configuration must be {possible!r}, got {fields.get(name, default)!r}")
    stock = Glm4MoeConfig(**fields)  # fills in the defaults, and writes older forms of RoPE's settings in today's
    rope = dict(stock.rope_parameters or {})
    partial = rope.pop("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor must be 1.0, got {partial!r}: this model rotates all dimensions of a head")
    names = set(MoEGPTConfig().to_dict()) & set(stock.to_dict()) - {"model_type", "architectures", "transformers_version"}
    kept = {name: getattr(stock, name) for name in names}
    head_dim = getattr(stock, "head_dim", None) or stock.hidden_size // stock.num_attention_heads
    kept.update(attention_sinks=False, qk_norm=stock.use_qk_norm, head_dim=head_dim, rope_parameters=rope)
    return MoEGPTConfig(**kept)


STOCK_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def expert_name(name: str) -> str:
    """The stacked parameter that a stock folder's matrix of one expert belongs to; the name itself where it is no such matrix."""
    match = STOCK_EXPERT.fullmatch(name)
    if match is None:
        return name
    return f"{match[1]}.down_proj" if match[3] == "down" else f"{match[1]}.gate_up_proj"


def expert_place(state: dict[str, Tensor], name: str) -> Tensor | None:
    """Where in `state` one expert's matrix lies (gate above up, [2I, H]), a view; None where there is no such expert."""
    match, stacked = STOCK_EXPERT.fullmatch(name), state.get(expert_name(name))
    if match is None or stacked is None or int(match[2]) >= len(stacked):
        return None
    matrix = stacked[int(match[2])]
    half = len(matrix) // 2
    return {"down": matrix, "gate": matrix[:half], "up": matrix[half:]}[match[3]]
