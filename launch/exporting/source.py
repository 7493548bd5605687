"""The checkpoint that an export reads: which one, whether it is whole, and its weights under the model's names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from data.cli import NotFound, UserError
from launch.checkpoint import manifest

if TYPE_CHECKING:
    from torch import Tensor

    from model import MoEGPTConfig

# AutoEP's names and the model's; its experts are handled apart.
RENAMED = {".mlp.router.gate.weight": ".mlp.gate.weight", ".mlp.router.": ".mlp.gate."}


def find_checkpoint(path: Path, tag: str) -> Path:
    """The checkpoint folder that the command line means. Raises NotFound with what there is."""
    if re.fullmatch(r"step_\d+", path.name) and path.is_dir():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    pointer = folder / tag
    named = pointer.read_text(encoding="utf-8").strip() if tag in ("latest", "best") and pointer.is_file() else tag
    if re.fullmatch(r"step_\d+", named) and (folder / named).is_dir():
        return folder / named
    steps = sorted(int(p.name[5:]) for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name))
    there = f"it has {', '.join(f'step_{s}' for s in steps)}; name one with --tag" if steps else "is it a run's folder?"
    raise NotFound(f"--checkpoint {path} has no checkpoint {named!r}: {there}")


def verify(checkpoint: Path) -> None:
    """Every checksum, before anything is unpickled. Raises DamagedError with the file's name."""
    files = manifest.read_manifest(checkpoint)["files"]
    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter
        list(pool.map(lambda name: manifest.check_files(checkpoint, {name: files[name]}, [name]), files))


def model_config(checkpoint: Path) -> MoEGPTConfig:
    from model import MoEGPTConfig

    manifest.read_manifest(checkpoint)  # a folder that was never completed is named as that
    state = json.loads((checkpoint / "state.json").read_bytes())
    return MoEGPTConfig.from_dict(state["identity"]["model"])


def weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Parameters (fp32) and buffers under the model's names: AutoEP's swap undone."""
    import torch

    from launch.checkpoint.buffers import BUFFERS
    from launch.checkpoint.unpickle import load_file
    from launch.checkpoint.weights import EXPERT_WEIGHT, master_weights

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
    for name, value in load_file(checkpoint / BUFFERS, mmap=False).items():
        yield _model_name(name), value
    if halves:
        raise UserError(f"{checkpoint}: {sorted(halves)[0]} has no other half")


def _model_name(name: str) -> str:
    for theirs, ours in RENAMED.items():
        name = name.replace(theirs, ours)
    return name
