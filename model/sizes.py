"""A config.json without transformers, for commands that answer at once: where it lies, which fields it may have, and the numbers
that decide what a model costs. `MoEGPTConfig` is the whole of it; a test holds the two against each other.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

PRESETS_FOLDER = Path(__file__).resolve().parent / "presets"
PRESETS = tuple(sorted(path.stem for path in PRESETS_FOLDER.glob("*.json")))
ATTENTION_IMPLEMENTATIONS = ("flash", "sdpa", "eager")
SCORING_FUNCTIONS = ("sigmoid", "softmax")
BALANCE_RULES = ("sign", "proportional", "quantile", "none")
USUAL_CONTEXT = 2048
MOST_POSITIONS = 1 << 24  # float32, in which RoPE counts, tells no more apart
#: Names that are taken for ours: of the project's first description, of other MoE configurations, Glm4Moe's own for `qk_norm`.
ALIASES = {
    "hidden_dim": "hidden_size",
    "num_attn_heads": "num_attention_heads",
    "num_experts": "n_routed_experts",
    "num_local_experts": "n_routed_experts",
    "context_length": "max_position_embeddings",
    "use_qk_norm": "qk_norm",
}
#: Every other field of `MoEGPTConfig`, and what transformers writes beside them.
_OTHER = """
    hidden_act rms_norm_eps rope_parameters rope_theta rope_scaling
    n_group topk_group scoring_func norm_topk_prob routed_scaling_factor
    router_balance router_bias_rate router_bias_decay router_bias_average router_aux_loss_coef expert_dropout z_loss_weight
    initializer_range embedding_initializer_range router_initializer_range use_cache bos_token_id eos_token_id pad_token_id
    transformers_version architectures output_hidden_states output_attentions return_dict dtype torch_dtype
    chunk_size_feed_forward is_encoder_decoder id2label label2id num_labels problem_type model_type auto_map
    attn_implementation
"""
OTHER_FIELDS = frozenset(_OTHER.split())
#: What an exported folder says beside them, since transformers reads it as a Glm4Moe, and the only value that this model has.
EXPORTED_FIELDS = {
    **{"attention_bias": False, "attention_dropout": 0.0, "first_k_dense_replace": 0, "output_router_logits": False},
    **{"num_mtp_layers": 0, "num_nextn_predict_layers": 0, "partial_rotary_factor": 1.0},
}
_ROPE = "rope_type type rope_theta factor original_max_position_embeddings beta_fast beta_slow attention_factor"
ROPE_FIELDS = frozenset(_ROPE.split())
#: Whose config.json describes a model that this one can be; a stock Glm4Moe has fields of its own, which are passed over.
MODEL_TYPES = ("moe_gpt", "glm4_moe")


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


def find_model(model: str) -> Path:
    """The `config.json` that `--model` means: a preset's, a file, or a folder's. Raises FileNotFoundError naming the presets."""
    path = PRESETS_FOLDER / f"{model}.json" if model in PRESETS else Path(model)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"--model {model} is neither a preset ({', '.join(PRESETS)}) nor a config.json")
    return path


def load_sizes(model: str) -> ModelSizes:
    """Of the `config.json` that `find_model` finds, whose error it raises. Raises ValueError that names the file and the field."""
    path = find_model(model)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        check_fields(values)
        return ModelSizes.of(values)
    except (ValueError, RecursionError) as error:  # of JSON or of a field
        raise ValueError(f"--model {path}: {error}") from None


def check_fields(values: Any) -> None:
    """Refuse, by ValueError, a config.json that says something which nobody would read: the default would be trained instead."""
    if not isinstance(values, dict):
        raise ValueError(f"the top level must be an object of configuration fields, not a {type(values).__name__}")
    if isinstance(values.get("model"), dict):
        raise ValueError('this is a run\'s config.json; write what stands under its "model" into a file of its own')
    kind = values.get("model_type", MODEL_TYPES[0])
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type must be {' or '.join(MODEL_TYPES)}, not {kind!r}")
    if kind == MODEL_TYPES[0]:
        _check_names(values, {field.name for field in fields(ModelSizes)} | OTHER_FIELDS | ALIASES.keys(), "the model")
        for name in ("rope_parameters", "rope_scaling"):  # today's name, and the one before transformers 5
            rope = values.get(name)
            _check_names(rope if isinstance(rope, dict) else {}, ROPE_FIELDS, name)


def _check_names(values: dict[str, Any], known: Collection[str], whole: str) -> None:
    for name, value in values.items():
        if name in EXPORTED_FIELDS:
            if value != EXPORTED_FIELDS[name]:
                raise ValueError(f"{name} must be {EXPORTED_FIELDS[name]!r}, got {value!r}: this model has nothing else")
            continue
        if name not in known and not name.startswith("_"):
            nearest = difflib.get_close_matches(name, sorted(known), n=1)
            raise ValueError(f"{name} is not a field of {whole}" + (f"; did you mean {nearest[0]}?" if nearest else ""))
