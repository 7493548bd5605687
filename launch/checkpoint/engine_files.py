"""DeepSpeed's files as one rank writes and reads them.

`CheckpointFiles` takes the place of DeepSpeed's checkpoint engine during a save and a load. So every file is hashed while it is
written and fsynced by the process that wrote it (on a network file system no other can), all ranks in parallel; a full disk
on one rank is remembered instead of raised between DeepSpeed's barriers, where the other ranks would wait for ever; and
what is read back may hold tensors and DeepSpeed's few classes but no code, and only finite numbers.
"""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, cast
from unittest.mock import patch

import torch
import xxhash
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups
from torch import Tensor

from data.cli import UserError, sentence
from launch.checkpoint.finite import check_finite, tensors_in
from launch.checkpoint.unpickle import load_file, save_stages_by_value
from launch.manifest import FileRecord, HashingFile, read_verified


class CheckpointFiles(CheckpointEngine):  # type: ignore[misc]  # DeepSpeed has no types
    """Writes this rank's files of the checkpoint `name` in `folder` and keeps their records, or reads them.

    With `later`, what is saved is copied to host memory, for `flush` to write while training goes on. `records`: what a manifest
    says of the files, which are then verified once more as they are read. `together`: runs each reading on all ranks, which raise
    alike; DeepSpeed lets every rank read as many files in the same order, and waits for all of them after the last. `on_part`: for
    a watchdog, called after each part of a file that is read, or written at once; of what is written later `parts` counts them.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        later: bool = False,
        records: Mapping[str, FileRecord] | None = None,
        together: Callable[[Callable[[], None]], object] | None = None,
        on_part: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__()
        save_stages_by_value()
        self.name, self.folder = name, folder
        self.files: dict[str, FileRecord] = {}
        self.error: OSError | None = None
        self._records, self._together = records or {}, together
        self._shapes: list[dict[str, Any]] | None = None
        self._waiting: list[tuple[Path, Any]] | None = [] if later else None
        self.parts = 0
        self._on_part = self._count if later else on_part

    def _count(self) -> None:
        self.parts += 1

    def create(self, info: Any) -> None:
        """DeepSpeed announces a checkpoint; its folder exists."""

    def commit(self, info: Any) -> bool:
        """DeepSpeed has handed over its last file; publishing is not its business."""
        return True

    def load(self, path: str, map_location: Any = None) -> Any:
        if self._together is None:
            return self._read(path)
        content: list[Any] = []  # which stays here: it is far too much for the control group
        self._together(lambda: content.append(self._read(path)))
        return content[0]

    def _read(self, path: str) -> Any:
        # Not mapped: an optimizer may keep the tensors as they are, and with them a deleted file's disk space.
        file = Path(path)  # without the "/./" of DeepSpeed's empty tag
        record = self._records.get(os.path.relpath(file, self.folder))
        content = load_file(file, mmap=False, content=read_verified(file, record, self._on_part) if record else None)
        if isinstance(content, dict) and content.get("param_shapes"):
            self._shapes = content["param_shapes"]  # DeepSpeed reads the model's file before the optimizer's
        check_finite(content, file, shapes=self._shapes)
        return content

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

    def flush(self) -> dict[str, FileRecord]:
        """Write what waits in memory, and free it; returns the records of all files of this rank.

        Raises UserError with the first error that a write ended with.
        """
        waiting = self._waiting or []
        digests = [digest_of(content) for _, content in waiting]  # before a slow disk leaves them in memory for minutes
        for (path, content), digest in zip(waiting, digests, strict=True):
            self._keep(path, content)
            if digest_of(content) != digest:
                self.error = self.error or OSError(errno.EIO, "this host's memory changed while it was written", str(path))
        self._waiting = None
        if self.error is not None:
            raise UserError(f"writing {self.name} failed: {sentence(self.error)}") from self.error
        return self.files

    def _keep(self, path: Path, content: Any) -> None:
        if self.error is not None:
            return
        file = None
        try:
            file = HashingFile(path, self._on_part)
            try:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    torch.save(content, cast("IO[bytes]", file))
            finally:
                record = file.close()
            self.files[str(path.resolve().relative_to(self.folder.resolve()))] = record
        except OSError as error:
            self.error = error
        except RuntimeError:  # torch's own word for a write that failed; the file knows the reason
            if file is None or file.error is None:
                raise
            self.error = file.error


def digest_of(content: Any) -> str:
    """Of every tensor in it, on the host."""
    digest = xxhash.xxh3_128()
    for _, tensor in tensors_in(content):
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def host_copy(item: Any) -> Any:
    """A copy of a nested state with every tensor compact in host memory, which training cannot change any more."""
    if isinstance(item, Tensor):
        return item.detach().to("cpu", copy=True).contiguous()
    if isinstance(item, dict):
        return type(item)({key: host_copy(value) for key, value in item.items()})
    if isinstance(item, (list, tuple)) and type(item) in (list, tuple):
        return type(item)(host_copy(value) for value in item)
    return copy.deepcopy(item)


def going_through(files: CheckpointFiles, engine: DeepSpeedEngine) -> AbstractContextManager[Any]:
    """While open, `engine.save_checkpoint` and `load_checkpoint` write and read through `files`, and nothing else is written.

    DeepSpeed copies a script beside its files, past any checkpoint engine and between barriers: on a full disk rank 0 would die
    there. Nobody needs it; `launch/export.py` is ours.
    """
    return patch.multiple(engine, create=True, checkpoint_engine=files, _copy_recovery_script=lambda save_path: None)


def state_bytes(engine: DeepSpeedEngine) -> int:
    """About what this rank writes, but for headers: weights that no rank before it has, and its share of the optimizer."""
    return _weight_bytes(engine) + _optimizer_copies(engine) * _optimizer_bytes(engine)


def _weight_bytes(engine: DeepSpeedEngine) -> int:
    """Of the module; under ZeRO 3 it has no numbers of its own. What is tied is written under each of its names."""
    if engine.zero_optimization_stage() == 3:
        return 0
    parameters = [parameter for _, parameter in engine.module.named_parameters(remove_duplicate=False)]
    return sum(p.numel() * p.element_size() for p in parameters if _is_first_with(p, engine))


def _is_first_with(parameter: Any, engine: DeepSpeedEngine) -> bool:
    """Is this the first of the ranks that have it? An expert is on those of its expert-data group, any other on all."""
    if getattr(parameter, "allreduce", True):
        return bool(engine.global_rank == 0)
    return bool(groups._get_expert_data_parallel_rank(parameter.group_name) == 0)


def _optimizer_copies(engine: DeepSpeedEngine) -> int:
    """How often this rank writes what it has of the optimizer. Without ZeRO the first rank with the same experts has a file of it,
    and rank 0 puts it into the model's file as well."""
    if engine.zero_optimization_stage() > 0:
        return 1
    first = groups._get_expert_data_parallel_rank(groups._get_max_expert_size_name()) == 0
    return int(first) + int(engine.global_rank == 0)


def _optimizer_bytes(engine: DeepSpeedEngine) -> int:
    """The masters and what the optimizer keeps for each; before its first step, Adam's two moments."""
    optimizer, weights = engine.optimizer, set(engine.module.parameters())
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    masters = getattr(optimizer, "fp32_partitioned_groups_flat", grouped)  # ZeRO 3's groups hold one part at a time
    total: int = sum(p.numel() * p.element_size() for p in masters if p not in weights)  # in fp32 without ZeRO they are the same
    for master in masters:
        kept = optimizer.state.get(master, {"exp_avg": master, "exp_avg_sq": master})
        total += sum(t.numel() * t.element_size() for t in kept.values() if isinstance(t, Tensor))
    return total
