"""What one rank writes into a checkpoint and reads back: DeepSpeed's files, random states, buffers.

`CheckpointFiles` takes the place of DeepSpeed's checkpoint engine during a save and a load. So every file is hashed while it is
written and fsynced by the process that wrote it (on a network file system no other can), all ranks in parallel; a full disk
on one rank is remembered instead of raised between DeepSpeed's barriers, where the other ranks would wait for ever; and
what is read back may hold tensors and DeepSpeed's few classes but no code.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from torch import Tensor, nn

from launch.consolidate import load_file
from launch.integrity import FileRecord, HashingFile

BUFFERS = "buffers.pt"


class CheckpointFiles(CheckpointEngine):
    """Writes this rank's files of the checkpoint `name` in `folder` and keeps their records, or reads them.

    With `later`, what is saved is copied to host memory, for `flush` to write while training goes on.
    """

    def __init__(self, folder: Path, *, name: str, later: bool = False) -> None:
        super().__init__()
        self.name, self.folder = name, folder
        self.files: dict[str, FileRecord] = {}
        self.error: Exception | None = None
        self._waiting: list[tuple[Path, Any]] | None = [] if later else None

    def create(self, info: Any) -> None:
        """DeepSpeed announces a checkpoint; its folder exists."""

    def commit(self, info: Any) -> bool:
        """DeepSpeed has handed over its last file; publishing is not its business."""
        return True

    def load(self, path: str, map_location: Any = None) -> Any:
        # Not mapped: an optimizer may keep the tensors as they are, and with them a deleted file's disk space.
        return load_file(path, mmap=False)

    def preserves_storage_sharing(self) -> bool:
        """DeepSpeed asks whether to copy views before saving, lest each writes its whole storage: `host_copy` does as well."""
        return self._waiting is None

    def save(self, state_dict: Any, path: str) -> None:
        if self._waiting is None:
            self._keep(Path(path), state_dict)
        else:
            self._waiting.append((Path(path), host_copy(state_dict)))

    def write(self, name: str, data: bytes) -> None:
        """A file that is no pickle."""
        self.save(data, str(self.folder / name))

    def flush(self) -> None:
        """Write what waits in memory, and free it."""
        for path, content in self._waiting or ():
            self._keep(path, content)
        self._waiting = None

    def _keep(self, path: Path, content: Any) -> None:
        if self.error is not None:
            return
        file = None
        try:
            file = HashingFile(path)
            try:
                file.write(content) if isinstance(content, bytes) else torch.save(content, file)
            finally:
                record = file.close()
            self.files[str(path.resolve().relative_to(self.folder.resolve()))] = record
        except (OSError, RuntimeError) as error:
            self.error = (file and file.error) or error

    def records(self) -> dict[str, FileRecord]:
        """The records of all files of this rank. Errors: the first that a write ended with, as an OSError."""
        if self.error is not None:
            raise OSError(f"writing {self.name} failed: {' '.join(str(self.error).split())}") from self.error
        return self.files


def host_copy(item: Any) -> Any:
    """A copy of a nested state with every tensor compact in host memory, which training cannot change any more."""
    if isinstance(item, Tensor):
        return item.detach().to("cpu", copy=True).contiguous()
    if isinstance(item, dict):
        return type(item)({key: host_copy(value) for key, value in item.items()})
    if isinstance(item, (list, tuple)) and type(item) in (list, tuple):
        return type(item)(host_copy(value) for value in item)
    return copy.deepcopy(item)


@contextmanager
def going_through(files: CheckpointFiles, engine: Any) -> Iterator[None]:
    """While open, `engine.save_checkpoint` and `load_checkpoint` write and read through `files`."""
    theirs, engine.checkpoint_engine = engine.checkpoint_engine, files
    try:
        yield
    finally:
        engine.checkpoint_engine = theirs


def random_state() -> dict[str, Any]:
    """The random states of this process: torch, numpy, Python and the current GPU. Loadable with `weights_only=True`."""
    version, internal, gauss = random.getstate()
    name, keys, *numbers = np.random.get_state(legacy=True)
    assert name == "MT19937"
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "internal": torch.tensor(internal), "gauss": gauss},
        "numpy": {"keys": torch.from_numpy(keys.astype(np.int64)), "numbers": list(numbers)},
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go on where `random_state` was taken. A GPU's state is kept for a process that has one."""
    torch.set_rng_state(state["torch"])
    python = state["python"]
    random.setstate((python["version"], tuple(python["internal"].tolist()), python["gauss"]))
    keys = state["numpy"]["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, *state["numpy"]["numbers"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the model's state, by name: the routers' correction biases. The same on every rank."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    state = module.state_dict(keep_vars=True)
    return {name: value.detach() for name, value in state.items() if name not in parameters}


def restore_buffers(module: nn.Module, saved: dict[str, Tensor]) -> None:
    """Copy the saved buffers in place, bit for bit. Errors: `ValueError` where names, shapes or dtypes differ.

    DeepSpeed's universal checkpoint restores parameters only: without this the correction bias would be zero again.
    """
    live = persistent_buffers(module)
    if live.keys() != saved.keys():
        raise ValueError(f"the checkpoint's buffers differ from the model's: {sorted(live.keys() ^ saved.keys())[:5]}")
    for name, value in saved.items():
        if live[name].shape != value.shape or live[name].dtype != value.dtype:
            raise ValueError(
                f"buffer {name}: {tuple(value.shape)} {value.dtype} saved, {tuple(live[name].shape)} {live[name].dtype} wanted"
            )
        live[name].copy_(value)
