"""The two formats: transformers' own Glm4Moe, and moe_gpt, which is Glm4Moe with sinks and carries two small files.

The training model itself is never exported: no folder needs this repository or its kernels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from data.cli import UserError, sentence

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from model import MoEGPTConfig

FORMATS = ("moe_gpt", "glm4_moe")
# The files of `hub/` that a moe_gpt folder carries, and what in them each of transformers' Auto classes is to take.
CODE = ("configuration_moe_gpt.py", "modeling_moe_gpt.py")
AUTO_MAP = {
    "AutoConfig": "configuration_moe_gpt.MoEGPTConfig",
    "AutoModel": "modeling_moe_gpt.MoEGPTModel",
    "AutoModelForCausalLM": "modeling_moe_gpt.MoEGPTForCausalLM",
}


def exported_config(config: MoEGPTConfig, format: str) -> PreTrainedConfig:
    """The folder's configuration. Raises UserError where `format` cannot express the model."""
    from model.glm4_moe import to_glm4_moe

    if format == "moe_gpt":
        return _hub_config(config)
    try:
        return to_glm4_moe(config)
    except ValueError as error:
        raise UserError(f"--format {format}: {error}; use moe_gpt") from None


def fits_glm4_moe(config: MoEGPTConfig) -> bool:
    """Whether `exported_config` takes it as that."""
    from model.glm4_moe import to_glm4_moe

    try:
        to_glm4_moe(config)
    except ValueError:
        return False
    return True


def _hub_config(config: MoEGPTConfig) -> PreTrainedConfig:
    """All fields of ours, those of training as well, so that training can be taken up again from the folder."""
    from launch.exporting.hub.configuration_moe_gpt import MoEGPTConfig as HubConfig

    left_out = {"model_type", "architectures", "transformers_version", "dtype", "_name_or_path", "qk_norm"}
    fields = {name: value for name, value in config.to_dict().items() if name not in left_out}
    rope = {**(config.rope_parameters or {}), "partial_rotary_factor": 1.0}
    made = HubConfig(**{**fields, "use_qk_norm": config.qk_norm, "rope_parameters": rope})
    made.auto_map = dict(AUTO_MAP)
    return made


def build(config: PreTrainedConfig, values: Iterable[tuple[str, Tensor]], dtype: str) -> PreTrainedModel:
    """The model of an exported configuration with these weights, in eval mode."""
    import torch
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    from launch.exporting.hub.modeling_moe_gpt import MoEGPTForCausalLM

    wanted = getattr(torch, dtype)
    stock = type(config) is Glm4MoeConfig
    try:
        with torch.device("meta"):
            model: PreTrainedModel = Glm4MoeForCausalLM(config) if stock else MoEGPTForCausalLM(config)  # type: ignore[arg-type]
    except (RuntimeError, OverflowError) as error:  # sizes beyond any machine's
        raise UserError(f"the checkpoint's model cannot be built: {sentence(error)}") from error
    model.config.dtype = wanted
    fill(model, values, wanted)
    model.eval()
    return model


def fill(model: PreTrainedModel, values: Iterable[tuple[str, Tensor]], dtype: Any) -> None:
    """Give a model on the meta device its weights, each exactly once and in its shape; correction biases stay fp32.

    Raises UserError with a weight that is missing, unknown, twice there or of another shape.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    held: dict[str, Tensor] = {}
    for name, value in values:
        if name in held or name not in wanted or tuple(value.shape) != wanted[name]:
            why = "comes twice" if name in held else f"is {tuple(value.shape)}, the model wants {wanted.get(name, 'none such')}"
            raise UserError(f"the checkpoint's {name} {why}")
        # Compact copies: a mapped slice would keep its whole file alive, and safetensors refuses shared storage.
        held[name] = value.clone() if name.endswith("e_score_correction_bias") else value.to(dtype, copy=True)
    missing = sorted(wanted.keys() - held.keys() - tied)
    if missing:
        raise UserError(f"the checkpoint has no {missing[0]} ({len(missing)} weights are missing)")
    model.load_state_dict(held, strict=not tied, assign=True)
    _fill_tables(model)
    if tied:
        model.tie_weights()


def _fill_tables(model: PreTrainedModel) -> None:
    """RoPE's frequencies are no weights: they were made on the meta device and are computed here."""
    embedding = model.get_submodule("model.rotary_emb")
    fresh = type(embedding)(model.config)
    for name, buffer in fresh.named_buffers():
        setattr(embedding, name, buffer)
