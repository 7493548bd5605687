"""Turn a checkpoint, whatever its EP size and ZeRO stage, into one folder that transformers loads.

python launch/export.py --checkpoint runs/first --output hf/

The weights are the optimizer's fp32 masters, rounded once where a narrower dtype is asked for. Everything is written to a hidden
folder beside the output, read back and compared, and only then gets its name.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import integrity
from launch.errors import make_quiet, run_command

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

FORMATS = ("moe_gpt", "glm4_moe")
DTYPES = ("bfloat16", "float32")
KIND = "export"  # in the manifest of an exported folder: only such a one may be replaced
#: AutoEP's names and the model's; its experts are handled apart.
RENAMED = {".mlp.router.gate.weight": ".mlp.gate.weight", ".mlp.router.": ".mlp.gate."}


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python launch/export.py",
        description="Export a checkpoint as a transformers folder: safetensors, config, tokenizer, and the model's own code.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--checkpoint", type=Path, required=True, help="a run's folder, or one of its checkpoints/step_N")
    p.add_argument("--tag", default="latest", help="which of the run's checkpoints: step_N, latest or best")
    p.add_argument("--output", type=Path, required=True, help="a new folder, or one that an earlier export wrote")
    p.add_argument("--format", choices=FORMATS, default="moe_gpt", help="glm4_moe: transformers' own class, no code beside it")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    p.add_argument("--max_shard_size", default="5GB", help="of one safetensors file")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    make_quiet()
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    checkpoint = find_checkpoint(arguments.checkpoint, arguments.tag)
    check_output(arguments.output, checkpoint)
    print(f"verifying {checkpoint} ...", flush=True)
    verify(checkpoint)
    print("reading the weights ...", flush=True)
    model = build(checkpoint, format=arguments.format, dtype=arguments.dtype)
    print(f"writing {arguments.output} ...", flush=True)
    write(model, checkpoint, arguments.output, max_shard_size=arguments.max_shard_size)
    count = sum(p.numel() for p in model.parameters())
    print(f"exported {checkpoint.name} as {arguments.format} in {arguments.dtype}: {count:,} parameters")
    return 0


# ---------------------------------------------------------------------- what is exported, and where to


def find_checkpoint(path: Path, tag: str) -> Path:
    """The checkpoint folder that the command line means. Errors: `FileNotFoundError` that lists what there is."""
    if re.fullmatch(r"step_\d+", path.name) and path.is_dir():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    pointer = folder / tag
    named = pointer.read_text(encoding="utf-8").strip() if tag in ("latest", "best") and pointer.is_file() else tag
    if re.fullmatch(r"step_\d+", named) and (folder / named).is_dir():
        return folder / named
    steps = sorted(int(p.name[5:]) for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name))
    there = f"it has {', '.join(f'step_{s}' for s in steps)}; name one with --tag" if steps else "is it a run's folder?"
    raise FileNotFoundError(f"--checkpoint {path} has no checkpoint {named!r}: {there}")


def check_output(output: Path, checkpoint: Path) -> None:
    """Errors: `ValueError` where the output holds anything but an earlier export."""
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a folder")
    if not any(output.iterdir()):
        return
    manifest, _ = integrity.attempt(lambda: integrity.read_manifest(output))
    if manifest is None or manifest.get("kind") != KIND:
        raise ValueError(f"--output {output} holds something that is no earlier export; name a new or empty folder")


def verify(checkpoint: Path) -> None:
    """Every checksum, before anything is unpickled. Errors: `DamagedError` naming the file."""
    files = integrity.read_manifest(checkpoint)["files"]
    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter
        list(pool.map(lambda name: integrity.check_files(checkpoint, {name: files[name]}, [name]), files))


# ---------------------------------------------------------------------- the model


def build(checkpoint: Path, *, format: str, dtype: str) -> PreTrainedModel:
    """The model of a verified checkpoint, with its weights. Errors: `ValueError` where `format` cannot express it."""
    import torch

    from model import MoEGPTConfig, MoEGPTForCausalLM

    state = json.loads((checkpoint / "state.json").read_bytes())
    config = MoEGPTConfig.from_dict(state["identity"]["model"])
    wanted = getattr(torch, dtype)
    with torch.device("meta"):
        model = MoEGPTForCausalLM(config) if format == "moe_gpt" else _stock_model(config)
    model.config.dtype = wanted
    fill(model, weights(checkpoint), wanted)
    return model.eval()


def _stock_model(config: Any) -> PreTrainedModel:
    """transformers' Glm4Moe is this model without sinks. Errors: `ValueError` naming what it lacks."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    if config.attention_sinks:
        raise ValueError("--format glm4_moe: this model was trained with attention sinks, which Glm4Moe has not; use moe_gpt")
    if config.scoring_func != "sigmoid":
        raise ValueError(f"--format glm4_moe: Glm4Moe scores by sigmoid, this model by {config.scoring_func}; use moe_gpt")
    known = Glm4MoeConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version", "dtype"}
    fields = {name: value for name, value in config.to_dict().items() if name in known}
    fields.update(
        use_qk_norm=config.qk_norm,
        first_k_dense_replace=0,
        num_mtp_layers=0,
        rope_parameters={**config.rope_parameters, "partial_rotary_factor": 1.0},
    )
    return Glm4MoeForCausalLM(Glm4MoeConfig(**fields))


def weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Parameters (fp32) and buffers under the model's names: AutoEP's swap undone."""
    import torch

    from launch.checkpoint_files import BUFFERS
    from launch.consolidate import EXPERT_WEIGHT, master_weights

    halves: dict[str, Tensor] = {}
    for name, value in master_weights(checkpoint):
        prefix, _, which = name.rpartition(".")
        if not EXPERT_WEIGHT.search(name):
            yield _model_name(name), value
        elif which == "w2":
            yield f"{prefix}.down_proj", value  # [E, H, I]
        else:
            halves[name] = value
            if {f"{prefix}.w1", f"{prefix}.w3"} <= halves.keys():
                both = [halves.pop(f"{prefix}.{half}") for half in ("w1", "w3")]
                yield f"{prefix}.gate_up_proj", torch.cat(both, dim=1)  # [E, 2I, H], gate above up
    for name, value in torch.load(checkpoint / BUFFERS, map_location="cpu", weights_only=True).items():
        yield _model_name(name), value
    if halves:
        raise ValueError(f"{checkpoint}: {sorted(halves)[0]} has no other half")


def _model_name(name: str) -> str:
    for theirs, ours in RENAMED.items():
        name = name.replace(theirs, ours)
    return name


def fill(model: PreTrainedModel, values: Iterator[tuple[str, Tensor]], dtype: Any) -> None:
    """Give a model on the meta device its weights, each exactly once and in its shape; correction biases stay fp32.

    Errors: `ValueError` naming a weight that is missing, unknown, twice there or of another shape.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    held: dict[str, Tensor] = {}
    for name, value in values:
        if name in held or name not in wanted or tuple(value.shape) != wanted[name]:
            why = "comes twice" if name in held else f"is {tuple(value.shape)}, the model wants {wanted.get(name, 'none such')}"
            raise ValueError(f"the checkpoint's {name} {why}")
        # Compact copies: a mapped slice would keep its whole file alive, and safetensors refuses shared storage.
        held[name] = value.clone() if name.endswith("e_score_correction_bias") else value.to(dtype, copy=True)
    missing = sorted(wanted.keys() - held.keys() - tied)
    if missing:
        raise ValueError(f"the checkpoint has no {missing[0]} ({len(missing)} weights are missing)")
    model.load_state_dict(held, strict=not tied, assign=True)
    if tied:
        model.tie_weights()


# ---------------------------------------------------------------------- the folder


def write(model: PreTrainedModel, checkpoint: Path, output: Path, *, max_shard_size: str) -> None:
    """Write, read back, compare, publish. A failure or a crash leaves no half an export under `output`'s name.

    Errors: `ValueError` where the disk is too full or a write fails.
    """
    from safetensors import SafetensorError

    output.parent.mkdir(parents=True, exist_ok=True)
    for dead in integrity.leftovers(output.parent):
        if f"-{output.name}-" in dead.name:
            integrity.discard(dead)
    needed, free = sum(p.numel() * p.element_size() for p in model.parameters()), shutil.disk_usage(output.parent).free
    if needed > free:
        raise ValueError(f"--output {output} needs {needed / 1e9:,.3f} GB and the disk has {free / 1e9:,.3f} GB free")
    temporary = integrity.working_name(output.absolute(), "tmp")
    try:
        _save(model, temporary, max_shard_size)
        _copy_tokenizer(checkpoint, temporary)
        _compare(model, temporary)
        for file in temporary.iterdir():  # safetensors writes for its owner's eyes alone
            shutil.copymode(checkpoint / "state.json", file)
        records = {str(p.relative_to(temporary)): integrity.record_file(p) for p in temporary.rglob("*") if p.is_file()}
        about = {"kind": KIND, "checkpoint": str(checkpoint.resolve()), "step": int(checkpoint.name.removeprefix("step_"))}
        integrity.write_manifest(temporary, records, **about)
        integrity.publish(temporary, output.absolute())
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise ValueError(f"writing {output} failed: {' '.join(str(error).split())}") from error
        raise


def _save(model: PreTrainedModel, folder: Path, max_shard_size: str) -> None:
    from model import MoEGPTConfig, MoEGPTForCausalLM

    classes = (MoEGPTConfig, MoEGPTForCausalLM)
    if isinstance(model, MoEGPTForCausalLM):  # the folder carries the model's code, for trust_remote_code=True
        MoEGPTConfig.register_for_auto_class()
        MoEGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    finally:
        for cls in classes:
            cls._auto_class = None


def _copy_tokenizer(checkpoint: Path, folder: Path) -> None:
    tokenizer = checkpoint.parent.parent / "tokenizer"
    if not tokenizer.is_dir():
        print(f"warning: {tokenizer} is missing, so the export has no tokenizer", file=sys.stderr)
        return
    for file in sorted(tokenizer.iterdir()):
        if file.is_file() and file.name != "config.json":
            shutil.copy2(file, folder)


def _compare(model: PreTrainedModel, folder: Path) -> None:
    """Load the folder as a user would, and compare every weight to the bit. Errors: `ValueError` naming one that differs."""
    import torch

    read = type(model).from_pretrained(folder, dtype=model.config.dtype)
    theirs = read.state_dict()
    for name, value in model.state_dict().items():
        if theirs[name].dtype != value.dtype or not torch.equal(theirs[name], value):
            raise ValueError(f"{folder}: {name} reads back otherwise than it was written")


if __name__ == "__main__":
    run_command(main)
