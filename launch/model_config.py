"""A model's `config.json`, whoever wrote it: one reading for `--model` of training and for exported folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from data.cli import NotFound, UserError, sentence
from data.files import read_json
from model import MoEGPTConfig
from model.config_json import MOST_POSITIONS, PRESETS, check_fields, find_model
from model.glm4_moe import from_glm4_moe

T = TypeVar("T")
MOST_BYTES = 1 << 24  # of the file; no model's has a hundredth
MOST_LABELS = 1_000_000


class OtherModel(UserError):
    """A model that is not this repository's, and why not. transformers may know it."""


def load_model_config(model: str, **overrides: Any) -> MoEGPTConfig:
    """Of what `--model` names (`find_model`). Raises UserError that names the presets, or the file and its field."""
    if model in PRESETS:
        return _valid(model, lambda: MoEGPTConfig.preset(model, **overrides))
    try:
        path = find_model(model)
    except FileNotFoundError as error:
        raise NotFound(str(error)) from None
    _valid(model, lambda: check_fields(read_json(path)))
    config = _valid(model, lambda: read_model_config(path, default=MoEGPTConfig.model_type))
    for name, value in overrides.items():
        setattr(config, name, value)
    return config


def _valid(model: str, make: Callable[[], T]) -> T:
    """The model's own ValueErrors name the field, but not the file, and are not yet a user's mistake."""
    try:
        return make()
    except ValueError as error:
        said = sentence(error)
        raise UserError(f"--model {said}" if said.startswith(model) else f"--model {model}: {said}") from error


def extended(config: MoEGPTConfig, factor: float) -> MoEGPTConfig:
    """By `--rope_factor`. Raises UserError for more positions than RoPE tells apart."""
    longer = config.with_rope_factor(factor)
    if longer.max_position_embeddings > MOST_POSITIONS:
        made = longer.max_position_embeddings
        raise UserError(f"--rope_factor {factor:g} makes {made:,} positions; {MOST_POSITIONS:,} are the most")
    return longer


def read_model_config(path: Path, default: str | None = None) -> MoEGPTConfig:
    """Ours, or a stock Glm4Moe folder's where that is this model without sinks; `default`: the type of one that names none.

    Raises OtherModel for another architecture, UserError for what is damaged, makes no sense or is unknown to transformers too.
    """
    try:
        fields = _fields(path)
        kind = fields.get("model_type") or default
        if kind == "glm4_moe":
            return _of_glm4_moe(path, fields)
        if kind == MoEGPTConfig.model_type:
            return MoEGPTConfig.from_dict(fields)
        AutoConfig.from_pretrained(path, trust_remote_code=False)  # a sentence about an unknown type
    except OtherModel:
        raise
    except (ValueError, OSError, TypeError, AttributeError, KeyError, OverflowError, RecursionError, StrictDataclassError) as error:
        raise UserError(f"{path}: {sentence(error)[:300]}") from None
    raise OtherModel(f"{path}: it is a {kind}, and must be a {MoEGPTConfig.model_type} or glm4_moe")


def _fields(path: Path) -> dict[str, Any]:
    raw = read_json(path, MOST_BYTES)
    if not isinstance(raw, dict):
        raise UserError("it is not a JSON object")
    if isinstance(labels := raw.get("num_labels"), int) and labels > MOST_LABELS:
        raise UserError(f"num_labels is {labels}, for each of which transformers makes a name")
    fields, _ = MoEGPTConfig.get_config_dict(path)
    return fields


def _of_glm4_moe(path: Path, fields: dict[str, Any]) -> MoEGPTConfig:
    try:
        return from_glm4_moe(fields)
    except ValueError as error:
        raise OtherModel(f"{path}: {error}") from error
