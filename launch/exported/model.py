"""Load an exported folder, as `launch/export.py` writes it, or a stock Glm4Moe one.

The model is always this repository's own where it can be, with its kernels; code inside a folder is never run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    Glm4MoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from data.cli import NotFound, UserError, sentence
from data.tokens.folder import read_text
from data.tokens.tokenizer import library_tokenizer
from launch.exported.files import check_weights, refuse_pointer
from launch.model_config import OtherModel, extended, read_model_config
from launch.toolchain import check_toolchain
from model import MoEGPTConfig, MoEGPTForCausalLM
from model.operators import has_triton

# Fields that change what the model computes without changing a weight's shape.
ARITHMETIC = (
    *("num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "scoring_func"),
    *("qk_norm", "rms_norm_eps", "attention_sinks"),
)


def load_exported(
    folder: Path, *, device: str, attn_implementation: str | None = None, rope_factor: float | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model (in eval mode, in the dtype it was exported in) and tokenizer.

    `rope_factor` extends the context by YaRN. Raises UserError with the folder and what is missing or damaged, or with what a
    GPU lacks.
    """
    disable_progress_bar()  # of the weights, which are read in a moment
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise NotFound(f"--model {folder} has no {name}; name a folder that launch/export.py wrote")
        refuse_pointer(folder / name)
    config = own_config(folder)
    if config is not None and has_triton():
        check_toolchain(device)
    if config is None:
        if rope_factor:
            raise UserError(f"--rope_factor extends moe_gpt and glm4_moe folders; {folder} is another model")
        check_weights(folder)
        with _damage_named(folder):
            other: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=_plain_config(folder, attn_implementation),
                dtype="auto",
                output_loading_info=True,
                trust_remote_code=False,
            )
        _check_complete(folder, other[1])
        model: PreTrainedModel = other[0]
    else:
        if rope_factor:
            config = extended(config, rope_factor)
        model = load_model(folder, config, attn_implementation=attn_implementation or "sdpa")
    model.to(device).eval()  # type: ignore[arg-type]
    # The flags say how text is made: beams, a cache or tokens kept out by a folder's settings would change it without a word.
    ids = {name: getattr(model.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    return model, load_tokenizer(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """tokenizer.json itself: transformers 5's AutoTokenizer rebuilds some tokenizers and changes their ids."""
    try:
        made: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
        return made
    except Exception as error:  # the tokenizers library raises bare Exception
        path = folder / "tokenizer.json"
        library_tokenizer(str(path), read_text(path))  # a sentence about the file itself, if that is what is wrong
        reason = sentence(error)[:200]
        raise UserError(f"the tokenizer of {folder} cannot be read, tokenizer_config.json perhaps: {reason}") from error


def own_config(folder: Path) -> MoEGPTConfig | None:
    """The folder's configuration as this repository's model reads it; None for another architecture.

    Raises UserError for one that is damaged, or whose type transformers does not know.
    """
    try:
        return read_model_config(folder / "config.json")
    except OtherModel:
        return None  # transformers' own class computes what ours does not


def load_model(folder: Path, config: MoEGPTConfig, *, attn_implementation: str = "sdpa") -> MoEGPTForCausalLM:
    """This repository's model with a folder's weights, bit for bit. Raises UserError with a file or a weight that is not right."""
    ours = config_type(folder) == MoEGPTConfig.model_type
    _check_layers(folder, config, check_weights(folder), no_more=ours)
    if ours:
        with _damage_named(folder):
            loaded: Any = MoEGPTForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype="auto",
                attn_implementation=attn_implementation,
                output_loading_info=True,
                trust_remote_code=False,
            )
        _check_complete(folder, loaded[1])
        made: MoEGPTForCausalLM = loaded[0]
        return made
    # Stock folders keep an expert's weights apart; transformers puts them together.
    with _damage_named(folder):
        stock: Any = Glm4MoeForCausalLM.from_pretrained(
            folder, config=_plain_config(folder), dtype="auto", output_loading_info=True, trust_remote_code=False
        )
    _check_complete(folder, stock[1])
    theirs: Glm4MoeForCausalLM = stock[0]
    config._attn_implementation = attn_implementation
    with torch.device("meta"):
        model = MoEGPTForCausalLM(config)
    model.load_state_dict(theirs.state_dict(), assign=True)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:  # load counters, which no folder holds
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    model.config.dtype = theirs.dtype
    model.generation_config = theirs.generation_config
    model.tie_weights()
    return model


def _plain_config(folder: Path, attn_implementation: str | None = None) -> PreTrainedConfig:
    """The folder's own, computed by transformers alone: what its config.json names may be kernels on the hub, that is code.

    None is its choice, sdpa or else eager; a flash of ours it does not have.
    """
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config._attn_implementation = "eager" if attn_implementation == "eager" else None
    config._experts_implementation = None
    return config


def _check_complete(folder: Path, report: dict[str, Any]) -> None:
    """Raises UserError with a weight that transformers did not find, and started at random."""
    missing = sorted(report["missing_keys"]) or sorted(report["mismatched_keys"])
    if missing:
        raise UserError(f"{folder} does not hold its model: {missing[0]} is missing")


@contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    """transformers reads what lies in a folder (settings of a generation, an adapter, a quantization) and raises anything: for
    sizes that are not the weights' or no machine's, files that are not JSON, values of other types, packages that are missing."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, ImportError, OSError, UnpicklingError) as error:
        reason = sentence(error)[:200]
        raise UserError(f"{folder} does not hold the model of its config.json: {reason} ({type(error).__name__})") from error


def _check_layers(folder: Path, config: MoEGPTConfig, names: set[str], *, no_more: bool) -> None:
    """Before a model of thousands of layers is built that the weights, by their names, do not hold.

    `no_more` False: a stock folder's last one may be for predicting two tokens.
    """
    layers = len({name.split(".")[2] for name in names if name.startswith("model.layers.")})
    if layers and (layers < config.num_hidden_layers or (no_more and layers > config.num_hidden_layers)):
        raise UserError(
            f"{folder} does not hold the model of its config.json: num_hidden_layers is {config.num_hidden_layers} there, "
            f"and the weights have {layers} layers"
        )


def config_type(folder: Path) -> Any:
    return MoEGPTConfig.get_config_dict(folder)[0].get("model_type")


def check_arithmetic(folder: Path, config: MoEGPTConfig) -> None:
    """Raises UserError where a folder's weights would fit a model of `config` and mean something else.

    RoPE may differ: a longer context begins from the weights of a shorter one.
    """
    source = own_config(folder)
    if source is None:
        raise UserError(f"--init_from {folder} is a {config_type(folder)} that this model cannot be")
    for name in ARITHMETIC:
        if getattr(source, name) != getattr(config, name):
            raise UserError(
                f"--init_from {folder}: {name} is {getattr(source, name)} there and {getattr(config, name)} in this run"
            )
