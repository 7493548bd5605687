"""Not a number, not in a checkpoint: a weight or a moment that is NaN or infinite is refused by name when it is read.

Right checksums say that it was saved so. One such number makes every later loss NaN, or worse, sits in the embedding of a rare
token until somebody meets it in the exported model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.cli import UserError
from launch.checkpoint.weights import CHUNK, MOMENTUM, flat_masters, flat_moments, placements


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is; of whole numbers there are no others."""
    if not tensor.is_floating_point():
        return True
    flat = tensor.detach().reshape(-1)
    return all(bool(torch.isfinite(part).all()) for part in flat.split(CHUNK))


def check_finite(content: Any, path: Path | str, *, shapes: list[dict[str, Any]] | None = None) -> None:
    """Raises UserError naming the first parameter of a loaded file that holds NaN or infinity.

    `shapes`: of the parameters, by group, from the model's file; only under ZeRO 3 does the optimizer's file need them.
    """
    for name, tensor in named_tensors(content, shapes):
        if not is_finite(tensor):
            raise UserError(
                f"{path}: {name} holds numbers that are not finite, though its checksum is right: it was saved so; "
                "take an older checkpoint"
            )


def named_tensors(content: Any, shapes: list[dict[str, Any]] | None) -> Iterator[tuple[str, Tensor]]:
    """The weights and moments in one of DeepSpeed's files, by the parameter's name as far as the file tells."""
    if not isinstance(content, Mapping) or "optimizer_state_dict" not in content:
        yield from tensors_in(content, "")
        return
    state = content["optimizer_state_dict"]
    if "fp32_flat_groups" in state and shapes is None:
        return  # nothing says where the padding is, and padding may hold anything
    moments = flat_moments(state)
    for number, (flat, group) in enumerate(zip(flat_masters(state), placements(state, shapes or []), strict=True)):
        for name, at in group.items():
            yield name, flat[at]
            for kind, value in moments.get(number, {}).items():
                # Of ZeRO 1 and 2 with the padding at the end of the last partition, which a master is saved without.
                if kind != MOMENTUM and isinstance(value, Tensor) and value.ndim == 1 and value.numel() >= flat.numel():
                    yield f"{name} ({kind})", value[at]
        if MOMENTUM in moments.get(number, {}):  # Muon's is of whole matrices, cut otherwise
            yield f"{', '.join(group)} ({MOMENTUM})", moments[number][MOMENTUM]


def tensors_in(item: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a nested state, by its path."""
    if isinstance(item, Tensor):
        yield name, item
    elif isinstance(item, Mapping):
        for key, value in item.items():
            yield from tensors_in(value, f"{name}.{key}" if name else str(key))
    elif isinstance(item, (list, tuple)):
        for number, value in enumerate(item):
            yield from tensors_in(value, f"{name}[{number}]")
