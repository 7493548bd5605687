"""The numbers of a configuration that decide what a model costs, read without transformers.

`MoEGPTConfig` is the configuration; this is the part of it that arithmetic needs, for commands that answer at once. A test
holds the two against each other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

PRESETS_FOLDER = Path(__file__).resolve().parent / "presets"
USUAL_CONTEXT = 2048
#: The names of the project's first description, and of other MoE configurations; `MoEGPTConfig.attribute_map`.
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
        return cls(**{key: value for key, value in named.items() if key in known and value is not None})


def load_sizes(model: str) -> ModelSizes:
    """A preset by name, or the `config.json` at a path. Raises `ValueError` or `FileNotFoundError` that names what there is."""
    presets = sorted(path.stem for path in PRESETS_FOLDER.glob("*.json"))
    path = PRESETS_FOLDER / f"{model}.json" if model in presets else Path(model)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"--model {model} is neither a preset ({', '.join(presets)}) nor a config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"the top level must be an object of configuration fields, not a {type(values).__name__}")
        return ModelSizes.of(values)
    except (ValueError, RecursionError) as error:  # of JSON or of a field
        raise ValueError(f"--model {path}: {error}") from None
