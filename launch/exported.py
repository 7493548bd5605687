"""Load an exported folder, as `launch/export.py` writes it, or a stock Glm4Moe one.

The model is always this repository's own where it can be, with its kernels; code inside a folder is never run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    Glm4MoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from data.cli import NotFound, UserError, sentence
from data.files import hash_file, is_inside, pointer, read_json, small_file
from data.tokens.folder import read_text
from data.tokens.tokenizer import library_tokenizer
from launch.model_config import OtherModel, extended, read_model_config
from launch.toolchain import check_toolchain
from model import MoEGPTConfig, MoEGPTForCausalLM
from model.operators import has_triton

POINTER_BYTES = 1024  # what git-LFS limits its own to
INDEX_BYTES = 1 << 28  # of an index: 100 bytes a weight
MANIFEST = "manifest.json"  # what launch/checkpoint/manifest.py writes last
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
                folder, dtype="auto", output_loading_info=True, trust_remote_code=False
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


def refuse_pointer(path: Path) -> None:
    """Raises UserError where a clone without git-LFS has left a few lines in place of the file."""
    if path.stat().st_size <= POINTER_BYTES and (stands_for := pointer(small_file(path))):
        raise UserError(f"{path} is a {stands_for.name}: {stands_for.remedy}")


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
        stock: Any = Glm4MoeForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True, trust_remote_code=False)
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


def check_weights(folder: Path) -> set[str]:
    """Size and checksum of weights and tokenizer, as the export wrote them; of any folder that its shards are there and readable.

    Returns the names of the weights by the headers of its safetensors files.
    The weights are then in memory for the reading that follows. Other files are the user's to edit.
    Raises UserError with the file that is damaged or missing.
    """
    for name, record in _recorded(folder).items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing; export it again")
        refuse_pointer(path)
        if path.stat().st_size != record["bytes"] or hash_file(path, "xxh3_128") != record["xxh3_128"]:
            raise UserError(f"{path} is damaged: it is not the file that was exported; export it again")
    _check_shards(folder)
    names = _names_in_headers(folder)
    _check_generation(folder)
    return names


def weights_hash(folder: Path) -> str:
    """Of all weights of a folder that `load_exported` has just read: a later export has the same name.

    What the export recorded `check_weights` has found to be so; the weights of somebody else's folder are read for it.
    """
    recorded = _recorded(folder)
    paths = sorted((*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")))
    hashes = [(p.name, recorded[p.name]["xxh3_128"] if p.name in recorded else hash_file(p, "xxh3_128")) for p in paths]
    return hashlib.sha256(repr(hashes).encode()).hexdigest()


def _recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """What `launch/export.py` recorded of weights and tokenizer; nothing for a folder of somebody else."""
    try:
        manifest = read_json(folder / MANIFEST)
        files = dict(manifest["files"]) if manifest["kind"] == "export" else {}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / MANIFEST} is damaged; export it again") from None
    return {name: record for name, record in files.items() if name.endswith(".safetensors") or name == "tokenizer.json"}


def _check_shards(folder: Path) -> None:
    """Whether a folder has the files that transformers will ask for: `model.safetensors`, or else those that the index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or any(folder.glob("pytorch_model*.bin*")):
        return
    if not index.is_file():
        raise NotFound(f"{folder} has no weights: neither model.safetensors nor {index.name}; copy or export it again")
    refuse_pointer(index)
    try:
        names = sorted(set(read_json(index, INDEX_BYTES)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of weights ({' '.join(str(error).split())[:100]}); copy it again") from None
    if not names or not all(is_inside(name) for name in names):
        raise UserError(f"{index} names no weights, or weights outside its folder; copy it again")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise NotFound(f"{folder} is incomplete: {missing[0]} is missing, {len(missing)} of {len(names)} shards are; copy it again")


def _check_generation(folder: Path) -> None:
    """transformers passes over a broken generation_config.json and fails on one that is JSON and no object."""
    path = folder / "generation_config.json"
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object; mend or remove it")


def _names_in_headers(folder: Path) -> set[str]:
    from safetensors import SafetensorError, safe_open

    names = set[str]()
    for path in sorted(folder.glob("*.safetensors")):
        refuse_pointer(path)
        try:
            with safe_open(path, framework="pt") as file:
                names.update(file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    return names


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
