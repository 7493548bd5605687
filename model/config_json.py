"""A config.json without transformers: where it lies, which fields it may have, and the refusal of all others."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from .sizes import ALIASES, ModelSizes

PRESETS_FOLDER = Path(__file__).resolve().parent / "presets"
PRESETS = tuple(sorted(path.stem for path in PRESETS_FOLDER.glob("*.json")))
ATTENTION_IMPLEMENTATIONS = ("flash", "sdpa", "eager")
SCORING_FUNCTIONS = ("sigmoid", "softmax")
BALANCE_RULES = ("sign", "proportional", "quantile", "none")
MOST_POSITIONS = 1 << 24  # float32, in which RoPE counts, tells no more apart
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
