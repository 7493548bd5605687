"""The numbers that decide what a model costs, without transformers, for commands that answer at once. `MoEGPTConfig` is the whole
of a configuration; a test holds the two against each other.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

USUAL_CONTEXT = 2048
#: Names that are taken for ours: of the project's first description, of other MoE configurations, Glm4Moe's own for `qk_norm`.
ALIASES = {
    "hidden_dim": "hidden_size",
    "num_attn_heads": "num_attention_heads",
    "num_experts": "n_routed_experts",
    "num_local_experts": "n_routed_experts",
    "context_length": "max_position_embeddings",
    "use_qk_norm": "qk_norm",
}


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """`MoEGPTConfig`'s fields and defaults. Raises `ValueError` that names the field, its value and what is valid."""

    vocab_size: int = 49_152
    hidden_size: int = 1536
    intermediate_size: int = 4096
    moe_intermediate_size: int = 0  # 0 is intermediate_size
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    num_key_value_heads: int = 8
    head_dim: int = 0  # 0 is hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    n_shared_experts: int = 1
    attention_sinks: bool = True
    qk_norm: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("moe_intermediate_size", "head_dim") else 1
            wanted = bool if field.type == "bool" else int
            if type(value) is not wanted or (wanted is int and value < least):
                kind = "true or false" if wanted is bool else f"a whole number of at least {least}"
                raise ValueError(f"{field.name} must be {kind}, got {value!r}")
        object.__setattr__(self, "moe_intermediate_size", self.moe_intermediate_size or self.intermediate_size)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // self.num_attention_heads)
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must not exceed n_routed_experts ({self.n_routed_experts})"
            )

    @property
    def usual_context(self) -> int:
        """Tokens of a sample where nobody asks for another number."""
        return min(USUAL_CONTEXT, self.max_position_embeddings)

    @classmethod
    def of(cls, values: dict[str, Any]) -> ModelSizes:
        """From the content of a config.json; fields that cost nothing are passed over."""
        named = {ALIASES.get(key, key): value for key, value in values.items()}
        known = {field.name for field in fields(cls)}
        left_out = [key for key, value in named.items() if value is None and key in ("head_dim", "moe_intermediate_size")]
        return cls(**{key: value for key, value in named.items() if key in known and key not in left_out})
