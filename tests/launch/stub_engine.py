"""The few methods of a DeepSpeed engine that `CheckpointManager` calls, around two small layers: for faults that need no
training."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from launch import manifest
from launch.checkpoint.identity import RunIdentity
from launch.checkpoint.manager import CheckpointManager
from launch.checkpoint.state import TrainingState
from launch.checkpoint.unpickle import save_stages_by_value

LAYOUT = {"world_size": 1, "ep_size": 1, "zero_stage": 2, "dtype": "float32"}
IDENTITY = {"model": {"hidden_size": 8, "rope_parameters": {"factor": 2.0}}, "data": "abc", "sequence_length": 16, **LAYOUT}

MODEL, OPTIMIZER = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"


class StubEngine:
    global_rank = 0

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.module[1].num_batches_tracked.fill_(seed)
        self.optimizer = torch.optim.AdamW(self.module.parameters())
        self.module(torch.randn(4, 8)).square().sum().backward()
        self.optimizer.step()
        self.param_names = {p: n for n, p in self.module.named_parameters()}
        self.checkpoint_engine: Any = None
        self._config = SimpleNamespace(
            load_universal_checkpoint=False, zero_config=SimpleNamespace(pipeline_loading_checkpoint=False)
        )

    def zero_optimization_stage(self) -> int:
        return 2

    def get_lr(self) -> list[float]:
        return [0.001]

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest, "DeepSpeed must not write a pointer of its own"
        self.checkpoint_engine.makedirs(folder, exist_ok=True)
        self.checkpoint_engine.save(self.module.state_dict(), f"{folder}/{tag}/{MODEL}")
        self.checkpoint_engine.save(self.optimizer.state_dict(), f"{folder}/{tag}/{OPTIMIZER}")

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict]:
        self.module.load_state_dict(self.checkpoint_engine.load(f"{folder}/{tag}/{MODEL}"))
        self.optimizer.load_state_dict(self.checkpoint_engine.load(f"{folder}/{tag}/{OPTIMIZER}"))
        return folder, {}


def manager(run: Path, *, keep_last: int = 0, keep_every: int = 0, **identity: Any) -> CheckpointManager:
    belongs_to = RunIdentity.from_json({**IDENTITY, **identity})
    return CheckpointManager(run, keep_last=keep_last, keep_every=keep_every, identity=belongs_to)


def state(step: int, **extra: Any) -> TrainingState:
    return TrainingState(step=step, samples=16 * step, tokens=256 * step, extra=extra)


def replace_file(checkpoint: Path, name: str, content: Any) -> None:
    """Put something else into a file of a complete checkpoint, and its right sums into the manifest: whoever can do the one can
    do the other. `content`: bytes, or what `torch.save` takes."""
    if isinstance(content, bytes):
        (checkpoint / name).write_bytes(content)
    else:
        save_stages_by_value()  # as the process that trains does
        torch.save(content, checkpoint / name)
    files = manifest.read_manifest(checkpoint)["files"]
    manifest.write_manifest(checkpoint, {**files, name: manifest.record_file(checkpoint / name)})


class Payload:
    """Makes a folder when it is unpickled without restriction."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def steps(run: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step_*"))


def whole(folder: Path) -> bool:
    """Is the checkpoint complete, every file as it was written?"""
    found, _ = manifest.find_manifest(folder)
    return found is not None and not manifest.first_damage(folder, found["files"], found["files"])
