"""Load an exported folder, as `launch/export.py` writes it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from model import MoEGPTConfig, MoEGPTForCausalLM


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_exported(
    folder: Path, *, device: str, attn_implementation: str | None = None, rope_factor: float | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model (in eval mode, in the dtype it was exported in) and tokenizer. Never runs the code inside the folder.

    `rope_factor` extends the context by YaRN. Errors: one sentence that names the folder and what is missing.
    """
    disable_progress_bar()  # of the weights, which are read in a moment
    for name, maker in (("config.json", "launch/export.py"), ("tokenizer.json", "launch/export.py")):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"--model {folder} has no {name}; name a folder that {maker} wrote")
    if is_moe_gpt(folder):
        config = MoEGPTConfig.from_pretrained(folder)
        if rope_factor:
            config = config.with_rope_factor(rope_factor)
        model = MoEGPTForCausalLM.from_pretrained(
            folder, config=config, dtype="auto", attn_implementation=attn_implementation or "sdpa"
        )
    elif rope_factor:
        raise ValueError(f"--rope_factor extends moe_gpt exports; {folder} is another model")
    else:
        AutoConfig.from_pretrained(folder)  # a sentence about an unknown model type, before the weights are read
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    # tokenizer.json itself: transformers 5's AutoTokenizer rebuilds some tokenizers and changes their ids.
    return model.to(device).eval(), PreTrainedTokenizerFast.from_pretrained(folder)


def is_moe_gpt(folder: Path) -> bool:
    config, _ = MoEGPTConfig.get_config_dict(folder)
    return config.get("model_type") == MoEGPTConfig.model_type
